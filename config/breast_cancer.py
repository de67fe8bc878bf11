"""Is a tumour benign or malignant, by thirty measures of the nuclei of its cells? 410 rows to learn from."""

task = "columns"
dataset = "breast_cancer"
out_dir = "out/breast_cancer"

n_layer = 2
n_head = 4
n_embd = 32
dropout = 0.1
hide_rate = 0.1

optimizer = "muon"
learning_rate = 2e-3
muon_lr = 0.01
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.1

batch_size = 32
max_iters = 240
eval_interval = 20
log_interval = 20
