"""A GPT that has read a million characters of equations such as 3*12+17=53, and was never asked anything.

    python train.py config/chat/pretrain.py
    python train.py config/chat/countdown.py --init_from=out/chat/pretrain --zero_init=False --muon_lr=0.01

The second command fine-tunes it on questions and answers. What is asked for validation or test is in no equation.
"""

dataset = "countdown_text"
out_dir = "out/chat/pretrain"

n_layer = 3
n_head = 4
n_embd = 128
block_size = 32
zero_init = True

optimizer = "muon"
learning_rate = 1e-3
muon_lr = 0.02
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 50
weight_decay = 0.1

batch_size = 64
max_iters = 1500
eval_interval = 500
log_interval = 50
