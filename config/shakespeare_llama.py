"""Tiny Shakespeare with Llama's parts: rotary positions, RMSNorm, SwiGLU, grouped queries.

    python train.py config/shakespeare_llama.py
    python -m tools.publish --out_dir=out/shakespeare_llama --to=out/my_llama      for transformers, as a Llama

The rest is as in config/shakespeare_char.py.
"""

_base = "shakespeare_char.py"
out_dir = "out/shakespeare_llama"

positions = "rotary"
norm = "plain_rmsnorm"
mlp = "swiglu"
n_kv_head = 2
n_hidden = 1024  # with its three matrices, the MLP is as large as one of two matrices and 4 * n_embd

on_cpu = dict(n_hidden=352)
