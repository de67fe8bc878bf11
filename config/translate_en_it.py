"""An encoder-decoder translates the help of LibreOffice from English into Italian. It learns on a laptop.

    python train.py config/translate_en_it.py
    python sample.py --out_dir=out/translate_en_it --prompt="Click the button to save the document." --beam=4
    python evaluate.py --out_dir=out/translate_en_it

The data come from two Debian packages, by apt-get. Whole pages are held out. With --max_iters=900, which took eight
minutes of computing on one thread of a CPU without AMX, greedy translations of the validation pages had BLEU 23.4 and
chrF 50.1; the translation of the most similar training sentence has 13.6 and 35.2, the source itself 4.9 and 25.6
(seed 1337, version 7.4.7 of the packages). Nobody has run all 2,700 updates yet.
"""

task = "translation"
dataset = "libreoffice_help"
out_dir = "out/translate_en_it"

n_layer = 3  # of the encoder, and of the decoder
n_head = 4
n_embd = 128
block_size = 128
smoothing = 0.1

optimizer = "muon"
learning_rate = 5e-3  # of AdamW, for the embeddings, the biases and the norms
muon_lr = 0.02
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 50
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.05
grad_clip = 0.0  # no clipping: Muon ignores the length of a gradient

batch_size = 2048  # tokens of both languages, padding included
max_iters = 2700  # five epochs
eval_interval = 540  # one epoch
log_interval = 20
