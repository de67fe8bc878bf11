"""Rung 5: a feed-forward layer after the heads. What differs from config/ladder.py.

    python train.py config/ladder/feed_forward.py
"""

_base = "../ladder.py"
out_dir = "out/ladder/feed_forward"
model = "feed-forward"
n_embd = 32
n_head = 4
learning_rate = 1e-3
min_lr = 1e-3
