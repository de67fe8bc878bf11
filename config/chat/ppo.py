"""The same as config/chat/rl.py by PPO: a value head says which reward is to be expected.

    python train.py config/chat/countdown.py
    python train.py config/chat/ppo.py
    python evaluate.py --out_dir=out/chat/ppo
"""

task = "rl"
method = "ppo"
dataset = "countdown"
init_from = "out/chat/countdown"
out_dir = "out/chat/ppo"

samples = 1  # no answer is compared with others to the same problem
round = 4
batch_size = 128
kl = 0.0
rates = dict(score=3.0)  # the value head is new, and may learn faster

learning_rate = 3e-4
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.0

pack = False
max_iters = 1000
eval_interval = 100
log_interval = 20
