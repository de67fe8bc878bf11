"""Tiny Shakespeare with Llama's parts: rotary positions, RMSNorm, SwiGLU, grouped queries.

    python train.py config/shakespeare_llama.py
    python -m tools.publish --out_dir=out/shakespeare_llama --to=shakespeare_llama       for transformers, as a Llama

The sizes and the training are those of config/shakespeare_char.py.
"""

dataset = "shakespeare_char"
out_dir = "out/shakespeare_llama"

positions = "rotary"
norm = "plain_rmsnorm"
mlp = "swiglu"

n_layer = 6
n_head = 6
n_kv_head = 2
n_embd = 384
n_hidden = 1024  # with its three matrices, the MLP is as large as one of two matrices and 4 * n_embd
block_size = 256  # characters of context
dropout = 0.2  # the text is small: training sees it 80 times

batch_size = 64
max_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99  # higher than usual: few tokens per update
weight_decay = 0.1
eval_interval = 250

on_cpu = dict(
    n_layer=4, n_head=4, n_kv_head=2, n_embd=128, n_hidden=352, block_size=64, dropout=0.0,
    batch_size=16, max_iters=2000, learning_rate=4e-3, min_lr=1e-4,
    eval_interval=500, log_interval=50,
)
