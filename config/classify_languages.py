"""An encoder tells the language of a sentence: 32 languages of LibreOffice's help, pages held out.

    python train.py config/classify_languages.py
    python sample.py --out_dir=out/classify_languages --prompt="Fare clic sul pulsante per salvare il documento."
    python evaluate.py --out_dir=out/classify_languages --picture=confusion.png

The data come from 33 Debian packages, 100 MB, by apt-get. Twelve minutes by the clock of a busy machine, about three of
computing, gave the right language of 94.1 % of the validation sentences and 90.6 % of the test sentences (macro F1
0.91; seed 1337). Logistic regression on a bag of words is right for 89.9 and 85.6 %; on a bag of characters, up to
three in a row, for 96.0 and 93.4 %, which this encoder does not reach. Most errors are between Portuguese and Brazilian
Portuguese.
"""

task = "classification"
dataset = "help_languages"
out_dir = "out/classify_languages"

n_layer = 2
n_head = 4
n_embd = 64
block_size = 64
dropout = 0.1

optimizer = "muon"
learning_rate = 5e-3  # of AdamW, for the embeddings, the biases, the norms and the head
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 20
beta1 = 0.8
beta2 = 0.95
grad_clip = 0.0  # no clipping: Muon ignores the length of a gradient

batch_size = 64
max_iters = 696  # three epochs
eval_interval = 116
log_interval = 20
