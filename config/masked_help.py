"""An encoder learns to find hidden words of LibreOffice's help: a start for config/classify_topics.py.

    python prepare.py help_topics
    python prepare.py data/help_topics/train.jsonl --column=text --tokenizer=data/help_topics --name=help_text
    python train.py config/masked_help.py
    python sample.py --out_dir=out/masked_help --prompt="Click the [MASK] to save the document."
    python train.py config/classify_topics.py --init_from=out/masked_help --rates.encoder=0.5 --out_dir=out/topics

It reads the training pages of help_topics alone, without their topics: 0.6 million tokens. Half an hour on a fifth of a
busy CPU core ended at a loss of 4.87; 22 % of the hidden tokens were the likeliest. That is little, and helps little.
"""

task = "masked"
dataset = "help_text"
out_dir = "out/masked_help"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 128

optimizer = "muon"
learning_rate = 5e-3  # of AdamW, for the embeddings, the biases, the norms and the head
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 30
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.05
grad_clip = 0.0

batch_size = 32
max_iters = 1000
eval_interval = 250
eval_tokens = 20_000
log_interval = 20
