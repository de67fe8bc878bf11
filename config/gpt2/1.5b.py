"""GPT-2 XL (1.5B), trained from scratch on 31 billion tokens, 20 per parameter: fineweb three times.

    python train.py config/gpt2/1.5b.py
    torchrun --nproc_per_node=8 train.py config/gpt2/1.5b.py

Computed by tools/scaling.py, not measured: 1.56B parameters, 31.14B tokens: 9.4 d on one H100, 28.1 h on 8, 3.5 h on
64, if they reach 40% MFU; 58.2 GB on each.
"""

_base = "../gpt2.py"
out_dir = "out/gpt2_1.5b"

n_layer = 48
n_head = 25
n_embd = 1600

batch_size = 1024  # a million tokens
micro_batch_size = 8  # sequences in memory at a time: 128 per batch, for up to 128 GPUs
max_iters = 29700  # 31.1 billion tokens
learning_rate = 2e-4
min_lr = 2e-5
warmup_iters = 358  # 375 million tokens
eval_interval = 1000

on_cpu = dict(n_layer=2, n_head=2, n_embd=128, batch_size=8, micro_batch_size=0, max_iters=10, warmup_iters=2,
              eval_interval=10)
