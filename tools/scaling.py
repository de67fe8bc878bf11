"""What a GPT needs in memory, FLOPs and time: on paper, before a GPU is rented.

    python -m tools.scaling                             the GPT-2 recipes of config/, on any CPU in seconds
    python -m tools.scaling config/gpt2/350m.py --n_layer=32 --max_iters=40000

Nothing here is measured on a GPU. The tests compare the memory with that of all tensors in real training steps on the
CPU, in bfloat16, without dropout, not compiled; torch.compile needs less. The time is FLOPs / (MFU x peak FLOP/s). The
MFU is an assumption, which a small model on many GPUs won't reach. Recomputation takes a third more time.
"""

import sys

from configurator import check_idle, one_line_errors, parse

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):  # answered before torch is imported
    with one_line_errors():
        print(__doc__.strip(), flush=True)
    raise SystemExit(0)

from dataclasses import replace
from pathlib import Path

import torch

from machine.device import PEAK_FLOPS
from run.cost import count_parameters, flops_per_token
from tasks.text import MODELS
from tokenizer import GPT2Tokenizer
from train import HOW, Settings

MFU = 0.4  # of the peak FLOP/s: llm.c reaches it with GPT-2 124M on 8 H100, 10 billion tokens in 45 minutes
TOKENS_PER_PARAMETER = 20  # the compute-optimal ratio: Hoffmann et al. 2022
CONFIG = Path(__file__).resolve().parent.parent / "config"
RECIPES = {"124m": ["gpt2.py"], **{size: ["gpt2.py", f"gpt2/{size}.py"] for size in ("350m", "774m", "1.5b")}}
# These settings must have their defaults, because the formulas describe no other model or optimizer.
CLASSIC = ("task", "model", "n_kv_head", "mlp", "positions", "qk_norm", "tied", "bigrams", "optimizer", "init_from")


def read(arguments):
    """(settings, model) of config files and --name=value, ignoring the files' on_cpu. The model has shapes but no data.

    Raises UserError for a model that the formulas below don't describe.
    """
    settings, _ = parse(Settings, arguments, more=HOW["more"], elsewhere=HOW["elsewhere"])
    set_here = [name for name in CLASSIC if hasattr(settings, name)]
    check_idle(settings, "the formulas are for the classic GPT with AdamW", *set_here)
    cls, config_cls = MODELS[settings.model]
    shape = {name: getattr(settings, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "bias")}
    with torch.device("meta"):
        model = cls(config_cls(**shape, vocab_size=GPT2Tokenizer.vocab_size))
    return replace(settings, micro_batch_size=settings.micro_batch_size or settings.batch_size), model


def state_bytes(model, shards=1):
    """The bytes that a GPU holds from step to step: per parameter, 4 each for weight, gradient and AdamW's two moments.

    With DDP every GPU holds them all, but no second copy: gradients are exchanged in place. With sharding (Rajbhandari
    et al. 2020, stage 3) each holds its share, and what it gathers for a while: the embeddings and two blocks in 16
    bits, and the gradients of the embeddings and one block in 32 bits.
    """
    state = 16 * count_parameters(model) // shards
    if shards == 1:
        return state
    embeddings = count_parameters(model.wte) + count_parameters(model.wpe)
    block = count_parameters(model.transformer.blocks[0])
    return state + 2 * (embeddings + 2 * block) + 4 * (embeddings + block)


def activation_bytes(model, sequences, recompute=False, shard=False):
    """The bytes that a micro-batch adds at its peak: at the end of the forward pass or the start of the backward pass.

    Per token and block, in 16 bits unless noted: the inputs of both norms in 32 bits (8 C bytes); the norms' outputs as
    q_proj, k_proj, v_proj and up_proj read them (8 C); q, k, v and the attention's output (8 C); the input and output
    of GELU (16 C); statistics of attention and norms (4 H + 16). With recompute, only the block's input is kept (4 C).
    Per token outside the blocks: the last norm and the head (6 C), the targets (8), log-probabilities in 32 bits (4 V).
    More at the peak: as backward starts, gradients of log-probabilities and logits in 32 bits (8 V); as forward ends,
    logits in 16 and 32 bits (6 V). The 16-bit copies of the weights last from forward to backward, unless sharding
    gathers them. Compare Korthikanti et al. 2022, whose 34 C has dropout's masks and no 32-bit residuals.
    """
    C, T, (V, _) = model.config.n_embd, sequences * model.config.block_size, model.wte.weight.shape
    table = 2 * V * C  # in 16 bits
    matrices = 0 if shard else table + sum(2 * p.numel() for p in model.transformer.parameters() if p.dim() == 2)
    block = 4 * C if recompute else 40 * C + 4 * model.config.n_head + 16
    kept = T * (model.config.n_layer * block + 6 * C + 8 + 4 * V)
    if recompute:  # of the copies, only the table's is left at the backward pass's start
        return kept + max(matrices + 6 * T * V, min(matrices, table) + 8 * T * V)
    return kept + matrices + 8 * T * V


# ----------------------------------------------------------------------------------------------------------------------
# In words

def count(n):
    return f"{n / 1e9:,.2f}B" if n >= 1e9 else f"{n / 1e6:,.0f}M"


def gigabytes(n):
    return f"{n / 1e9:,.1f}"


def times(model, tokens):
    """The times, as texts, that training on so many tokens takes on 1, 8 and 64 H100."""
    flops = flops_per_token(model, model.config.block_size) * tokens
    seconds = [flops / (MFU * PEAK_FLOPS["H100"] * gpus) for gpus in (1, 8, 64)]
    return [f"{s / 86400:,.1f} d" if s >= 48 * 3600 else f"{s / 3600:,.1f} h" if s >= 3600 else f"{s / 60:,.0f} min"
            for s in seconds]


def sentence(s, model):
    """A sentence with a recipe's parameters, tokens, times and memory on H100s. The recipe's docstring quotes it."""
    tokens = s.max_iters * s.batch_size * s.block_size
    one, eight, many = times(model, tokens)
    memory = state_bytes(model) + activation_bytes(model, s.micro_batch_size)
    return (f"{count(count_parameters(model))} parameters, {count(tokens)} tokens: {one} on one H100, {eight} on 8,"
            f" {many} on 64, if they reach {MFU:.0%} MFU; {gigabytes(memory)} GB on each.")


def size_row(name, s, model):
    n = count_parameters(model)
    return [name, count(n), "10B", f"{flops_per_token(model, s.block_size) * 10e9:.1e}", *times(model, 10e9),
            count(TOKENS_PER_PARAMETER * n), *times(model, TOKENS_PER_PARAMETER * n)]


def memory_row(name, s, model):
    n, states = s.micro_batch_size, [state_bytes(model, shards) for shards in (1, 8, 64)]
    each = [activation_bytes(model, 2, again) - activation_bytes(model, 1, again) for again in (False, True)]
    totals = [states[0] + activation_bytes(model, n), states[1] + activation_bytes(model, n, True, True)]
    return [name, *map(gigabytes, states + each), str(n), *map(gigabytes, totals)]


TABLES = {"size, parameters, tokens, FLOPs, 1 H100, 8, 64, tokens (20 per parameter), 1 H100, 8, 64": size_row,
          "GB per GPU, state, sharded over 8, over 64, per sequence, recomputed, sequences, total,"
          " sharded over 8 and recomputed": memory_row}


def main(arguments):
    """Prints the TABLES and a `sentence` per model: for the GPT-2 recipes, or for the settings in `arguments`."""
    chosen = {"these settings": arguments} if arguments else {
        name: [str(CONFIG / file) for file in files] for name, files in RECIPES.items()}
    found = {name: read(argv) for name, argv in chosen.items()}
    for header, row in TABLES.items():
        print(f"| {header.replace(', ', ' | ')} |\n{'| --- ' * len(header.split(', '))}|")
        print("\n".join(f"| {' | '.join(row(name, *pair))} |" for name, pair in found.items()), end="\n\n")
    print("\n\n".join(f"{name}: {sentence(*pair)}" for name, pair in found.items()))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
