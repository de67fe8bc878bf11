"""An encoder that finds the answer to a question in a text, or sees that there is none. It learns on a laptop.

    python train.py config/answer_facts.py
    python sample.py --out_dir=out/answer_facts --prompt="Who built the Orvik Bridge?" --context=FILE:page.txt
    python evaluate.py --out_dir=out/answer_facts

The texts and questions are made up by data/facts/generate.py; templates and names are held out. On the test part, 95.3
% of the answers are exactly right (seed 1337), where a quarter of the questions have none; the first new name in the
sentence that is most like the question is right for 36.5 %. It takes 3 1/4 minutes of one core with AMX.
"""

task = "question-answering"
dataset = "facts"
out_dir = "out/answer_facts"

n_layer = 3
n_head = 4
n_embd = 128
positions = "rotary"
block_size = 192
answer_words = 10

optimizer = "muon"
learning_rate = 5e-3  # of AdamW, for the embeddings, the biases, the norms and the head
muon_lr = 0.02
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 50
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.05
grad_clip = 0.0  # no clipping: Muon ignores the length of a gradient

batch_size = 32
max_iters = 675  # three epochs
eval_interval = 75
eval_tokens = 20_000  # half of the validation part
log_interval = 25
