"""A model that answers: reach a number from three others. "3 12 17=53" has the answer "3*12+17". It learns on a laptop.

    python train.py config/chat/countdown.py
    python sample.py --out_dir=out/chat/countdown --prompt="3 12 17=53" --temperature=0
    python sample.py --out_dir=out/chat/countdown --chat
    python evaluate.py --out_dir=out/chat/countdown

Supervised fine-tuning, from scratch: 4,000 problems, each with one of its right answers. The problems to validate and
test occur in no training, in any order of their numbers. worlds.py makes them, and checks the answers.
"""

task = "chat"
dataset = "countdown"
out_dir = "out/chat/countdown"

n_layer = 3
n_head = 4
n_embd = 128
block_size = 32
pack = False  # a problem stands at the first position, as when it is asked
zero_init = True

optimizer = "muon"
learning_rate = 1e-3
muon_lr = 0.02
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 50
weight_decay = 0.1

batch_size = 64
max_iters = 620  # ten epochs
eval_interval = 124
log_interval = 20
