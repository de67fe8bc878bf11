"""From a GPT to a model that answers: every stage on one world, in one table.

    python -m tools.stages                                      countdown, one seed: about an hour of one CPU core
    python -m tools.stages --seeds=1337,1,2 --world=calculator

Each row is a way to make a better model of the same start, the fine-tuned one: more of the same training, its own
checked answers, preferences, rewards. The settings are those of the recipes in config/chat/, chosen on validation
problems of countdown; the best checkpoint is chosen on validation, and the test problems are scored once. What was
stopped goes on with the same command; what has a score keeps it.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from configurator import UserError, from_command_line, one_line_errors


class Stage(NamedTuple):
    name: str
    recipe: str  # of train.py; {sft}, {checked}, {pairs}, {reward}: folders of the seed; {world}: the data set
    scored: bool = True  # a row of the table
    which: str = "best"  # the checkpoint that is scored; "": none, for it was never asked anything


STAGES = {  # in the order in which they need each other
    "pre": Stage("pre-trained on equations", "config/chat/pretrain.py --dataset={world}_text", scored=False, which=""),
    "pre_sft": Stage("pre-trained, then SFT", "config/chat/countdown.py --dataset={world} --init_from={pre}"
                                              " --zero_init=False --muon_lr=0.01"),
    "sft": Stage("SFT", "config/chat/countdown.py --dataset={world}"),
    "more": Stage("SFT, four times as long", "config/chat/countdown.py --dataset={world} --max_iters=2480"
                                             " --eval_interval=248"),
    "own": Stage("own checked answers", "config/chat/checked.py --dataset={checked} --init_from={sft}"),
    "group": Stage("group-relative", "config/chat/rl.py --dataset={world} --init_from={sft}"),
    "ppo": Stage("PPO", "config/chat/ppo.py --dataset={world} --init_from={sft}"),
    "own_ppo": Stage("own checked answers, then PPO", "config/chat/ppo.py --dataset={world} --init_from={own}"
                                                      " --max_iters=600"),
    "reward": Stage("reward model", "config/chat/reward.py --dataset={pairs} --init_from={sft}", scored=False),
    "scored": Stage("PPO for the reward model", "config/chat/ppo.py --dataset={world} --init_from={sft}"
                                                " --reward={reward} --max_iters=400"),
    "dpo": Stage("DPO", "config/chat/dpo.py --dataset={pairs} --init_from={sft}"),
    "weak": Stage("weak reward model", "config/chat/reward.py --dataset={pairs} --init_from={sft} --sft=0"
                                       " --max_iters=94 --eval_interval=94", scored=False),
    "hacked": Stage("group-relative, for a weak reward model", "config/chat/rl.py --dataset={world} --init_from={sft}"
                                                               " --reward={weak} --max_iters=200", which="last"),
    "held": Stage("the same, held by a KL", "config/chat/rl.py --dataset={world} --init_from={sft} --reward={weak}"
                                            " --max_iters=200 --kl=0.2", which="last"),
}


@dataclass(frozen=True)
class Settings:
    world: Literal["countdown", "calculator"] = "countdown"  # whose problems are asked
    seeds: str = "1337"  # of the runs, separated by commas
    only: str = ""  # stages to walk, such as sft,own,ppo, each after those that it needs; empty: all
    out: str = "out/stages"  # the folder of the runs and of the data that they make

    def __post_init__(self):
        if not all(seed.strip().isdecimal() for seed in self.seeds.split(",")):
            raise UserError(f"seeds = {self.seeds}: must be whole numbers, separated by commas")
        for name in filter(None, self.only.split(",")):
            if name not in STAGES:
                raise UserError(f"only = {self.only}: {name!r} is no stage: they are {', '.join(STAGES)}")


if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, _ = from_command_line(Settings, __doc__)

from run.files import read_json
from tools.versus import require_same_code, settings_of, train

ROOT = Path(__file__).resolve().parent.parent
BEST_OF = "best of 8"  # what evaluate.py calls it
SHOWN = {"exact": "the likeliest answer", "exact of samples": "a drawn one", "pass@8": "one of 8 drawn",
         "malformed samples": "malformed, of drawn ones"}
DATA = {"checked": "", "pairs": "--pairs=True --samples=16 --most=8"}  # {what tools.answers makes: its words}


def python(*words):
    """Runs a command. Raises UserError with the end of what it said if it fails."""
    done = subprocess.run([sys.executable, *words], capture_output=True, encoding="utf-8")
    if done.returncode:
        raise UserError(f"python {' '.join(words)} failed: {done.stderr.strip()[-500:]}")


def walk(seed, world, chosen, out):
    """Makes the runs of a seed that are missing. Returns {stage: content of its evaluation.json, and "minutes"}.

    chosen: some of STAGES. out: the seed's folder.
    """
    folders = {name: out / name for name in (*STAGES, *DATA)} | {"world": world}
    found = {}
    for key, stage in chosen.items():
        for name, words in DATA.items():
            if f"{{{name}}}" in stage.recipe and not (folders[name] / "meta.json").exists():
                python("-m", "tools.answers", f"--out_dir={folders['sft']}", f"--name={folders[name]}",
                       *words.split())
        recipe, folder = stage.recipe.format(**folders), folders[key]
        words = [*recipe.split(), "--device=cpu", "--dtype=float32"]
        train(["train.py", *words], seed, folder, settings_of(recipe, [])["max_iters"])
        found[key] = score(folder, stage.which)
        print(f"seed {seed}, {stage.name}: {sum_up(found[key])}", flush=True)
    if "reward" in chosen:
        found["sft"] = score(folders["sft"], "best", folders["reward"])
    return found


def sum_up(row):
    """The validation figures of a run in a line."""
    names = ("exact", "exact of samples", "pass@8", "agreement")
    return ", ".join([*(f"{name} {row[name]:.1%}" for name in names if name in row), f"{row['minutes']:.1f} minutes"])


def score(folder, which, reward=""):
    """The content of a run's evaluation.json, with its test part, which is scored once, and the run's "minutes".

    which: the checkpoint, best or last. reward: the folder of a reward model that chooses from 8 answers, or "".
    """
    path, found = folder / "evaluation.json", {}
    if which and not path.exists() or reward and BEST_OF not in read_json(path):
        python("evaluate.py", f"--out_dir={folder}", f"--checkpoint={which}", "--test=True", "--device=cpu",
               "--dtype=float32", *[f"--reward={reward}"] * bool(reward))
    if which:
        found = dict(read_json(path))
    return {**found, "minutes": read_json(folder / "run.json")["results"]["seconds"] / 60}


def table(found):
    """The lines of a Markdown table of the test problems. found: {stage: [evaluation.json of each seed]}."""
    lines = [["in % of the test problems", *SHOWN.values(), "minutes"], ["---"] * (len(SHOWN) + 2)]
    for key, rows in found.items():
        name, minutes = STAGES[key].name, f"{sum(row['minutes'] for row in rows) / len(rows):.1f}"
        if STAGES[key].scored:
            lines.append([name, *(figures(rows, f"test {measure}") for measure in SHOWN), minutes])
        elif "agreement" in rows[0]:
            lines.append([f"{name}: pairs ranked right", figures(rows, "test agreement"), "", "", "", minutes])
        if f"test {BEST_OF}" in rows[0]:
            lines.append([f"{name}, the best of 8 by score", figures(rows, f"test {BEST_OF}"), "", "", "", ""])
    return [f"| {' | '.join(line)} |" for line in lines]


def figures(rows, name):
    """The shares of all seeds in percent, one after the other, as text."""
    return ", ".join(f"{100 * row[name]:.1f}" for row in rows)


def main(settings):
    os.chdir(ROOT)  # recipes and data sets are named from there
    os.environ["OMP_NUM_THREADS"] = "1"  # so small a model is not faster with more
    chosen = {key: STAGES[key] for key in settings.only.split(",")} if settings.only else STAGES
    out, found = Path(settings.out).resolve() / settings.world, {}
    require_same_code(out)
    for seed in map(int, settings.seeds.split(",")):
        for key, row in walk(seed, settings.world, chosen, out / str(seed)).items():
            found.setdefault(key, []).append(row)
    print("\n" + "\n".join(table(found)))


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS)
