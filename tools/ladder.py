"""Trains every rung of the lecture's ladder, from bigram to GPT, and compares their losses with the lecture's.

    python -m tools.ladder                 one seed: about ten minutes on two CPU cores
    python -m tools.ladder --seeds=3       three seeds: about thirty

Prints the table, and writes it to config/ladder/README.md with a picture of the curves and a line by each rung.
The loss is the lecture's measure, `random_window_loss` of evaluate.py: the mean over random windows of the validation
split. A ladder that was stopped resumes with the same command. The runs are in --out.
"""

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from configurator import UserError, check_ranges, from_command_line, one_line_errors


@dataclass(frozen=True)
class Settings:
    seeds: int = 1  # runs of each rung, with the seeds 1337, 1338 and so on
    out: str = "out/ladder"  # the folder of the runs

    def __post_init__(self):
        check_ranges(self, seeds=1)


if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, _ = from_command_line(Settings, __doc__)

from run.cost import count_parameters
from run.curves import read_log
from run.files import read_json, write_text
from tasks.loading import load
from tools.compare import draw_together
from tools.versus import require_same_code, settings_of, train

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "config" / "ladder" / "README.md"


class Rung(NamedTuple):
    recipe: str  # arguments of train.py
    adds: str  # what it adds to the rung before
    lecture: str  # the lecture's validation loss


LADDER = {
    "bigram": Rung("config/ladder.py", "the next token from the last one alone", "2.5"),
    "embeddings": Rung("config/ladder/embeddings.py", "vectors of tokens and positions", "-"),
    "one-head": Rung("config/ladder/one_head.py", "a head of self-attention", "2.4"),
    "four-heads": Rung("config/ladder/four_heads.py", "four heads of a quarter each", "2.28"),
    "feed-forward": Rung("config/ladder/feed_forward.py", "a feed-forward layer", "2.24"),
    "residual": Rung("config/ladder/residual.py", "three blocks with residual connections", "2.08"),
    "normed": Rung("config/ladder/normed.py", "LayerNorm", "2.06"),
    "gpt": Rung("config/shakespeare_char.py --device=cpu", "more of everything: the GPT of model.py", "1.48"),
}


class Result(NamedTuple):
    losses: list  # `random_window_loss` of each seed
    parameters: int
    seconds: float  # of the updates of the quickest seed: other programs can only slow a run down
    text: str  # a line that the first seed's model writes


def evaluate(folder):
    """Returns the `random_window_loss` of a run, measured by evaluate.py. Raises UserError if that fails."""
    done = subprocess.run([sys.executable, "evaluate.py", f"--out_dir={folder}", "--device=cpu"], capture_output=True,
                          encoding="utf-8")
    if done.returncode:
        raise UserError(f"evaluate.py --out_dir={folder} failed: {done.stderr.strip()}")
    return read_json(folder / "evaluation.json")["random_window_loss"]


def climb(name, rung, settings):
    """Trains a rung with each seed, evaluates it and lets it write. Returns (its Result, the log rows of each run)."""
    words, losses, logs = ["train.py", *rung.recipe.split()], [], []
    for seed in range(1337, 1337 + settings.seeds):
        folder = Path(settings.out) / name / f"seed{seed}"
        train(words, seed, folder, settings_of(rung.recipe, [])["max_iters"])
        losses.append(evaluate(folder))
        logs.append(read_log(folder))
        print(f"{name}, seed {seed}: {losses[-1]:.3f} after {logs[-1][-1]['seconds']:.0f} s", flush=True)
    first = folder.with_name("seed1337")
    task, model, _ = load(first, "cpu")
    text = " / ".join(task.write(model, "", max_new_tokens=90, seed=1337).split("\n")).strip(" /")
    seconds = min(rows[-1]["seconds"] for rows in logs)
    return Result(losses, count_parameters(model), seconds, text), logs


def table(results, seeds):
    """The lines of a Markdown table. results: {name of a rung: its Result}."""
    spread = " (least to most)" if seeds > 1 else ""
    yield f"| rung | it adds | parameters | loss{spread} | the lecture's | time |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, (losses, parameters, seconds, _) in results.items():
        loss = f"{statistics.fmean(losses):.3f}" + (f" ({min(losses):.3f} to {max(losses):.3f})" if seeds > 1 else "")
        rung = LADDER[name]
        yield f"| {name} | {rung.adds} | {parameters:,} | {loss} | {rung.lecture} | {seconds:.0f} s |"


def page(results, seeds):
    """The text of config/ladder/README.md."""
    recipes = "\n".join(f"python train.py {rung.recipe}" for rung in LADDER.values())
    texts = "\n".join(f"{name:14}{result.text}" for name, result in results.items())
    lines = "\n".join(table(results, seeds))
    return f"""# The lecture's ladder, from bigram to GPT

`lecture.py` has the rungs, each a class that adds one thing to the rung before it. `python -m tools.ladder` trains them
all and writes this page. The loss is the mean of random windows of the validation split, in nats, which is the
lecture's measure too. Here: {'one seed' if seeds == 1 else f'{seeds} seeds'}, one thread of a CPU.
Times are by the clock: other programs on the machine lengthen them.

{lines}

The last row is `config/shakespeare_char.py` on a CPU. The lecture's 1.48 is of 10.8M parameters, after 15 minutes on a
GPU; `config/shakespeare_char_fast.py` reaches 1.50 on a CPU within minutes (see EXPERIMENTS.md).

![The validation loss of each rung over its updates](curves.svg)

What each rung writes, with / for a new line:

```
{texts}
```

Each of them by itself:

```sh
{recipes}
```
"""


def main(settings):
    os.chdir(ROOT)  # recipes and data sets are named from there
    os.environ["OMP_NUM_THREADS"] = "1"  # so small a model is not faster with more, and every machine sums in one order
    require_same_code(Path(settings.out))
    results, logs = {}, {}
    for name, rung in LADDER.items():
        results[name], logs[name] = climb(name, rung, settings)
    print("\n" + "\n".join(table(results, settings.seeds)))
    draw_together(logs, PAGE.with_name("curves.svg"), "The lecture's ladder", "from the bigram model to the GPT")
    write_text(PAGE, page(results, settings.seeds))
    print(f"written to {PAGE}")


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS)
