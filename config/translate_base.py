"""The base model of "Attention Is All You Need", for the novels of opus_books, English to Italian, on a GPU.

    python train.py config/translate_base.py

Sizes, post-norm, dropout, smoothing and schedule are the paper's; the data are a hundredth of its data, so warm-up and
training are shorter. Nobody has run this yet: the number of updates is a guess.
"""

task = "translation"
dataset = "opus_books"
out_dir = "out/translate_base"

n_layer = 6  # of the encoder, and of the decoder
n_head = 8
n_embd = 512
block_size = 256
block = "post"
dropout = 0.1
smoothing = 0.1

learning_rate = 7e-4  # the paper's peak, 1 / sqrt(512 * 4000)
lr_schedule = "noam"
warmup_iters = 1000
beta2 = 0.98
weight_decay = 0.0
grad_clip = 0.0

batch_size = 50_000  # tokens of both languages, padding included; the paper's 25,000 of each
max_iters = 2500
eval_interval = 250
