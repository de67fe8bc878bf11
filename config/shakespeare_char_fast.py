"""draft"""
dataset = "shakespeare_char"
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
mlp = "relu2"
positions = "rotary"
tied = False
zero_init = True
bigrams = True
optimizer = "muon"
lr_schedule = "linear"
min_lr = 0.0
learning_rate = 5e-3
muon_lr = 0.02
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0
grad_clip = 0.0
batch_size = 64
max_iters = 1000
eval_interval = 500
on_cpu = dict(n_layer=4, n_head=2, n_embd=128, block_size=128, batch_size=16, max_iters=180, dtype="bfloat16")
