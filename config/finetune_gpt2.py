"""Fine-tunes GPT-2 (124M) on Shakespeare's plays, in GPT-2's own tokens.

    python train.py config/finetune_gpt2.py

The weights (548 MB) and the text are downloaded once. --init_from=gpt2-xl fine-tunes the largest GPT-2.
"""

init_from = "gpt2"
dataset = "shakespeare_gpt2"
out_dir = "out/finetune_gpt2"

block_size = 1024  # tokens of context; fewer take less memory
dropout = 0.1  # the text is small: 300,000 tokens

batch_size = 32
micro_batch_size = 1  # sequences in memory at a time; more are faster if they fit
max_iters = 100
learning_rate = 3e-5
min_lr = 3e-5  # constant
warmup_iters = 0
beta2 = 0.95
eval_interval = 20
log_interval = 1

on_cpu = dict(block_size=256, batch_size=4, max_iters=20, eval_interval=10)
