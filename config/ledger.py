"""A ledger."""

task = "columns"
dataset = "ledger"
out_dir = "out/ledger"

n_layer = 3
n_head = 4
n_embd = 64
patch_size = 4
dropout = 0.1
hide_rate = 0.0

learning_rate = 2e-3
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 50
weight_decay = 0.1

batch_size = 64
max_iters = 1000
eval_interval = 250
log_interval = 50
