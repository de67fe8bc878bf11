"""Tiny Shakespeare, one character at a time, by the quickest way we know: a modern block, and Muon.

    python train.py config/shakespeare_char_fast.py

On one H200 its 1,500 updates take 5.4 s, and the loss on the whole validation split is 1.450, 1.460 and 1.471 (seeds
1337, 1, 2). On 2 CPU cores with AMX the smaller model takes 140 s, to 1.51; without AMX 330 s, as computed from the
time of an update. EXPERIMENTS.md has what each part brings, and what lost. Of these two commands, the first reaches
1.80 in 15 s with AMX, the second 1.48 in 8 1/2 minutes without:

    python train.py config/shakespeare_char_fast.py --n_embd=128 --n_head=2 --block_size=128 --batch_size=16 \\
        --max_iters=180 --muon_lr=0.03
    python train.py config/shakespeare_char_fast.py --max_iters=1750 --weight_decay=0.3
"""

dataset = "shakespeare_char"
out_dir = "out/shakespeare_char_fast"

n_layer = 6
n_head = 4
n_embd = 256
block_size = 512  # characters of context
dropout = 0.1
positions = "rotary"
mlp = "relu2"
tied = False
bigrams = True  # costs next to no time: a lookup in a table
zero_init = True

optimizer = "muon"
learning_rate = 1e-2  # of AdamW, for the embeddings, the head and the norms
muon_lr = 0.02
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 20
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.1
grad_clip = 0.0  # no clipping: Muon ignores the length of a gradient

batch_size = 8
max_iters = 1500
eval_interval = 500

on_cpu = dict(
    n_layer=4, n_head=3, n_embd=192, block_size=256, dropout=0.0,
    batch_size=8, max_iters=1100,
    eval_interval=550, log_interval=50,
)
