"""How far has a person's diabetes gone after a year? A quantity, from age, sex, body mass and seven more measures.

    python train.py config/diabetes.py
    python evaluate.py --out_dir=out/diabetes --test=True
    python sample.py --out_dir=out/diabetes --row='{"age": 50, "sex": 2, "bmi": 31.5, "bp": 98}'
"""

task = "columns"
dataset = "diabetes"
out_dir = "out/diabetes"

n_layer = 1
n_head = 4
n_embd = 32
numbers = "head"
dropout = 0.1
hide_rate = 0.1

optimizer = "muon"
learning_rate = 2e-3  # of AdamW, for the head, the embeddings, the biases and the norms
muon_lr = 0.003
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.1

batch_size = 32
max_iters = 200
eval_interval = 20
log_interval = 20
