"""SigLIP on rendered shapes: a vision tower and a text encoder learn which caption belongs to which image.

    python train.py config/siglip_shapes.py

The data are generated. The vision tower is what config/vlm_shapes.py starts from.
"""

task = "contrastive"
dataset = "shapes"
out_dir = "out/siglip_shapes"

vision = dict(n_layer=2, n_head=4, n_embd=128, patch_size=8)
n_layer = 2  # of the text encoder, as the next two
n_head = 4
n_embd = 128
block_size = 64  # tokens of the longest caption

optimizer = "muon"
muon_lr = 0.01
grad_clip = 0.0  # the length of a gradient means nothing to Muon

batch_size = 64
max_iters = 2000
learning_rate = 1e-3  # AdamW's, of the embeddings and the norms
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 100
beta2 = 0.98
weight_decay = 0.05
eval_interval = 250
