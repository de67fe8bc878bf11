"""Is a target reached? The scan of a digit, a note in words, a kind of booking and a number tell it together only.

    python train.py config/ledger.py
    python train.py config/ledger.py --numbers=head --out_dir=out/ledger_head
    python evaluate.py --out_dir=out/ledger --test=True
    python sample.py --out_dir=out/ledger --row='{"slip": "scan.png", "note": "five in cash .", "target": 9}'

FIGURES
"""

task = "columns"
dataset = "ledger"
out_dir = "out/ledger"

n_layer = 3
n_head = 4
n_embd = 64
patch_size = 16  # the whole scan
hide_rate = 0.0  # nothing is ever missing here

optimizer = "muon"
learning_rate = 5e-3  # of AdamW, for the embeddings, the patches, the biases, the norms and the head
muon_lr = 0.02
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 50
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.1

batch_size = 64
max_iters = 1000  # eight epochs
eval_interval = 250
log_interval = 100
