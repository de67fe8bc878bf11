"""BERT finds answers in Wikipedia's paragraphs, or sees that there is none: SQuAD 2.0. It needs a GPU, and hours.

    python train.py config/answer_squad.py
    python evaluate.py --out_dir=out/answer_squad --test=True
    python sample.py --out_dir=out/answer_squad --prompt="Who wrote it?" --context=FILE:page.txt

The settings are those of BERT's authors and of transformers' run_qa: windows of 384 tokens, which share 128, and two
epochs. Nobody has run it with this repository: only its parts are tested, on a small file of the same layout.
"""

task = "question-answering"
dataset = "squad"
init_from = "bert-base-uncased"
out_dir = "out/answer_squad"

block_size = 384
stride = 128
dropout = 0.1

learning_rate = 3e-5
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 990  # a tenth
beta2 = 0.999
weight_decay = 0.01
grad_clip = 1.0

batch_size = 24
max_iters = 9900  # two epochs of 117,000 questions
eval_interval = 1650
eval_tokens = 500_000
log_interval = 50
