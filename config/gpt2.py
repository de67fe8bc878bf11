"""GPT-2 small (124M), trained from scratch on 10 billion tokens: fineweb once.

    python prepare.py fineweb
    python train.py config/gpt2.py
    torchrun --nproc_per_node=8 train.py config/gpt2.py

Computed by tools/scaling.py, not measured: 124M parameters, 10.00B tokens: 6.0 h on one H100, 45 min on 8, 6 min on 64,
if they reach 40% MFU; 34.3 GB on each. Without a GPU the same command makes ten updates of a tiny model, to check that
everything is in place.

Larger models are in config/gpt2/. Each file has only the lines that differ from this one:

    python train.py config/gpt2/350m.py
"""

dataset = "fineweb"
out_dir = "out/gpt2"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

batch_size = 512  # half a million tokens
micro_batch_size = 32  # sequences in memory at a time: 16 per batch, for up to 16 GPUs; on 64, use 8
max_iters = 19073  # 10.0 billion tokens
learning_rate = 6e-4  # this, batch_size and beta2: Brown et al. 2020 (GPT-3), table 2.1 and appendix B
min_lr = 6e-5
warmup_iters = 715  # 375 million tokens
beta2 = 0.95
weight_decay = 0.1
eval_interval = 500

on_cpu = dict(n_layer=2, n_head=2, n_embd=128, block_size=128, batch_size=8, micro_batch_size=0,
              max_iters=10, warmup_iters=2, eval_interval=10, eval_tokens=20_000, log_interval=1)
