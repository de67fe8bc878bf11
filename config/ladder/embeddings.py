"""Rung 2: a vector for each token and one for each position. What differs from config/ladder.py.

    python train.py config/ladder/embeddings.py
"""

_base = "../ladder.py"
out_dir = "out/ladder/embeddings"
model = "embeddings"
n_embd = 32
learning_rate = 1e-3
min_lr = 1e-3
