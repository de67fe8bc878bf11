"""What the machine has (devices, processes, terminal) and fast kernels for it. Nothing here imports a model."""
