"""GPT-2 large (774M), trained from scratch on 15.5 billion tokens, 20 per parameter: fineweb one and a half times.

    python train.py config/gpt2/774m.py
    torchrun --nproc_per_node=8 train.py config/gpt2/774m.py

Computed by tools/scaling.py, not measured: 774M parameters, 15.47B tokens: 2.4 d on one H100, 7.1 h on 8, 53 min on 64,
if they reach 40% MFU; 54.2 GB on each.
"""

_base = "../gpt2.py"
out_dir = "out/gpt2_774m"

n_layer = 36
n_head = 20
n_embd = 1280

micro_batch_size = 16  # sequences in memory at a time: 32 per batch, for up to 32 GPUs; on 64, use 8
max_iters = 29500  # 15.5 billion tokens
learning_rate = 2.5e-4
min_lr = 2.5e-5
eval_interval = 1000

on_cpu = dict(n_layer=2, n_head=2, n_embd=128, micro_batch_size=0, max_iters=10, eval_interval=10)
