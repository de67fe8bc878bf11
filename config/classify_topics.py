"""An encoder tells which part of LibreOffice a page of its help is about: nine topics, pages held out.

    python train.py config/classify_topics.py
    python sample.py --out_dir=out/classify_topics --prompt="Sums the numbers in a range of cells."
    python evaluate.py --out_dir=out/classify_topics --picture=confusion.png

The data come from a Debian package, by apt-get. Ten minutes by the clock of a busy machine, about three of computing,
gave the right topic of 77.0 % of the validation pages and 82.7 % of the test pages (254, so give or take 2.4; macro F1
0.70; seed 1337). The most frequent topic is right for 32.0 and 33.9 %. A bag of words with logistic regression is right
for 81.1 and 84.6 %: with 2,000 pages, the words alone say as much as a small encoder can learn. tools/transfer.py
starts from trained encoders.
"""

task = "classification"
dataset = "help_topics"
out_dir = "out/classify_topics"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 128  # the beginning of a page; half of the pages are longer
dropout = 0.3

optimizer = "muon"
learning_rate = 3e-3  # of AdamW, for the embeddings, the biases, the norms and the head
muon_lr = 0.006
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 37
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.1

batch_size = 16
max_iters = 374  # three epochs
eval_interval = 187
log_interval = 10
