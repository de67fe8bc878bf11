"""What a run tells: log.jsonl, run.json, samples.md, curves.svg, the terminal, and Weights & Biases if wanted."""

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

WIDTH = 100  # columns of a line of the log, at most


class Log(AbstractContextManager):
    """Writes what the run leaves beside its checkpoints, and what it shows. Silent on all but the main rank.

    step: of the checkpoint that the run goes on from; 0: it starts, and an earlier run in out_dir is moved away.
    peak: a worker's FLOP/s, or None. Raises UserError if wandb is wanted but can't be had: before anything is moved.
    """

    def __init__(self, out_dir, task, model, step, peak, world):
        self.out_dir, self.task, self.settings, self.peak = out_dir, task, task.settings, peak
        self.tokens, flops = task.cost(model)  # of an update
        self.flops = flops / world.size
        self.file = self.wandb = None
        self.step = self.first_step = self.timed_from = step
        self.n_timed, self.seconds_timed, self.pauses = 0, 0.0, []  # for the time left
        self.began = time.perf_counter()
        if world.is_main:
            self.open(step, world)
        self.began = self.looked = self.clock = time.perf_counter()  # what is above, wandb's start, is no part of a row

    def open(self, step, world):
        """Takes what the run left in its folder up to `step`, and starts to write there."""
        s, path = self.settings, self.out_dir / "log.jsonl"
        self.out_dir.mkdir(parents=True, exist_ok=True)
        starts, self.earlier_seconds, best = read_record(self.out_dir / "run.json") if step else ([], 0.0, {})
        starts.append(facts(s, step, world))
        results = {"best": best} if best.get("step", step + 1) <= step else {}  # even if the log is lost
        self.record = {"settings": flat_values(asdict(s)), "results": results, "starts": starts}
        if s.wandb:
            self.wandb = start_wandb(self.out_dir, s, starts[0]["id"])
        if not step:
            set_aside(self.out_dir)
        self.samples = samples_until(self.out_dir / "samples.md", step)
        rows = list(rows_until(path, step))  # what came after the checkpoint will be written again
        write_text(path, "".join(map(to_json, rows)))
        for row in rows:
            best = self.record["results"].get("best", {}).get(f"val_{self.task.best[0]}")
            self.note(row, improves(self.task.best, row, best))
        self.file = open(path, "a", encoding="utf-8", buffering=1)
        self.write_record()

    def restart(self, step, evaluated=False):
        """Counts the next row's time from here: after an evaluation or a save, which are no part of an update."""
        now = time.perf_counter()
        self.n_timed += step - self.timed_from
        self.seconds_timed += self.looked - self.clock
        self.pauses += [now - self.looked] * evaluated
        self.timed_from, self.clock = step, now

    def row(self, step, **values):
        """A row with the mean time of the updates since `restart`. values: plain numbers, so the device is done."""
        self.step, self.looked = step, time.perf_counter()
        seconds = (self.looked - self.clock) / (step - self.timed_from)
        if step == self.first_step + 1:  # it compiled and made room: no measure of what is to come
            self.timed_from, self.clock = step, self.looked
        row = {"step": step, **values, "ms": 1000 * seconds, "tokens_per_s": self.tokens / seconds}
        if self.peak and self.flops:
            row["mfu"] = self.flops / seconds / self.peak
        return row

    def write(self, row, better, model):
        """Adds the row to log.jsonl, wandb and the terminal; after an evaluation renews the other files too.

        better: its validation measures are the best so far. model: writes a short sample then; None: it can't.
        Raises UserError if a file can't be written.
        """
        if self.file is None:
            return
        self.keep("log.jsonl", to_json(row))
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        print(self.line(row, better), flush=True)
        self.note(row, better)
        if measures(row):
            self.write_record()
            if row["step"] < self.settings.max_iters:  # else a long sample follows, and `close` draws
                self.look(row, model)
                draw(self.out_dir)

    def note(self, row, better):
        """Takes the row's validation measures, if it has some, into the results."""
        results, found = self.record["results"], measures(row)
        results |= {"step": row["step"]} | ({"last": found} if found else {})
        if better:
            results["best"] = {"step": row["step"], **found}

    def write_record(self):
        self.record["results"]["seconds"] = round(self.earlier_seconds + time.perf_counter() - self.began, 3)
        self.keep("run.json", to_json(self.record, indent=1))

    def keep(self, name, text):
        """Writes the file anew; log.jsonl it adds to."""
        require_owned(self.out_dir)
        try:
            if name == "log.jsonl":
                self.file.write(text)
            else:
                write_text(self.out_dir / name, text)
        except OSError as error:
            raise UserError(f"{self.out_dir / name} can't be written: {error.strerror}") from error

    def line(self, row, better):
        """The row as one line: what matters least is left out where the terminal is narrow."""
        last, measure, left = self.settings.max_iters, f"val_{self.task.best[0]}", self.seconds_left()
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
        """An estimate to the last update, from the second row on, else None.

        It leaves out what happens once, and counts an evaluation as those before it; before the first as a forward
        pass, a third of an update's time for as many tokens.
        """
        s, step = self.settings, self.step
        n, seconds = self.n_timed + step - self.timed_from, self.seconds_timed + self.looked - self.clock
        if not n:
            return None
        pace, size = seconds / n, self.task.fingerprint()
        tokens = size.get("val_tokens") or size.get("val_rows", 0) * self.tokens / s.batch_size
        pause = pace / 3 * min(tokens, s.eval_tokens or tokens) / self.tokens
        if self.pauses:
            pause = sum(self.pauses) / len(self.pauses)
        evaluations = s.max_iters // s.eval_interval - step // s.eval_interval
        evaluations += s.max_iters % s.eval_interval > 0 and step < s.max_iters
        return round(pace * (s.max_iters - step) + pause * evaluations)

    def look(self, row, model):
        """Shows and keeps a short sample, if one is wanted and the task has one."""
        if not self.settings.sample_tokens or model is None:
            return
        model.eval()
        text = self.task.show(model, short=True)
        model.train()
        if text:
            print(paint(textwrap.indent(printable(text), "    "), "2"), flush=True)
            self.keep_sample(f"step {row['step']}, loss {row['loss']:.4f}", text)

    def keep_sample(self, heading, text):
        """Adds a text to samples.md, in a fence that no text can break."""
        fence = "`" * (1 + max(2, *map(len, re.findall("`*", text))))
        section = f"## {heading}\n\n{fence}\n{text}\n{fence}\n\n"
        if section not in self.samples:  # a finished run that is resumed
            self.keep("samples.md", self.samples + section)
            self.samples += section

    def sync(self):
        """Has the rows so far reach the disk: a checkpoint must not be ahead of its log."""
        if self.file:
            os.fsync(self.file.fileno())

    def close(self, status, why):
        """Notes in run.json that this start ended by itself, at which step, with which exit status, and why."""
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
        """Notes an error as the end of this start."""
        if error and self.file and not self.file.closed:
            line = users_fault(error)
            with suppress(OSError, UserError):  # that error is the one to show
                self.close(130 if kind is KeyboardInterrupt else 2 if line else 1, line or kind.__name__)


def measures(row):
    """The validation measures of a row, by name."""
    return {name: value for name, value in row.items() if name.startswith("val_")}


def improves(measure, row, best):
    """Whether the row's measure, as Task.best has it, is better than `best`; None: there was none before."""
    name, better = measure
    value = row.get(f"val_{name}")
    return isinstance(value, (int, float)) and (best is None or better(value, best) != best)


def draw(out_dir):
    """Renews curves.svg. No error in a picture may end a run."""
    try:
        curves.draw(out_dir)
    except Exception as error:
        say(f"{out_dir / 'curves.svg'} can't be drawn: {type(error).__name__}: {error}")


def start_wandb(out_dir, settings, name):
    """wandb's run of this id. A resumed run has the id of its first start, so that it goes on in the same charts."""
    try:
        from wandb import errors, init
    except ImportError:  # not there, or a folder of its logs stands in for it
        raise UserError("--wandb needs a package: pip install wandb") from None
    try:
        return init(project=settings.wandb_project, name=settings.wandb_name or None, id=name, resume="allow",
                    config=asdict(settings), dir=str(out_dir))
    except errors.Error as error:
        said = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"--wandb: {said}; or set WANDB_MODE=offline, or leave --wandb out") from None


def say_where(task, model, log, stopped, why):
    """The end of a run: a sample, where everything lies, what to run next."""
    s, out_dir = task.settings, printable(task.settings.out_dir)
    folder = shlex.quote(out_dir)
    if stopped:
        stream = sys.stderr if getattr(sys.stdout, "lost", False) else sys.stdout
        print(f"\nstopped at step {log.step} ({why}) and saved; go on with: python train.py --resume"
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
