"""The recipe of the ideas' experiments: a GPT of 0.2M parameters, 300 updates, half a minute on one core of a CPU.

    python train.py ideas/recipe.py
    python -m tools.versus ideas/recipe.py --patch=ideas/qk_norm.patch --out=out/qk_norm

It is the smallest that we know in which attention has learned: the loss is about 2.1, and a bigram model reaches 2.5.
"""

dataset = "shakespeare_char"
out_dir = "out/ideas"

n_layer = 4
n_head = 4
n_embd = 64
block_size = 64  # characters of context

optimizer = "muon"  # with AdamW, 400 updates lead to 2.33: too early to tell one model from another
learning_rate = 1e-2  # of AdamW, for the embeddings and the norms
min_lr = 1e-4
warmup_iters = 20
batch_size = 16
max_iters = 300

eval_interval = 50
eval_tokens = 20_000  # the same tokens for all runs
log_interval = 50
sample_tokens = 0
device = "cpu"
dtype = "float32"  # the same numbers on every CPU, but for rounding
