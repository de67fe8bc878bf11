"""Rung 3: one head of self-attention. What differs from config/ladder.py.

    python train.py config/ladder/one_head.py
"""

_base = "../ladder.py"
out_dir = "out/ladder/one_head"
model = "one-head"
n_embd = 32
learning_rate = 1e-3
min_lr = 1e-3
