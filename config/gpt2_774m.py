"""GPT-2 large (774M), trained from scratch on 15.5 billion tokens, 20 per parameter: fineweb one and a half times.

    python prepare.py fineweb
    python train.py config/gpt2_774m.py
    torchrun --nproc_per_node=8 train.py config/gpt2_774m.py

Computed by scaling.py, not measured: 774M parameters, 15.47B tokens: 2.4 d on one H100, 7.1 h on 8, 53 min on 64, if
they reach 40% MFU; 54.2 GB on each. Without a GPU the same command makes ten small updates, to see that all is
in place.
"""

import os

dataset = "fineweb"
out_dir = "out/gpt2_774m"

n_layer = 36
n_head = 20
n_embd = 1280
block_size = 1024

batch_size = 512  # half a million tokens
gradient_accumulation_steps = max(1, batch_size // (16 * int(os.environ.get("WORLD_SIZE", "1"))))  # 16 at a time
max_iters = 29500  # 15.5 billion tokens
learning_rate = 2.5e-4  # this, batch_size and beta2: Brown et al. 2020 (GPT-3), table 2.1 and appendix B
min_lr = 2.5e-5
warmup_iters = 715  # 375 million tokens
beta2 = 0.95
weight_decay = 0.1
eval_interval = 1000

on_cpu = dict(n_layer=2, n_head=2, n_embd=128, block_size=128, batch_size=8, gradient_accumulation_steps=1,
              max_iters=10, warmup_iters=2, eval_interval=10, eval_tokens=20_000, log_interval=1)
