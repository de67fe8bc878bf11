"""What a GPT needs in memory, FLOPs and time: on paper, before a GPU is rented.

    python scaling.py                                   the GPT-2 recipes, as the README shows them; on a laptop too
    python scaling.py config/gpt2_350m.py --n_layer=32 --max_iters=40000

Nothing here is measured on a GPU. The tests hold the parameters against counted ones, and the memory against a tracker
of every tensor of training steps in bfloat16 on the CPU, not compiled: torch.compile needs less. Time is FLOPs over
MFU times peak; the MFU is an assumption, a small model on many GPUs won't reach it. Recomputation takes a third longer.
"""

import sys

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):  # answered before torch is imported
    raise SystemExit(print(__doc__.strip()))

from pathlib import Path

from configurator import UserError, one_line_errors, parse
from device import PEAK_FLOPS
from tokenizer import GPT2Tokenizer
from train import Settings

V = GPT2Tokenizer.vocab_size
MFU = 0.4  # llm.c's GPT-2 124M on 8 H100: 10 billion tokens in 45 minutes are 40 %
TOKENS_PER_PARAMETER = 20  # where more parameters and more tokens pay alike: Hoffmann et al. 2022
RECIPES = sorted(Path(__file__).resolve().parent.glob("config/gpt2_*.py"),
                 key=lambda path: float(path.stem[5:-1]) * (1000 if path.stem.endswith("b") else 1))


def parts(s):
    """(parameters of the embeddings, of a block): model.GPT's."""
    C, norm = s.n_embd, s.n_embd * (1 + s.bias)
    return V * C + s.block_size * C, 12 * C * C + 9 * C * s.bias + 2 * norm


def parameters(s):
    embeddings, block = parts(s)
    return embeddings + s.n_layer * block + s.n_embd * (1 + s.bias)


def flops_per_token(s):
    """Forward and backward; source: Chowdhery et al. 2022 (PaLM), appendix B."""
    return 6 * (parameters(s) - s.block_size * s.n_embd) + 12 * s.n_layer * s.n_embd * s.block_size


def state_bytes(s, shards=1):
    """What a GPU holds from step to step: 4 bytes each for weight, gradient and AdamW's two moments, in float32.

    Several workers hold it each, for DDP exchanges gradients where they lie; sharded, each holds its share (Rajbhandari
    et al. 2020, stage 3) and what is gathered meanwhile: embeddings and two blocks in 16 bits, and the gradients of the
    embeddings and a block in 32.
    """
    if shards == 1:
        return 16 * parameters(s)
    embeddings, block = parts(s)
    return 16 * parameters(s) // shards + 2 * (embeddings + 2 * block) + 4 * (embeddings + block)


def activation_bytes(s, sequences, recompute=False, shard=False):
    """What a micro-batch of so many sequences adds at its peak, the end of the forward pass or the backward's start.

    In a block, per token, in 16 bits if not said: both norms' inputs in 32 bits (8 C bytes); the norms' outputs as
    q_proj, k_proj, v_proj and up_proj read them (8 C); q, k, v and the attention's output (8 C); the input of GELU
    and its output (16 C); statistics of attention and norms (4 H + 16). Recomputed, only its input is left (4 C).
    Around them: the last norm and the head (6 C), tokens and targets (16, of which 8 are ours), log-probabilities in
    32 bits (4 V); then gradients of these and of the logits (8 V), or in the forward pass the logits twice (6 V).
    The weights' 16-bit copies are kept from forward to backward, unless sharding gathers them. Compare Korthikanti et
    al. 2022, whose 34 C has dropout's masks and no 32-bit residuals.
    """
    C, T = s.n_embd, sequences * s.block_size
    matrices = 0 if shard else 2 * (V * C + s.n_layer * 12 * C * C)
    block = 4 * C if recompute else 40 * C + 4 * s.n_head + 16
    kept = T * (s.n_layer * block + 6 * C + 8 + 4 * V)
    if recompute:  # the copies are made anew
        return kept + max(matrices + 6 * T * V, min(matrices, 2 * V * C) + 8 * T * V)
    return kept + matrices + 8 * T * V


def sequences_at_once(s):
    """The micro-batch of one GPU."""
    return s.batch_size // s.gradient_accumulation_steps


def seconds(s, tokens, gpu="H100", gpus=1):
    return flops_per_token(s) * tokens / (MFU * PEAK_FLOPS[gpu] * gpus)


# ----------------------------------------------------------------------------------------------------------------------
# In words

def count(n):
    return f"{n / 1e9:,.2f}B" if n >= 1e9 else f"{n / 1e6:,.0f}M"


def time(s):
    return f"{s / 86400:,.1f} d" if s >= 48 * 3600 else f"{s / 3600:,.1f} h" if s >= 3600 else f"{s / 60:,.0f} min"


def gigabytes(n):
    return f"{n / 1e9:,.1f}"


def sentence(s):
    """What a recipe takes."""
    tokens = s.max_iters * s.batch_size * s.block_size
    one, eight, many = times(s, tokens)
    memory = state_bytes(s) + activation_bytes(s, sequences_at_once(s))
    return (f"{count(parameters(s))} parameters, {count(tokens)} tokens: {one} on one H100, {eight} on 8, {many} on 64,"
            f" if they reach {MFU:.0%} MFU; {gigabytes(memory)} GB on each.")


def tables(named):
    """The lines of the README's two tables. named: {name: settings}."""
    yield from table("size, parameters, tokens, FLOPs, 1 H100, 8, 64, tokens (20 per parameter), 1 H100, 8, 64", (
        [name, count(parameters(s)), "10B", f"{flops_per_token(s) * 10e9:.1e}", *times(s, 10e9),
         count(TOKENS_PER_PARAMETER * parameters(s)), *times(s, TOKENS_PER_PARAMETER * parameters(s))]
        for name, s in named.items()))
    yield ""
    yield from table("GB per GPU, state, sharded over 8, over 64, per sequence, recomputed, sequences, total,"
                     " sharded over 8 and recomputed",
                     (memory_row(name, s) for name, s in named.items()))


def times(s, tokens):
    return [time(seconds(s, tokens, gpus=gpus)) for gpus in (1, 8, 64)]


def memory_row(name, s):
    n = sequences_at_once(s)
    states = [state_bytes(s, shards) for shards in (1, 8, 64)]
    each = [activation_bytes(s, 2, recompute) - activation_bytes(s, 1, recompute) for recompute in (False, True)]
    totals = [states[0] + activation_bytes(s, n), states[1] + activation_bytes(s, n, True, True)]
    return [name, *map(gigabytes, states + each), str(n), *map(gigabytes, totals)]


def table(header, rows):
    yield f"| {' | '.join(header.split(', '))} |"
    yield "| --- " * len(header.split(", ")) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def main(arguments):
    named = {path.stem.removeprefix("gpt2_"): parse(Settings, [str(path)])[0] for path in RECIPES}
    if arguments:
        named = {"these settings": parse(Settings, arguments)[0]}
        for name in ("task", "architecture", "mlp", "positions", "tied", "bigrams", "optimizer"):
            if (value := getattr(named["these settings"], name)) != getattr(Settings, name):
                raise UserError(f"{name} = {value!r}: the formulas are of the classic GPT with AdamW alone")
    print("\n".join(tables(named)))
    for name, s in named.items():
        print(f"\n{name}: {sentence(s)}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
