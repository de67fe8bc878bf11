"""A small vision transformer tells scikit-learn's 1,797 scans of handwritten digits apart; no download.

    python train.py config/digit_scans.py
    python evaluate.py --out_dir=out/digit_scans --test=True
    python sample.py --out_dir=out/digit_scans --image=data/digit_scans/pictures/7.png
"""

task = "image-classification"
dataset = "digit_scans"
out_dir = "out/digit_scans"

n_layer = 4
n_head = 4
n_embd = 64
patch_size = 4
shift = 1

optimizer = "muon"
learning_rate = 2e-3  # of AdamW, for the patches, the positions, the biases, the norms and the head
muon_lr = 0.01
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 20
beta2 = 0.98
weight_decay = 0.05

batch_size = 64
max_iters = 600
eval_interval = 150
log_interval = 50
