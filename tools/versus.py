"""Is recipe b better than recipe a, and how sure is that? Trains both with several seeds and compares them per seed.

    python -m tools.versus config/shakespeare_char.py config/shakespeare_char_fast.py --seeds=5
    python -m tools.versus config/shakespeare_char.py "config/shakespeare_char.py --dropout=0.1" --eval_interval=100
    python -m tools.versus "" " --optimizer=muon" --max_iters=100 --eval_interval=10     train.py's defaults and Muon
    python -m tools.versus config/shakespeare_char.py --patch=ideas/qk_norm.patch        the code as it is, and changed

A recipe is a quoted list of arguments for train.py; settings outside the quotes apply to both recipes. The runs of a
and b take turns, so that a machine that slows down slows both. The same command continues a comparison that was
stopped; with a higher --seeds it trains the missing runs. The runs, versus.json and versus.svg are in --out. Code that
was edited since, but for comments and docstrings, needs a new --out: code.json there knows what trained the runs.

--patch is a change of the code, as `git diff` writes it. One recipe is then enough: a is trained by the code as it is,
b by a copy of it in --out/code, to which the patch is applied. The copy stays: python out/versus/code/sample.py
--out_dir=out/versus/b/seed1 writes with a run of b.

Two runs with the same seed see the same batches, so chance moves both losses alike, and their difference varies less
than either loss: this is a paired t-test. The 95 % confidence interval contains the true mean difference in 19 of 20
comparisons, if the differences are about normally distributed.

The validation losses are compared twice. "At equal updates" is after the last step at which all runs were evaluated.
"At equal time", which counts the updates only, is when the quicker run of a pair ends. The slower run's loss at that
time is interpolated between two evaluations, so choose a low --eval_interval. Its learning rate has not fallen to the
end of its schedule by then, which is unfair to it: give the slower recipe the --max_iters that it has time for. Other
programs slow a run down, so compare at equal time on a quiet machine, where runs of one recipe take the same time.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, check_ranges, flat_values, from_command_line, one_line_errors


@dataclass(frozen=True)
class Settings:
    seeds: int = 5  # runs of each recipe, with --seed=1, 2, 3 and so on
    out: str = "out/versus"  # folder of the comparison: runs, versus.json, versus.svg
    patch: str = ""  # file with a change of the code, applied to a copy of it that trains b; "": no change

    def __post_init__(self):
        check_ranges(self, seeds=1)


if __name__ == "__main__":  # --help and typos answer before torch is imported
    OWN = tuple(f"--{name}" for name in Settings.__dataclass_fields__)
    GIVEN = sys.argv[1:]
    sys.argv[1:] = [text for text in GIVEN if text.partition("=")[0] in (*OWN, "-h", "--help")]
    SETTINGS, _ = from_command_line(Settings, __doc__)
    RECIPES = [text for text in GIVEN if not text.startswith("-")]
    SHARED = [text for text in GIVEN if text.startswith("-") and text.partition("=")[0] not in OWN]

from dataclasses import asdict

from configurator import parse
from machine.digest import file_tokens
from machine.terminal import progress
from run.checkpoint import is_run
from run.curves import read_log, series
from run.files import read_json, write_json
from tools import shell_words
from tools.compare import MARKS, clock, draw_together, marks_of
from tools.paired import at_equal_time, at_equal_updates, interval, verdict
from train import HOW
from train import Settings as Training

ROOT = Path(__file__).resolve().parent.parent
RUNS = "[ab]/seed*"  # the runs' folders in --out


# ----------------------------------------------------------------------------------------------------------------------
# The code, and a copy of it with a patch

def code_in(root):
    """{path: digest} of the Python and C files in the folder `root` that train.py uses: what it imports, and so on.

    Of a package that is imported, each file counts: tasks are found by name. Python files count without comments,
    docstrings and layout.
    """
    found, todo, seen = {}, {"train"}, set()
    while todo:
        seen.add(name := todo.pop())
        inside = (root / name).rglob("*.*") if (root / name / "__init__.py").exists() else ()
        for path in (root / f"{name}.py", *inside):
            if path.suffix not in (".py", ".c") or not path.exists():
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            text = file_tokens(text) if path.suffix == ".py" else text
            found[str(path.relative_to(root))] = hashlib.sha256(text.encode()).hexdigest()[:16]
            todo |= {*re.findall(r"(?:^|NEWLINE |INDENT |DEDENT )(?:from|import) (\w+)", text)} - seen
    return found


def require_same_code(out, runs="*/*"):
    """Raises UserError if other code trained the runs in a folder (see `begun`). Else writes its code.json."""
    path, now = out / "code.json", code_in(ROOT)
    if old := sorted({run.parent.name for run in begun(out, runs)}):
        then = read_json(path) if path.exists() else None
        advice = f"choose a new folder, --out=NEW, or delete {', '.join(old)} in {out}"
        if not isinstance(then, dict):
            raise UserError(f"{out} has no code.json that says what code trained the runs there: {advice}")
        if changed := sorted(name for name in {**then, **now} if then.get(name) != now.get(name)):
            names = ", ".join(changed[:3]) + f" and {len(changed) - 3} more" * (len(changed) > 3)
            raise UserError(f"the code has changed since the runs in {out} were trained ({names}): undo that, {advice}")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, now)


def begun(folder, runs="seed*"):
    """The folders of the runs in a folder, such as that of a recipe, that were evaluated or saved. runs: a pattern."""
    return [run for run in folder.glob(runs) if is_run(run) or series(read_log(run), "val_loss")]


def read_patch(path):
    """The text of a patch, or None if `path` is "". Raises UserError if the file can't be read."""
    try:
        patch = Path(path).read_text(encoding="utf-8") if path else None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not a text file"
        raise UserError(f"patch = {path}: can't be read: {why}") from None
    if patch == "":
        raise UserError(f"patch = {path}: is empty")
    return patch


def patched_copy(path, folder):
    """Copies the code into `folder` and applies the patch at `path` to the copy.

    The copy has the Python files and the packages of the repository; its data/ is a link to ours. Raises UserError if
    the patch does not apply, or if recipe b was trained by another copy, which then stays.
    """
    if folder.exists() and not (folder / "data").is_symlink():
        raise UserError(f"{folder} is in the way of the code with the patch: choose another folder with --out")
    packages = [init.parent for init in ROOT.glob("*/__init__.py")]
    if any(folder.resolve().is_relative_to(package) for package in packages):
        raise UserError(f"{folder} is inside the code, which is copied there: choose another folder with --out")
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    (new / "data").symlink_to(ROOT / "data", target_is_directory=True)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, new)
    for package in packages:
        shutil.copytree(package, new / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    try:
        apply(path, new)
        if begun(folder.parent / "b") and folder.exists() and code_in(new) != code_in(folder):
            raise UserError(f"the code has changed since {folder} was made, which trained recipe b: undo that, or"
                            " write the new comparison to a new folder, --out=NEW")
    except UserError:
        shutil.rmtree(new)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def apply(path, folder):
    """Applies the patch at `path` to the copy of the code in `folder`. Raises UserError if it does not apply."""
    text = read_patch(path)
    # Within a repository, git takes a patch's paths from the repository's root. So git must not look above the copy.
    apart = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    try:
        done = subprocess.run(["git", "apply", "-"], cwd=folder, env=apart, input=text.encode(), capture_output=True)
    except FileNotFoundError:
        raise UserError(f"patch = {path}: git applies it, and git is not installed") from None
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip().partition("\n")[0].removeprefix("error: ")
        raise UserError(f"patch = {path}: does not apply to the code as it is: {why} (a patch may change the root's"
                        " Python files and the packages)")


# ----------------------------------------------------------------------------------------------------------------------
# Training

def settings_of(recipe, shared):
    """{name: value} of all settings, defaults included, that train.py makes of a recipe and `shared`.

    recipe: one text, as quoted on the command line. shared: a list of arguments that both recipes have.
    Leaves out seed, out_dir and resume. Raises UserError if an argument such as --seed=2 names one of these (a config
    file may set them), and for an unknown setting or an unfit value.
    """
    words = [*shell_words(recipe), *shared]
    on_line = {text.partition("=")[0].lstrip("-") for text in words if text.startswith("-")}
    if on_line & {"help", "h"}:
        raise UserError("--help within a recipe: python train.py --help lists what a recipe may set")
    settings, given = parse(Training, words, more=HOW["more"], has_accelerator=HOW["has_accelerator"],
                            elsewhere=HOW["elsewhere"])
    for name in ("seed", "out_dir", "resume"):
        if name in on_line:
            raise UserError(f"{name}: is chosen by the comparison; leave it out (--seeds and --out are its settings)")
    return {name: value for name, value in flat_values(asdict(settings)).items()
            if name not in ("seed", "out_dir", "resume")}


def require_same(path, now, patch=None):
    """Raises UserError if the versus.json at `path` has other settings than `now`, or another patch, or is damaged.

    A recipe of which no run got as far as an evaluation may change: it failed, and nothing would be compared wrongly.
    now: {name of a recipe: its settings}. patch: its text, or None.
    """
    try:
        record = read_json(path)
        earlier = {name: dict(record["settings"][name]) for name in "ab"}
    except (LookupError, TypeError, ValueError, RecursionError):
        raise UserError(f"{path} does not say what it compares: choose another folder with --out, or delete it if"
                        " the runs beside it are of these recipes") from None
    for name in "ab":
        names = {**earlier[name], **now[name]}
        changed = ", ".join(one for one in names if earlier[name].get(one) != now[name].get(one))
        other = f"whose recipe {name} has another {changed}"
        if name == "b" and not changed and record.get("patch") != patch:
            changed, other = "patch", f"with {'another' if record.get('patch') else 'no'} patch"
        if changed and begun(path.parent / name):
            raise UserError(f"{path.parent} holds a comparison {other}: write the new one to a new folder, --out=NEW,"
                            f" or delete {path.parent / name} to train {name} anew")


def require_same_origin(folder, first):
    """Raises UserError if a run was trained on other data, or with other model code, than its recipe's first run."""
    now, then = marks_of(folder), marks_of(first)
    if changed := [name for name in MARKS if now.get(name) != then.get(name)]:
        raise UserError(f"{folder} was trained with other {' and other '.join(changed)} than {first}: delete it and put"
                        " back what was changed, or choose another folder with --out")


def train(words, seed, folder, max_iters):
    """Starts or resumes the run in `folder`, unless it has finished. words: a list of arguments for train.py.

    Raises UserError if the run fails, SystemExit if it is stopped.
    """
    rows = read_log(folder)
    if rows and rows[-1]["step"] >= max_iters and "val_loss" in rows[-1]:
        return
    command = [sys.executable, *words, f"--seed={seed}", f"--out_dir={folder}", "--resume=auto"]
    folder.mkdir(parents=True, exist_ok=True)
    with (open(folder / "output.txt", "a", encoding="utf-8") as file, subprocess.Popen(command, stdout=file) as process,
          progress(max_iters, f"{folder.parent.name}, {folder.name}", " updates") as line):
        while process.poll() is None:
            with suppress(KeyboardInterrupt, subprocess.TimeoutExpired):  # Ctrl-C reaches the run too, which saves
                process.wait(None if line.disable else 1)
            if not line.disable and (rows := read_log(folder)):
                line.update(rows[-1]["step"] - line.n)
    if process.returncode in (75, 130, 143, -2, -15):
        print("stopped; the same command continues", file=sys.stderr)
        raise SystemExit(process.returncode if process.returncode > 0 else 128 - process.returncode)
    if process.returncode:
        raise UserError(f"{shlex.join(command[1:])} failed with exit status {process.returncode}: see what it printed,"
                        f" above and in {folder / 'output.txt'}")


def train_all(words, seeds, out, max_iters):
    """Trains a and b in turns; a is first for odd seeds. Returns {"a": [the log rows of each seed's run], "b": ...}.

    words: {"a": train.py and its arguments, "b": ...}. seeds: how many. max_iters: {"a": number of updates, "b": ...}.
    """
    for seed in range(1, seeds + 1):
        for name in ("ab" if seed % 2 else "ba"):
            folder = out / name / f"seed{seed}"
            require_same_code(out, RUNS)  # it may have been edited since the run before
            train(words[name], seed, folder, max_iters[name])
            require_same_origin(folder, out / name / "seed1")
            rows = read_log(folder)
            step, loss = series(rows, "val_loss")[-1]
            print(f"seed {seed} of {seeds}, {name}: validation loss {loss:.4f} after {step:,} updates in"
                  f" {clock(rows[-1]['seconds'])}", flush=True)
    return {name: [read_log(out / name / f"seed{seed}") for seed in range(1, seeds + 1)] for name in "ab"}


# ----------------------------------------------------------------------------------------------------------------------
# Reporting

def durations(runs):
    """How long the runs of each recipe took, in words. runs: {"a": [the log rows of each seed's run], "b": ...}."""
    found = {name: [rows[-1]["seconds"] for rows in logs] for name, logs in runs.items()}
    return ", ".join(f"{name}'s runs took {min(times):,.1f} to {max(times):,.1f} s" for name, times in found.items())


def report(out, recipes, patch, found, took):
    """Prints the losses of each seed, and whether a or b is better. recipes: {"a": a recipe's text, "b": ...}.

    found: {"updates": Pairs at equal updates, "time": Pairs at equal time}, lists with a Pair for each seed, or empty.
    patch: the file that recipe b's code was changed by, or "". took: what `durations` says.
    """
    for name in "ab":
        code = f", with {patch}" if patch and name == "b" else ""
        print(f"{name}: {recipes[name].strip() or 'the defaults of train.py'}{code}")
    for where, pairs in found.items():
        if not pairs:
            print(f"\nat equal {where}, nothing can be said: not every run was evaluated by then; use a lower"
                  " --eval_interval and another --out")
            continue
        unit = "step" if where == "updates" else "second"
        print(f"\n{'seed':>4} {unit:>8} {'a':>8} {'b':>8} {'b - a':>9}")
        for seed, at, a, b in pairs:
            print(f"{seed:>4} {at if unit == 'step' else round(at, 1):>8} {a:>8.4f} {b:>8.4f} {b - a:>+9.4f}")
        quiet = f"\n(on a quiet machine only: {took})" if where == "time" else ""
        print(f"at equal {where}, {verdict(pairs)}{quiet}")
    several = any(len(pairs) > 1 for pairs in found.values())  # one seed has no interval
    note = "; \u00b1 is the 95 % confidence interval of the mean difference" * several
    print(f"\nvalidation losses{note}\nin {out}: the runs, versus.json, versus.svg")
    if patch:
        print("write with a run of b, by the changed code: python "
              + shlex.join([str(out / "code" / "sample.py"), f"--out_dir={out / 'b' / 'seed1'}"]))


def main(given, shared, settings):
    if folders := [word for recipe in given for word in shell_words(recipe) if os.path.isdir(word)]:
        raise UserError(f"{folders[0]}: is a folder, and versus trains recipes; to compare runs that you have: python"
                        f" -m tools.compare {shlex.join(folders)}")
    if settings.patch and len(given) == 1:
        given = given * 2
    if len(given) != 2:
        raise UserError(f"{len(given)} recipes; name two, or one and a --patch, each in quotes, with a blank before"
                        ' one that begins with a setting: python -m tools.versus "" " --optimizer=muon"')
    recipes, out, patch = dict(zip("ab", given)), Path(settings.out), read_patch(settings.patch)
    record = {name: settings_of(recipe, shared) for name, recipe in recipes.items()}
    if (out / "versus.json").exists():
        require_same(out / "versus.json", record, patch)
    elif is_run(out) or (out / "run.json").exists():
        raise UserError(f"out = {out}: is the folder of a training run; name a new folder, --out={out / 'versus'}")
    if record["a"] == record["b"] and patch is None:
        raise UserError("a and b have the same settings: change one of them, or the code of b with --patch=FILE")
    require_same_code(out, RUNS)
    if patch is not None:
        patched_copy(settings.patch, out / "code")
    folders = {"a": ROOT, "b": ROOT if patch is None else out / "code"}
    words = {name: [str(folders[name] / "train.py"), *shell_words(recipe), *shared] for name, recipe in recipes.items()}
    record = {"recipes": recipes, "for both": shared, "patch": patch, "settings": record}
    write_json(out / "versus.json", record)
    max_iters = {name: record["settings"][name]["max_iters"] for name in "ab"}
    runs = train_all(words, settings.seeds, out, max_iters)
    found = {"updates": at_equal_updates(runs["a"], runs["b"]), "time": at_equal_time(runs["a"], runs["b"])}
    for where, pairs in found.items():
        mean, half = interval([pair.b - pair.a for pair in pairs]) if pairs else (None, None)
        record[f"at equal {where}"] = {"b - a": mean, "95 %": half, "pairs": [pair._asdict() for pair in pairs]}
    write_json(out / "versus.json", record)
    words = {name: recipes[name].split() for name in "ab"}
    words["b"] += ["with", settings.patch] if patch else []
    n = len(os.path.commonprefix(list(words.values())))  # words that both begin with, named once
    bare = "nothing more" if n else "the defaults"
    named = {f"{name}: {' '.join(words[name][n:]) or bare}": runs[name] for name in "ab"}
    about = f"two recipes, {settings.seeds} seeds each" + f": {' '.join(words['a'][:n])}, and" * (n > 0)
    draw_together(named, out / "versus.svg", str(out), about)
    report(out, recipes, settings.patch, found, durations(runs))


if __name__ == "__main__":
    with one_line_errors():
        main(RECIPES, SHARED, SETTINGS)
