"""Tiny Shakespeare, one character at a time: the classic small GPT (10.75M parameters).

    python train.py config/shakespeare_char.py

The 1.1 MB text is downloaded once. Without a GPU the same command trains the smaller model under on_cpu.

On one H200 an update takes 7.8 ms, and the whole command 51 s. The validation loss stops falling after 1,750 updates,
14 s, at 1.466; from there on the model learns the training text by heart, to 1.70 at the end, and `best` keeps what was
best. --max_iters=1750 ends there, and since the learning rate then falls sooner, that is another run, which was not
measured.
"""

dataset = "shakespeare_char"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256  # characters of context
dropout = 0.2  # the text is small: training sees it 80 times

batch_size = 64
max_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99  # higher than usual: few tokens per update
weight_decay = 0.1
eval_interval = 250

on_cpu = dict(
    n_layer=4, n_head=4, n_embd=128, block_size=64, dropout=0.0,
    batch_size=16, max_iters=2000, learning_rate=4e-3, min_lr=1e-4,
    eval_interval=500, log_interval=50,
)
