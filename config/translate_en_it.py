"""An encoder-decoder translates the help of LibreOffice from English into Italian. It learns on a laptop.

    python train.py config/translate_en_it.py
    python sample.py --out_dir=out/translate_en_it --prompt="Click the button to save the document." --beam=4
    python evaluate.py --out_dir=out/translate_en_it

The data come from two Debian packages, by apt-get. Whole pages are held out. 20 minutes of one CPU core without AMX
reached BLEU 35.4 to 36.3 and chrF 60.5 to 61.6 on the test pages with a beam of 4 (three seeds, version 7.4.7 of the
packages); the translation of the most similar training sentence has 12.7 and 33.6. A third of the updates,
--max_iters=900, reached 23.4 on the validation pages, greedily. Three times as many, with --dropout=0.1
--max_iters=8000, reached BLEU 42.0 and chrF 66.0 on the test pages, in an hour of one core (one seed).
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
