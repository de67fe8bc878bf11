"""SigLIP on rendered shapes: a vision tower and a text encoder learn which caption belongs to which image.

    python train.py config/siglip_shapes.py

The data are generated. config/vlm_shapes.py can start from this vision tower: --init_vision=out/siglip_shapes.
"""

task = "contrastive"
dataset = "shapes"
out_dir = "out/siglip_shapes"

vision = dict(n_layer=2, n_head=4, n_embd=128, patch_size=8)
n_layer = 2  # of the text encoder, like n_head and n_embd
n_head = 4
n_embd = 128
block_size = 64  # tokens of the longest caption, at most

optimizer = "muon"
muon_lr = 0.01
grad_clip = 0.0  # no clipping: Muon ignores the length of a gradient

batch_size = 64
max_iters = 2000
learning_rate = 1e-3  # of AdamW, for the embeddings and the norms
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 100
beta2 = 0.98
weight_decay = 0.05
eval_interval = 250
