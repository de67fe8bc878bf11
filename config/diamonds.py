"""What does a diamond cost? A quantity, from its weight, its cut, colour and clarity, and its lengths.

    python train.py config/diamonds.py
    python evaluate.py --out_dir=out/diamonds --test=True
    python sample.py --out_dir=out/diamonds --row='{"carat": 0.7, "cut": "Ideal", "color": "E", "clarity": "VS1"}'
"""

task = "columns"
dataset = "diamonds"
out_dir = "out/diamonds"

n_layer = 2
n_head = 4
n_embd = 64
hide_rate = 0.0

optimizer = "muon"
learning_rate = 5e-3  # of AdamW, for the embeddings, the biases, the norms and the head
muon_lr = 0.02
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 50
weight_decay = 0.1

batch_size = 256
max_iters = 1500  # nine epochs
eval_interval = 300
log_interval = 100
