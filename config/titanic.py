"""Who of 1,309 passengers of the Titanic was rescued: a transformer reads numbers, categories and the name."""

task = "columns"
dataset = "titanic"
out_dir = "out/titanic"

n_layer = 2
n_head = 4
n_embd = 32
dropout = 0.2
hide_rate = 0.1

learning_rate = 2e-3
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.1

batch_size = 64
max_iters = 400
eval_interval = 40
log_interval = 40
