"""Fine-tunes SmolLM2 (135M), a small Llama, on your own text with LoRA: on a laptop, or on one GPU.

    python prepare.py my.txt --tokenizer=HuggingFaceTB/SmolLM2-135M --name=my_smollm2
    python train.py config/finetune_llama.py
    python sample.py --out_dir=out/finetune_llama --prompt="Once upon a time"
    python -m tools.publish --out_dir=out/finetune_llama --to=out/my_model         for transformers and llama.cpp

The weights (269 MB) are downloaded once. --init_from and --tokenizer also take other models of the Llama layout, and
their folders. LoRA adapts every linear layer; the embedding, which is the head too, stays as it is. Less memory:
--recompute=True. All weights: --lora_rank=0 --learning_rate=3e-5 --min_lr=3e-6, which takes 12 bytes more per weight,
for gradients and AdamW's moments.
"""

init_from = "HuggingFaceTB/SmolLM2-135M"
dataset = "my_smollm2"
out_dir = "out/finetune_llama"

block_size = 1024  # tokens of context
lora_rank = 8  # with the update counted twice: see --lora_alpha

batch_size = 16
micro_batch_size = 4  # sequences in memory at a time
max_iters = 200
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 10
beta2 = 0.99
weight_decay = 0.0  # the update is small as it is
eval_interval = 20
log_interval = 1

on_cpu = dict(block_size=256, batch_size=4, micro_batch_size=1, max_iters=50, eval_interval=10)
