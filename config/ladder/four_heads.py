"""Rung 4: four heads, each with a quarter of the channels. What differs from config/ladder.py.

    python train.py config/ladder/four_heads.py
"""

_base = "../ladder.py"
out_dir = "out/ladder/four_heads"
model = "four-heads"
n_embd = 32
n_head = 4
learning_rate = 1e-3
min_lr = 1e-3
