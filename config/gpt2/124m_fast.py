"""GPT-2 small (124M) by a quicker way: a modern block and Muon, on 2.7 billion tokens instead of 10.

    python train.py config/gpt2/124m_fast.py
    torchrun --nproc_per_node=8 train.py config/gpt2/124m_fast.py

Its loss has not been measured. The parts are those of a run of modded-nanogpt (Jordan et al. 2024, the record of 14
October 2024), whose loss on fineweb after 5,100 updates of this size was 3.27: rotary positions, QK-norm, six heads,
squared ReLU, zero initialisation, a tied head, and Muon. The rates are that run's too; but it kept them for 3,650
updates before they fell, it had no warm-up, its norms had no gains, and other details differ.

Times and memory are not computed: the formulas of tools/scaling.py describe the classic GPT and AdamW. Per token, its
FLOPs are those of config/gpt2.py, and it needs a quarter of the tokens.
"""

_base = "../gpt2.py"
out_dir = "out/gpt2_124m_fast"

n_head = 6  # of 128 channels each
positions = "rotary"
norm = "plain_rmsnorm"
qk_norm = True
mlp = "relu2"
zero_init = True

optimizer = "muon"
max_iters = 5100  # 2.7 billion tokens
learning_rate = 3.6e-3  # of AdamW, for the embeddings and the norms
muon_lr = 0.01  # 0.1 * 3.6e-3 * sqrt(768): that run multiplied its rate by the root of a matrix's larger side
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 100
weight_decay = 0.0
grad_clip = 0.0  # no clipping: Muon ignores the length of a gradient
eval_interval = 250

on_cpu = dict(n_layer=2, n_head=2, n_embd=128, max_iters=10, warmup_iters=2, eval_interval=10)
