"""A model that learns from its own checked answers: rejection sampling. What it got right, it shall say more often.

    python train.py config/chat/countdown.py
    python -m tools.answers --out_dir=out/chat/countdown --name=countdown_checked
    python train.py config/chat/checked.py
    python evaluate.py --out_dir=out/chat/checked

tools.answers draws eight answers to each problem, and keeps those that are right, each once. Nobody has to know an
answer: it is enough that somebody can check one.
"""

task = "chat"
dataset = "countdown_checked"
init_from = "out/chat/countdown"
out_dir = "out/chat/checked"

pack = False
optimizer = "muon"
learning_rate = 1e-3
muon_lr = 0.02
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.1

batch_size = 64
max_iters = 1200
eval_interval = 240
log_interval = 20
