"""How far has a person's diabetes gone after a year? A quantity, from age, sex, body mass and seven more measures.

    python train.py config/diabetes.py
    python evaluate.py --out_dir=out/diabetes --test=True
    python sample.py --out_dir=out/diabetes --row='{"age": 50, "sex": 2, "bmi": 31.5, "bp": 98}'

The data come with scikit-learn. Three seconds of one CPU core with AMX. Seeds 1337, 1 and 2 had a root mean
squared error of 50.9, 52.4 and 54.1 on the 61 validation rows and 49.9, 48.2 and 50.2 on the 63 test rows; a ridge
regression has 53.1 and 48.9, gradient boosting 55.3 and 59.7, the mean 67.1 and 73.5. It is level with the ridge
regression: so few rows show little more than a straight line. On so few a figure is sure to 5 or 6. With a token for
each number, two blocks and muon_lr = 0.01 it had 53.0, 54.7 and 52.4 on validation.
"""

task = "columns"
dataset = "diabetes"
out_dir = "out/diabetes"

n_layer = 1
n_head = 4
n_embd = 32
numbers = "head"  # the list has [CLS] and the sex: a network of one hidden layer does most of the work
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
