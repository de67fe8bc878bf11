"""A small vision transformer draws hidden patches of pictures of clothes: a start for config/fashion_mnist.py.

    python train.py config/fashion_mnist_masked.py
    python sample.py --out_dir=out/fashion_mnist_masked --image=shirt.png --draw=guess.png
    python train.py config/fashion_mnist.py --init_from=out/fashion_mnist_masked --train_rows=200 --out_dir=out/few
"""

task = "masked-patches"
dataset = "fashion_mnist"
out_dir = "out/fashion_mnist_masked"

n_layer = 4
n_head = 4
n_embd = 64
patch_size = 4
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
max_iters = 2400  # 2.8 epochs
eval_interval = 1200
log_interval = 50
