"""Rung 7: LayerNorm before each layer and before the logits. What differs from config/ladder.py.

    python train.py config/ladder/normed.py
"""

_base = "../ladder.py"
out_dir = "out/ladder/normed"
model = "normed"
n_embd = 32
n_head = 4
n_layer = 3
learning_rate = 1e-3
min_lr = 1e-3
