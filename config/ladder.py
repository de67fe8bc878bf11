"""The first rung of the lecture's ladder: the bigram model. What the other rungs change is in config/ladder/.

    python train.py config/ladder.py

Tiny Shakespeare, windows of 8 characters, no schedule, as in the lecture; about ten seconds on a CPU.
"""

dataset = "shakespeare_char"
out_dir = "out/ladder/bigram"

model = "bigram"
block_size = 8

batch_size = 32
max_iters = 5000
learning_rate = 1e-2
min_lr = 1e-2  # the rate stays where it is
warmup_iters = 0
weight_decay = 0.01
beta2 = 0.999
grad_clip = 0.0
eval_interval = 500
log_interval = 500
sample_tokens = 100
device = "cpu"  # so small a model is faster there
