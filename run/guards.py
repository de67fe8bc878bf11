"""What stops a run early: a bad loss or gradient, a signal, the time limit, an output that was closed.

Losses and norms stay on the device, so that training does not wait for them. They are read together about once a
second, for every log line and before every save. So no bad update is saved, and the error names its exact step.
"""

import math
import os
import signal
import sys
import time

import torch

from configurator import UserError

SECONDS = 1.0  # between two reads; also how long a signal to one of several workers may go unnoticed
WINDOW = 100  # updates in the running mean of the loss
RETRY = 75  # exit status of a run that saved and should be resumed: EX_TEMPFAIL
LOST = 141  # exit status of a run whose output was closed, as in a shell after SIGPIPE
REASONS = {129: "SIGHUP", 130: "Ctrl-C", LOST: "the output was closed", 143: "SIGTERM", RETRY: "SIGUSR1"}
SIGNALS = {getattr(signal, name): status  # Windows lacks two; clusters send SIGUSR1 before SIGTERM
           for name, status in (("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", RETRY))
           if hasattr(signal, name)}


class Guard:
    """Raises UserError at the first bad update, on all ranks; inside its `with` block it handles signals.

    step: updates that the run has made. scaled: True for float16 with a gradient scaler, which skips updates that
    overflow, so an infinite norm does no harm. saved: the `state` of the Guard of the resumed run, or {}.
    where(step): returns, in words, which rows update number `step` took.
    """

    def __init__(self, settings, world, step, scaled, saved, where):
        self.settings, self.world, self.where = settings, world, where
        self.step, self.scaled, self.mean = step, scaled, saved.get("mean_loss")
        self.total, self.count = saved.get("losses", (0.0, 0))  # losses since the last log row
        self.updates, self.shown, self.clock, self.next_read = [], {}, time.perf_counter(), step + 1
        self.signalled, self.saving = 0, False
        self.deadline = time.monotonic() + 60 * settings.max_minutes if settings.max_minutes else math.inf
        self.note_save()

    def __enter__(self):
        numbers = [number for number in SIGNALS
                   if SIGNALS[number] != 129 or signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self.handlers = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        """Remembers the first signal. After Ctrl-C or SIGTERM, the next signal ends the process at once.

        But not after SIGHUP, which the system and the shell both send. And not under torchrun: it forwards signals that
        its workers may already have received, and kills slow workers itself.
        """
        self.signalled = self.signalled or SIGNALS[number]
        if self.world.size == 1 and SIGNALS[number] in (130, 143):
            self.__exit__()
            if os.isatty(2):
                os.write(2, b"\nsaving after this update; Ctrl-C again ends the run at once\n")

    @property
    def status(self):
        """The exit status if the run has to stop early, else 0."""
        return self.signalled or lost_output() or (RETRY if time.monotonic() > self.deadline else 0)

    def reason(self, status):
        """Returns why the run stops early with this exit status; "" for another status."""
        timed = status == RETRY and time.monotonic() > self.deadline
        return f"--max_minutes={self.settings.max_minutes:g}" if timed else REASONS.get(status, "")

    def note_save(self):
        """Restarts the clock for --save_minutes."""
        self.save_at = time.monotonic() + 60 * (self.settings.save_minutes or math.inf)

    @property
    def state(self):
        """What the Guard of the resumed run needs: {name: plain values}."""
        return {"mean_loss": self.mean, "losses": (self.total, self.count)}

    def record(self, loss, norm, shown):
        """Stores the results of an update until `read`, as scalar tensors; of `shown`, only the last update's.

        loss, shown {name: tensor}: this rank's parts of sums over all ranks. norm: of the gradient of all ranks.
        """
        self.updates.append((loss, norm))
        self.shown = shown

    def due(self, step):
        """Returns True if it is time to call `read`, about once in SECONDS; all ranks agree."""
        return step >= self.next_read

    def read(self, logging=True):
        """Returns the last update's loss, grad_norm and shown values, summed over the ranks, and mean_loss.

        mean_loss is over all updates since the last read with `logging`, which marks reads for a log row. Also sets
        `saving`, the same on all ranks: True if --save_minutes are over. Waits for the device. Raises UserError for the
        first bad update since the last read.
        """
        losses, norms = zip(*self.updates)
        n = len(norms)
        mine = torch.stack((*norms, *losses, *self.shown.values())).tolist()
        norms = mine[:n]
        late = self.world.is_main and time.monotonic() > self.save_at
        *sums, seconds, late = self.world.sum(*mine[n:], time.perf_counter() - self.clock, late)
        self.saving = late > 0
        for loss, norm in zip(sums, norms):
            self.check_update(loss, norm)
        pace = seconds / self.world.size / n  # mean over the ranks, so that next_read is the same on all
        self.next_read = self.step + max(1, min(1000, int(SECONDS / max(pace, 1e-9))))
        self.updates, self.clock = [], time.perf_counter()
        mean = self.total / self.count
        if logging:
            self.total, self.count = 0.0, 0
        return {"loss": sums[n - 1], "mean_loss": mean, "grad_norm": norms[-1], **dict(zip(self.shown, sums[n:]))}

    def check_update(self, loss, norm):
        """Counts an update. Raises UserError if loss or norm is too large or not finite (a scaled norm may be)."""
        s = self.settings
        self.step += 1
        mean = loss if self.mean is None else self.mean
        why = ""
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaled):
            why = "try a lower --learning_rate, or --dtype=float32"
        elif s.max_grad_norm and s.max_grad_norm < norm < math.inf:
            why = f"max_grad_norm = {s.max_grad_norm}"
        elif s.max_loss_rise and loss > mean + s.max_loss_rise:
            why = f"the running mean of the loss is {mean:.4f}, and max_loss_rise = {s.max_loss_rise}"
        if why:
            raise UserError(f"the loss is {loss:.4f} and the gradient norm {norm:.4f} at step {self.step}: {why}; the"
                            f" batch is {self.where(self.step)}")
        self.mean = mean + (loss - mean) / min(self.step, WINDOW)
        self.total, self.count = self.total + loss, self.count + 1


def require_finite(name, value, step):
    """Raises UserError if the value, measured at `step`, is NaN or infinite."""
    if not math.isfinite(value):
        raise UserError(f"{name} is {value} at step {step}: try a lower --learning_rate, or --dtype=float32")


# ----------------------------------------------------------------------------------------------------------------------
# Outputs that are closed before the run ends: by closing the terminal, or by `| head`

class Output:
    """A text stream that sets `lost` when writing fails, and silently drops everything from then on."""

    def __init__(self, stream):
        self.stream, self.lost = stream, False

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, work, *arguments):
        try:
            work(*arguments)
        except OSError:
            self.lost = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # where buffered text goes, too


def guard_outputs():
    """Makes sys.stdout and sys.stderr drop text instead of raising an error once they are closed. See `lost_output`."""
    sys.stdout, sys.stderr = (stream and Output(stream) for stream in (sys.stdout, sys.stderr))


def lost_output():
    """Returns the exit status of a run whose output was closed, or 0 if it is open."""
    return LOST if any(getattr(stream, "lost", False) for stream in (sys.stdout, sys.stderr)) else 0
