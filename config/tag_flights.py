"""A tagger of air travellers' questions: 132 labels of words, as in ATIS, and 18 intents. It learns on a laptop.

    python train.py config/tag_flights.py
    python sample.py --out_dir=out/tag_flights --prompt="show me flights to mars on tuesday"
    python evaluate.py --out_dir=out/tag_flights
"""

task = "tagging"
dataset = "flights"
out_dir = "out/tag_flights"

n_layer = 1
n_head = 4
n_embd = 128
positions = "rotary"
block_size = 64
dropout = 0.1
hide_rate = 0.1

learning_rate = 3e-3
min_lr = 3e-5
warmup_iters = 50
weight_decay = 0.1
grad_clip = 1.0

batch_size = 64
max_iters = 790  # ten epochs
eval_interval = 79
log_interval = 79
