"""A small PaliGemma reads numbers composed of scans of handwritten digits; validation has scans of its own.

    python train.py config/vlm_digits.py

The scans ship with scikit-learn (pip install scikit-learn).
"""

task = "image-text"
dataset = "digits"
out_dir = "out/vlm_digits"

vision = dict(n_layer=4, n_head=4, n_embd=128, patch_size=8)
n_layer = 2  # of the decoder, like the next three
n_head = 4
n_kv_head = 4
n_embd = 128
block_size = 128  # image tokens and text

batch_size = 16
max_iters = 8000
learning_rate = 5e-4
min_lr = 2e-5
warmup_iters = 200
beta2 = 0.98
weight_decay = 0.05
eval_interval = 500
