"""A chat model learns from rewards: its world says which of its own answers are right. Minutes on one CPU core.

    python train.py config/chat/countdown.py
    python train.py config/chat/rl.py
    python evaluate.py --out_dir=out/chat/rl
    python sample.py --out_dir=out/chat/rl --prompt="3 12 17=53" --temperature=0
    python train.py config/chat/reward.py --sft=0 --max_iters=94 --eval_interval=94 --out_dir=out/chat/weak
    python train.py config/chat/rl.py --reward=out/chat/weak --max_iters=200 --out_dir=out/chat/hacked

In each round the model answers 128 problems four times, and learns which answers were better than the others to the
same problem. The last two commands take the scores of a poor reward model for rewards, and show what goes wrong then:
the scores rise, and the share of right answers falls. --kl=0.2 holds the model back.
"""

task = "rl"
dataset = "countdown"
init_from = "out/chat/countdown"
out_dir = "out/chat/rl"

samples = 4
round = 4
divide = False  # by the deviation: problems that are nearly always solved, or never, would count most
batch_size = 128

dtype = "float32"  # the ratio of two probabilities differs from 1 by less than bfloat16 can tell
learning_rate = 1.5e-4  # at 6e-4 the first 200 updates lose 8 points, and the end is no better than the start
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.0

pack = False
max_iters = 1000
eval_interval = 100
log_interval = 20
