"""A small vision transformer tells ten kinds of clothes apart, in pictures of 28 x 28 grey pixels.

    python train.py config/fashion_mnist.py
    python train.py config/fashion_mnist.py --stem=True --out_dir=out/fashion_mnist_stem
    python evaluate.py --out_dir=out/fashion_mnist --test=True
    python sample.py --out_dir=out/fashion_mnist --image=shirt.png

The data come from a Debian package, by apt-get, or else from GitHub. Three epochs take five minutes of one CPU core
with AMX, six with --stem=True. Seed 1337 named 88.4 % of the test pictures rightly, and 88.8 % with the stem (89.3 and
90.2 % of the validation pictures); a logistic regression on the pixels 84.4 %.
"""

task = "image-classification"
dataset = "fashion_mnist"
out_dir = "out/fashion_mnist"

n_layer = 4
n_head = 4
n_embd = 64
patch_size = 4
shift = 2
flip = True

optimizer = "muon"
learning_rate = 2e-3  # of AdamW, for the patches, the positions, the biases, the norms and the head
muon_lr = 0.01
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 50
beta2 = 0.98
weight_decay = 0.05

batch_size = 64
max_iters = 2600  # three epochs
eval_interval = 520
log_interval = 50
