"""What this machine has, and what makes it fast: nothing here knows a model."""
