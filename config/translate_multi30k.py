"""A tiny encoder-decoder translates captions of photographs (Multi30k) from English into German.

    python train.py config/translate_multi30k.py
    python evaluate.py --out_dir=out/translate_multi30k --beam=4 --test=True

The model is the Transformer-Tiny of Wu et al. 2021 ("Good for Misconceived Reasons"), who report BLEU 41.0 on the test
part of 2016, with a beam of 5 and on tokenised text. Nobody has run this recipe yet.
"""

task = "translation"
dataset = "multi30k"
out_dir = "out/translate_multi30k"

n_layer = 4  # of the encoder, and of the decoder
n_head = 4
n_embd = 128
n_hidden = 256
block_size = 128
dropout = 0.3
smoothing = 0.1

learning_rate = 5e-3
lr_schedule = "noam"
warmup_iters = 2000
beta2 = 0.98
weight_decay = 0.0
grad_clip = 0.0

batch_size = 16_384  # tokens of both languages, padding included: about 8,000 of the target
max_iters = 8000
eval_interval = 500
