"""The lecture's second exercise: a small GPT learns to add numbers of up to three digits, from examples alone.

    python train.py config/ladder/addition.py
    python evaluate.py --out_dir=out/ladder/addition --test=True       scores pairs of operands that it has never seen
    python sample.py --out_dir=out/ladder/addition --prompt=123+456=

Two minutes of computing on one CPU thread; every one of the 99,690 sums of the test part is right (seed 1337).
"""

task = "arithmetic"
out_dir = "out/ladder/addition"

operations = "+"
digits = 3

n_layer = 2
n_head = 4
n_embd = 64
block_size = 11  # a problem and its answer, but the last character

batch_size = 256
max_iters = 1500
learning_rate = 5e-3
min_lr = 0.0
warmup_iters = 100
eval_interval = 250
eval_tokens = 100_000
log_interval = 50
device = "cpu"  # so small a model is faster there
