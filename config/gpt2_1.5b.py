"""GPT-2 XL (1.5B), trained from scratch on 31 billion tokens, 20 per parameter: fineweb three times.

    python prepare.py fineweb
    python train.py config/gpt2_1.5b.py
    torchrun --nproc_per_node=8 train.py config/gpt2_1.5b.py

Computed by scaling.py, not measured: 1.56B parameters, 31.14B tokens: 9.4 d on one H100, 28.1 h on 8, 3.5 h on 64, if
they reach 40% MFU; 58.2 GB on each. Without a GPU the same command makes ten small updates, to see that all is
in place.
"""

import os

dataset = "fineweb"
out_dir = "out/gpt2_1.5b"

n_layer = 48
n_head = 25
n_embd = 1600
block_size = 1024

batch_size = 1024  # a million tokens
gradient_accumulation_steps = max(1, batch_size // (8 * int(os.environ.get("WORLD_SIZE", "1"))))  # 8 at a time
max_iters = 29700  # 31.1 billion tokens
learning_rate = 2e-4  # this, batch_size and beta2: Brown et al. 2020 (GPT-3), table 2.1 and appendix B
min_lr = 2e-5
warmup_iters = 358  # 375 million tokens
beta2 = 0.95
weight_decay = 0.1
eval_interval = 1000

on_cpu = dict(n_layer=2, n_head=2, n_embd=128, block_size=128, batch_size=8, gradient_accumulation_steps=1,
              max_iters=10, warmup_iters=2, eval_interval=10, eval_tokens=20_000, log_interval=1)
