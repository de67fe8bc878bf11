"""A small PaliGemma answers questions about rendered shapes: colours, counts, places, comparisons, boxes.

    python train.py config/vlm_shapes.py

The data are generated. The validation images show combinations of size, colour and shape that training never shows.
"""

task = "image-text"
dataset = "shapes"
out_dir = "out/vlm_shapes"

vision = dict(n_layer=2, n_head=4, n_embd=128, patch_size=8)
n_layer = 4  # of the decoder, like the next three
n_head = 4
n_kv_head = 4
n_embd = 128
block_size = 256  # image tokens and text

optimizer = "muon"
muon_lr = 0.01
grad_clip = 0.0  # no clipping: Muon ignores the length of a gradient

batch_size = 32
max_iters = 4500
learning_rate = 1e-3  # of AdamW, for the embeddings and the norms
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 200
beta2 = 0.98
weight_decay = 0.05
eval_interval = 500
