"""Who of 1,309 passengers of the Titanic was rescued? A transformer reads class, sex, age, family, fare, port and name.

    python train.py config/titanic.py
    python train.py config/titanic.py --numbers=head --out_dir=out/titanic_head
    python evaluate.py --out_dir=out/titanic --test=True
    python sample.py --out_dir=out/titanic --row='{"pclass": 2, "sex": "female", "age": 29, "name": "Smith, Mrs. Ann"}'

FIGURES
"""

task = "columns"
dataset = "titanic"
out_dir = "out/titanic"

n_layer = 2
n_head = 4
n_embd = 32
dropout = 0.2
hide_rate = 0.1

optimizer = "muon"
learning_rate = 2e-3  # of AdamW, for the embeddings, the biases, the norms and the head
muon_lr = 0.005
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.1

batch_size = 64
max_iters = 120  # eight epochs: then it learns the names by heart
eval_interval = 20
log_interval = 20
