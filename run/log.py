"""Reports a run: log.jsonl, run.json, samples.md, curves.svg, the terminal, and Weights & Biases if wanted."""

import os
import re
import shlex
import sys
import textwrap
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict

from configurator import UserError, flat_values, say, users_fault
from machine.device import peak_memory
from machine.terminal import columns, paint, printable
from run import curves
from run.files import to_json, write_text
from run.guards import REASONS
from run.lock import require_owned
from run.record import TIME, facts, read_record, rows_until, samples_until, set_aside

WIDTH = 100  # characters of a printed line, at most


class Log(AbstractContextManager):
    """Writes the run's files except its checkpoints, and prints its progress. Writes only on the main rank.

    step: updates made before this start; 0: a new run, which moves an earlier run's files into a folder of their own.
    peak: FLOP/s of a worker's device, or None. Raises UserError if wandb is wanted but can't start, before any move.
    """

    def __init__(self, out_dir, task, model, step, peak, world):
        self.out_dir, self.task, self.settings, self.peak = out_dir, task, task.settings, peak
        self.tokens, flops = task.cost(model)  # per update
        self.flops = flops / world.size
        self.file = self.wandb = None
        self.step = self.first_step = self.timed_from = step
        self.n_timed, self.seconds_timed, self.pauses = 0, 0.0, []  # to estimate the time left
        self.began = time.perf_counter()
        if world.is_main:
            self.open(step, world)
        self.began = self.row_at = self.clock = time.perf_counter()  # the first row leaves out wandb's start

    def open(self, step, world):
        """Reads the run's files in out_dir, cuts them off after `step`, and opens log.jsonl."""
        s, path = self.settings, self.out_dir / "log.jsonl"
        self.out_dir.mkdir(parents=True, exist_ok=True)
        starts, self.earlier_seconds, best = read_record(self.out_dir / "run.json") if step else ([], 0.0, {})
        starts.append(facts(s, step, world))
        results = {"best": best} if best.get("step", step + 1) <= step else {}  # kept even if log.jsonl is lost
        self.record = {"settings": flat_values(asdict(s)), "results": results, "starts": starts}
        if s.wandb:
            self.wandb = start_wandb(self.out_dir, s, starts[0]["id"])
        if not step:
            set_aside(self.out_dir)
        self.samples = samples_until(self.out_dir / "samples.md", step)
        rows = list(rows_until(path, step))  # later rows will be computed again
        write_text(path, "".join(map(to_json, rows)))
        for row in rows:
            best = self.record["results"].get("best", {}).get(f"val_{self.task.best[0]}")
            self.note_results(row, improves(self.task.best, row, best))
        self.file = open(path, "a", encoding="utf-8", buffering=1)
        self.write_record()

    def restart(self, step, evaluated=False):
        """Starts timing the next row, after an evaluation or a save: their time does not count as training time.

        evaluated: True after an evaluation; `seconds_left` needs the time that it took.
        """
        now = time.perf_counter()
        self.n_timed += step - self.timed_from
        self.seconds_timed += self.row_at - self.clock
        if evaluated:
            self.pauses.append(now - self.row_at)
        self.timed_from, self.clock = step, now

    def row(self, step, **values):
        """Returns a log row with the mean time of the updates since `restart`. values: read from the device already."""
        self.step, self.row_at = step, time.perf_counter()
        seconds = (self.row_at - self.clock) / (step - self.timed_from)
        if step == self.first_step + 1:  # it includes compiling: leave it out of the estimate of the time left
            self.timed_from, self.clock = step, self.row_at
        row = {"step": step, **values, "ms": 1000 * seconds, "tokens_per_s": self.tokens / seconds}
        if self.peak and self.flops:
            row["mfu"] = self.flops / seconds / self.peak
        return row

    def write(self, row, better, model):
        """Adds the row to log.jsonl, wandb and the terminal. After an evaluation, also updates the other files.

        better: True if its validation measure is the best so far. model: to take a sample from then, or None.
        """
        if self.file is None:
            return
        self.write_file("log.jsonl", to_json(row))
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        print(self.line(row, better), flush=True)
        self.note_results(row, better)
        if measures(row):
            self.write_record()
            if row["step"] < self.settings.max_iters:  # the end has a long sample, and `close` draws
                self.show_sample(row, model)
                draw(self.out_dir)

    def note_results(self, row, better):
        """Updates the results for run.json with the row's step, and with its validation measures if it has any."""
        results, found = self.record["results"], measures(row)
        results |= {"step": row["step"]} | ({"last": found} if found else {})
        if better:
            results["best"] = {"step": row["step"], **found}

    def write_record(self):
        self.record["results"]["seconds"] = round(self.earlier_seconds + time.perf_counter() - self.began, 3)
        self.write_file("run.json", to_json(self.record, indent=1))

    def write_file(self, name, text):
        """Replaces the file's text; for log.jsonl, appends to it. Raises UserError if that fails."""
        require_owned(self.out_dir)
        try:
            if name == "log.jsonl":
                self.file.write(text)
            else:
                write_text(self.out_dir / name, text)
        except OSError as error:
            raise UserError(f"{self.out_dir / name} can't be written: {error.strerror}") from error

    def line(self, row, better):
        """Returns the row as a line for the terminal; where that is narrow, the least important parts are left out."""
        last, measure, left = self.settings.max_iters, f"val_{self.task.best[0]}", self.seconds_left()
        # Parts are (rank, text). The highest rank is left out first, rank 0 never.
        parts = [(0, f"step {row['step']:>{len(str(last))}}/{last}"), (0, f"loss {row['loss']:.4f}"),
                 (5, f"lr {row['lr']:.2e}"), (3, f"{row['ms']:.1f} ms"), (4, f"{row['tokens_per_s']:,.0f} tok/s")]
        if "mfu" in row:
            parts.append((6, f"{row['mfu']:.0%} of peak"))
        if left is not None:
            hours, minutes = left // 3600, left // 60 % 60
            parts.append((1, (f"{hours}:{minutes:02d}" if hours else f"{minutes}") + f":{left % 60:02d} left"))
        for name, value in measures(row).items():
            mark = " best" * (better and name == measure)
            parts.append((0 if name == measure else 2, f"{name.replace('_', ' ')} {value:.4f}{mark}"))
        while sum(len(text) + 3 for _, text in parts) - 3 > min(WIDTH, columns()) and max(parts)[0]:
            parts.remove(max(parts))
        return " | ".join(paint(text, "32") if text.endswith(" best") else text for _, text in parts)

    def seconds_left(self):
        """Returns an estimate of the seconds to the last update; None if this start has made only one update.

        Assumes the mean time so far for updates and evaluations. Before the first evaluation, assumes a third of the
        training time for each of its tokens: evaluations have no backward pass.
        """
        s, step = self.settings, self.step
        n, seconds = self.n_timed + step - self.timed_from, self.seconds_timed + self.row_at - self.clock
        if not n:
            return None
        pace, size = seconds / n, self.task.fingerprint()
        if self.pauses:
            pause = sum(self.pauses) / len(self.pauses)
        else:
            tokens = size.get("val_tokens") or size.get("val_rows", 0) * self.tokens / s.batch_size
            pause = pace / 3 * min(tokens, s.eval_tokens or tokens) / self.tokens
        evaluations = s.max_iters // s.eval_interval - step // s.eval_interval
        evaluations += s.max_iters % s.eval_interval > 0 and step < s.max_iters
        return round(pace * (s.max_iters - step) + pause * evaluations)

    def show_sample(self, row, model):
        """Prints a short sample and adds it to samples.md; does nothing if sample_tokens is 0 or the model is None."""
        if not self.settings.sample_tokens or model is None:
            return
        model.eval()
        text = self.task.show(model, short=True)
        model.train()
        if text:
            print(paint(textwrap.indent(printable(text), "    "), "2"), flush=True)
            self.keep_sample(f"step {row['step']}, loss {row['loss']:.4f}", text)

    def keep_sample(self, heading, text):
        """Adds a sample to samples.md, in a code fence longer than any row of backticks in the text."""
        fence = "`" * (1 + max(2, *map(len, re.findall("`*", text))))
        section = f"## {heading}\n\n{fence}\n{text}\n{fence}\n\n"
        if section not in self.samples:  # not again when a finished run is resumed
            self.write_file("samples.md", self.samples + section)
            self.samples += section

    def sync(self):
        """Syncs log.jsonl to disk: a checkpoint must not be ahead of the log."""
        if self.file:
            os.fsync(self.file.fileno())

    def close(self, status, why):
        """Notes the end of this start in run.json, and closes the log. why: the reason; "": taken from `status`."""
        if self.file is None:
            return
        self.file.close()
        self.record["starts"][-1] |= {"ended": time.strftime(TIME), "end_step": self.step, "status": status}
        self.record["starts"][-1]["why"] = why or REASONS.get(status, "")
        self.write_record()
        draw(self.out_dir)
        if self.wandb:
            self.wandb.finish()

    def __exit__(self, kind, error, traceback):
        """If an error leaves the `with` block, closes the log with it as the reason. Without one, closes nothing."""
        if error and self.file and not self.file.closed:
            line = users_fault(error)
            with suppress(OSError, UserError):  # the first error is the one to show
                self.close(130 if kind is KeyboardInterrupt else 2 if line else 1, line or kind.__name__)


def measures(row):
    """Returns the validation measures of a row, {"val_loss": ...}; {} if it has none."""
    return {name: value for name, value in row.items() if name.startswith("val_")}


def improves(measure, row, best):
    """Returns True if the row's measure is better than `best` (None: no value yet). measure: (name, min or max)."""
    name, better = measure
    value = row.get(f"val_{name}")
    return isinstance(value, (int, float)) and (best is None or better(value, best) != best)


def draw(out_dir):
    """Draws curves.svg. An error is only printed: no picture is worth the run."""
    try:
        curves.draw(out_dir)
    except Exception as error:
        say(f"{out_dir / 'curves.svg'} can't be drawn: {type(error).__name__}: {error}")


def start_wandb(out_dir, settings, name):
    """Returns the wandb run of id `name`; resuming continues its charts. Raises UserError if wandb can't start."""
    try:
        from wandb import errors, init
    except ImportError:  # also if Python finds a folder named wandb, of its logs
        raise UserError("--wandb needs a package: pip install wandb") from None
    try:
        return init(project=settings.wandb_project, name=settings.wandb_name or None, id=name, resume="allow",
                    config=asdict(settings), dir=str(out_dir))
    except errors.Error as error:
        said = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"--wandb: {said}; or set WANDB_MODE=offline, or leave --wandb out") from None


def say_where(task, model, log, stopped, why):
    """If stopped, prints why and how to resume. Else prints a sample, the files and commands, and calls task.finish."""
    s, out_dir = task.settings, printable(task.settings.out_dir)
    folder = shlex.quote(out_dir)
    if stopped:
        stream = sys.stderr if getattr(sys.stdout, "lost", False) else sys.stdout
        print(f"\nstopped at step {log.step} ({why}) and saved; resume with: python train.py --resume"
              f" --out_dir={folder}", file=stream)
        return
    if s.sample_tokens:
        text = task.show(model)
        print(f"\n{printable(text)}\n")
        log.keep_sample(f"step {log.step}, the end", text)
    task.finish()
    n, seconds = log.step - log.first_step, time.perf_counter() - log.began
    print(f"{n} updates in {seconds:.0f} s, at most {peak_memory(task.world.device) / 2**20:,.0f} MiB", end="")
    if best := log.record["results"].get("best"):
        measure = f"val_{task.best[0]}"
        print(f"; best {measure.replace('val_', 'validation ')} {best[measure]:.4f} at step {best['step']}", end="")
    files = ["log.jsonl", "run.json", *(["samples.md"] if log.samples else []), "curves.svg"]
    print(f"\nin {out_dir}: checkpoints best and last, {', '.join(files)}\n"
          f"try it:      {task.command(out_dir)}\n"
          f"evaluate it: python evaluate.py --out_dir={folder}", flush=True)
