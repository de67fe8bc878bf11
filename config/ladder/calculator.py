"""The lecture's second exercise goes on: sums, differences and products of numbers of up to two digits, in one GPT.

    python train.py config/ladder/calculator.py
    python evaluate.py --out_dir=out/ladder/calculator --test=True     scores pairs of operands that it has never seen
    python sample.py --out_dir=out/ladder/calculator --prompt="12*34="

Seven minutes of computing on one CPU thread. It writes the rows of a long multiplication before the answer; without
them, it learns its training products by heart and no others: data/arithmetic/README.md says more.
"""

task = "arithmetic"
out_dir = "out/ladder/calculator"

operations = "+-*"
digits = 2
working = True

n_layer = 2
n_head = 4
n_embd = 128
block_size = 15  # a problem, its working and its answer, but the last character
zero_init = True

optimizer = "muon"
learning_rate = 1e-2  # of AdamW, for the embeddings and the norms
muon_lr = 0.02
lr_schedule = "linear"
min_lr = 0.0
beta1 = 0.8
beta2 = 0.95
grad_clip = 0.0  # no clipping: Muon ignores the length of a gradient

batch_size = 128
max_iters = 2500
eval_interval = 500
log_interval = 50
device = "cpu"  # so small a model is faster there
