"""A model that answers in dialogues of your own, from scratch or from a GPT that you have trained.

    python prepare.py talks.jsonl --tokenizer=bpe:2000          {"messages": [{"role": "user", "content": ...}, ...]}
    python train.py config/chat/dialogues.py
    python train.py config/chat/dialogues.py --dataset=talks
    python sample.py --out_dir=out/chat/dialogues --chat
    python train.py --task=chat --dataset=talks --init_from=out/gpt --out_dir=out/chat/tuned

From a few thousand dialogues a new model learns their form and little else: start from a model that knows the language.
Without --dataset it takes the small problems of countdown.
"""

task = "chat"
dataset = "countdown"
out_dir = "out/chat/dialogues"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
dropout = 0.1

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
batch_size = 16
max_iters = 1000
eval_interval = 100
on_cpu = dict(n_embd=128, max_iters=500, eval_interval=50)
