"""Direct preference optimisation: the chat model learns from pairs of right and wrong answers, without a reward model.

    python train.py config/chat/countdown.py
    python -m tools.answers --out_dir=out/chat/countdown --name=countdown_pairs --pairs=True --samples=16 --most=8
    python train.py config/chat/dpo.py
    python evaluate.py --out_dir=out/chat/dpo
    python sample.py --out_dir=out/chat/dpo --prompt="3 12 17=53" --temperature=0

"exact" is the share of right answers to the world's problems for validation.
"""

task = "dpo"
dataset = "countdown_pairs"
init_from = "out/chat/countdown"
out_dir = "out/chat/dpo"

beta = 0.5
sft = 1.0  # the right answers are learned as in fine-tuning, too

optimizer = "muon"
learning_rate = 5e-4
muon_lr = 0.01
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.0

batch_size = 64
max_iters = 400  # an epoch
eval_interval = 100
log_interval = 20
