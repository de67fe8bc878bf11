"""A reward model: it learns from pairs of right and wrong answers to say how good an answer is.

    python train.py config/chat/countdown.py
    python -m tools.answers --out_dir=out/chat/countdown --name=countdown_pairs --pairs=True --samples=16 --most=8
    python train.py config/chat/reward.py
    python evaluate.py --out_dir=out/chat/reward
    python sample.py --out_dir=out/chat/reward --prompt="3 12 17=53" --answer="3*12+17"
    python evaluate.py --out_dir=out/chat/countdown --reward=out/chat/reward

It starts from the chat model, whose head becomes a score. The last command draws eight answers to each problem, and
takes the one that the reward model likes best. Without `sft` it ranked 64 % of the held-out
pairs right after 900 updates.
"""

task = "reward"
dataset = "countdown_pairs"
init_from = "out/chat/countdown"
out_dir = "out/chat/reward"

sft = 1.0  # it goes on learning to write right answers: so it learns the arithmetic that it needs to judge them

optimizer = "muon"
learning_rate = 1e-3
muon_lr = 0.02
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.1

batch_size = 64
max_iters = 1200
eval_interval = 200
log_interval = 50
