"""Rung 6: three blocks with residual connections. What differs from config/ladder.py.

    python train.py config/ladder/residual.py
"""

_base = "../ladder.py"
out_dir = "out/ladder/residual"
model = "residual"
n_embd = 32
n_head = 4
n_layer = 3
learning_rate = 1e-3
min_lr = 1e-3
