"""GPT-2 medium (350M), trained from scratch on 10 billion tokens: fineweb once.

    python train.py config/gpt2/350m.py
    torchrun --nproc_per_node=8 train.py config/gpt2/350m.py

Computed by tools/scaling.py, not measured: 355M parameters, 10.00B tokens: 17.0 h on one H100, 2.1 h on 8, 16 min on
64, if they reach 40% MFU; 32.5 GB on each.
"""

_base = "../gpt2.py"
out_dir = "out/gpt2_350m"

n_layer = 24
n_head = 16
n_embd = 1024

micro_batch_size = 16  # sequences in memory at a time: 32 per batch, for up to 32 GPUs; on 64, use 8
learning_rate = 3e-4
min_lr = 3e-5

on_cpu = dict(n_layer=2, n_head=2, n_embd=128, micro_batch_size=0)
