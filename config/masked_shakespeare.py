"""An encoder learns to find hidden characters of Shakespeare. It takes a minute or two on a laptop.

    python train.py config/masked_shakespeare.py
    python sample.py --out_dir=out/masked_shakespeare --prompt="What, ho! Who calls so l[MASK]ud?"
    python evaluate.py --out_dir=out/masked_shakespeare
"""

task = "masked"
dataset = "shakespeare_char"
out_dir = "out/masked_shakespeare"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64

batch_size = 32
max_iters = 2000
eval_interval = 500
learning_rate = 2e-3
warmup_iters = 100
beta2 = 0.99
