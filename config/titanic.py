"""Who of 1,309 passengers of the Titanic was rescued? A transformer reads class, sex, age, family, fare, port and name.

    python train.py config/titanic.py
    python train.py config/titanic.py --numbers=head --out_dir=out/titanic_head
    python evaluate.py --out_dir=out/titanic --test=True
    python sample.py --out_dir=out/titanic --row='{"pclass": 2, "sex": "female", "age": 29, "name": "Smith, Mrs. Ann"}'

The data come with scikit-learn, or from OpenML. Eight seconds of one busy CPU core with AMX. Seeds 1337, 1 and 2 were
right for 82.5, 79.7 and 81.6 % of the 217 validation passengers and 74.0, 74.7 and 72.7 % of the 154 test passengers,
families held out together; with numbers in the head 82.0, 78.8, 80.6 and 73.4, 74.7, 72.1 %. The most frequent class is
right for 66.4 and 60.4 %, a logistic regression for 78.3 and 77.9 %, gradient boosting for 77.9 and 72.1 %. On so few
passengers a share is sure to 3 or 4 points.
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
