"""What ends a run early: numbers that are not sound, signals, the clock, an output that nobody reads any more.

The numbers of an update stay on the device, which is not held up. They are read together about once a second, at every
line of the log and before every save. So nothing is saved after an unsound update, and the error names the very step.
"""

import math
import os
import signal
import sys
import time

import torch

from configurator import UserError

SECONDS = 1.0  # between two reads. A signal to one of many workers goes unnoticed at most that long and an update
WINDOW = 100  # updates that the running mean of the loss goes back
SPARE = 75  # exit status of a run that saved to be taken up again later: EX_TEMPFAIL, "try again"
LOST = 141  # exit status of a run whose output was closed, as a shell has it for SIGPIPE
REASONS = {129: "SIGHUP", 130: "Ctrl-C", LOST: "the output was closed", 143: "SIGTERM", SPARE: "SIGUSR1"}
SIGNALS = {getattr(signal, name): status  # Windows lacks two; a cluster sends SIGUSR1 ahead of its SIGTERM
           for name, status in (("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", SPARE))
           if hasattr(signal, name)}


class Guard:
    """Stops the run at the first unsound update, on all ranks; inside its `with` block it notes signals.

    step: how many updates the run has made. scaled: True if the loss is scaled for float16, whose overflowing updates
    are skipped and harmless. saved: the `state` that an earlier Guard left, or {}.
    where(step): text that names the batch of the update that ended at `step`.
    """

    def __init__(self, settings, world, step, scaled, saved, where):
        self.settings, self.world, self.where = settings, world, where
        self.step, self.scaled, self.mean = step, scaled, saved.get("mean_loss")
        self.total, self.count = saved.get("losses", (0.0, 0))  # of the updates since the last row of the log
        self.updates, self.shown, self.clock, self.next_read = [], {}, time.perf_counter(), step + 1
        self.signalled, self.saving = 0, False
        self.deadline = time.monotonic() + 60 * settings.max_minutes if settings.max_minutes else math.inf
        self.note_save()

    def __enter__(self):
        numbers = [number for number in SIGNALS
                   if SIGNALS[number] != 129 or signal.getsignal(number) != signal.SIG_IGN]  # as nohup has it
        self.handlers = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        """Takes the first signal; a second one ends the process.

        Not so after SIGHUP: the system and the shell both send it. Nor under torchrun: it passes on signals that its
        workers may have got already, and ends those that linger.
        """
        self.signalled = self.signalled or SIGNALS[number]
        if self.world.size == 1 and SIGNALS[number] in (130, 143):
            self.__exit__()

    @property
    def status(self):
        """The exit status if the run is to end early, else 0."""
        return self.signalled or lost_output() or (SPARE if time.monotonic() > self.deadline else 0)

    def reason(self, status):
        """In words, why the run ends early with this exit status."""
        timed = status == SPARE and time.monotonic() > self.deadline
        return f"--max_minutes={self.settings.max_minutes:g}" if timed else REASONS.get(status, "")

    def note_save(self):
        """Counts the minutes to the next save that is due by time from here."""
        self.save_at = time.monotonic() + 60 * (self.settings.save_minutes or math.inf)

    @property
    def state(self):
        """What a Guard of the resumed run needs: plain values, by name."""
        return {"mean_loss": self.mean, "losses": (self.total, self.count)}

    def record(self, loss, norm, shown):
        """Takes the numbers of the next update, as tensors without dimensions.

        loss: this rank's share of it. norm: the gradient's, the same on all ranks. shown: {name: this rank's share}.
        """
        self.updates.append((loss, norm))
        self.shown = shown

    def due(self, step):
        """True if it is time to read: on all ranks at the same step."""
        return step >= self.next_read

    def read(self, logging=True):
        """{"loss", "mean_loss", "grad_norm", and what was shown}, summed over the ranks. Waits for the device.

        All are of the last update but mean_loss: that of all updates since the last read for a row, which this one is
        if `logging`. Sets `saving`, on all ranks alike: whether a save is due by time. Raises UserError at the first
        unsound update since the last read.
        """
        losses, norms = zip(*self.updates)
        n = len(norms)
        mine = torch.stack((*norms, *losses, *self.shown.values())).tolist()
        norms = mine[:n]
        late = self.world.is_main and time.monotonic() > self.save_at
        *sums, seconds, late = self.world.sum(*mine[n:], time.perf_counter() - self.clock, late)
        self.saving = late > 0
        for loss, norm in zip(sums, norms):
            self.require_sound(loss, norm)
        pace = seconds / self.world.size / n  # the mean of the ranks' clocks: all read again at the same step
        self.next_read = self.step + max(1, min(1000, int(SECONDS / max(pace, 1e-9))))
        self.updates, self.clock = [], time.perf_counter()
        mean = self.total / self.count
        if logging:
            self.total, self.count = 0.0, 0
        return {"loss": sums[n - 1], "mean_loss": mean, "grad_norm": norms[-1], **dict(zip(self.shown, sums[n:]))}

    def require_sound(self, loss, norm):
        """Counts an update; raises UserError if its loss or norm is no number, too large, or a jump."""
        s = self.settings
        self.step += 1
        mean = loss if self.mean is None else self.mean
        why = ""
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaled):
            why = "try a lower --learning_rate, or --dtype=float32"
        elif s.max_grad_norm and s.max_grad_norm < norm < math.inf:
            why = f"max_grad_norm = {s.max_grad_norm}"
        elif s.max_loss_rise and loss > mean + s.max_loss_rise:
            why = f"its running mean is {mean:.4f}, and max_loss_rise = {s.max_loss_rise}"
        if why:
            raise UserError(f"the loss is {loss:.4f} and the gradient's norm {norm:.4f} at step {self.step}: {why}; its"
                            f" batch is {self.where(self.step)}")
        self.mean = mean + (loss - mean) / min(self.step, WINDOW)
        self.total, self.count = self.total + loss, self.count + 1


def require_finite(name, value, step):
    """Raises UserError if the value, measured at `step`, is no number."""
    if not math.isfinite(value):
        raise UserError(f"{name} is {value} at step {step}: try a lower --learning_rate, or --dtype=float32")


# ----------------------------------------------------------------------------------------------------------------------
# Outputs that end before the run does: a terminal that was closed, `| head`

class Output:
    """A text stream that drops what comes once it can't be written any more, and notes that."""

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
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # and so does the rest in its buffer


def guard_outputs():
    """From here on sys.stdout and sys.stderr raise nothing when they are closed; `lost_output` tells of it."""
    sys.stdout, sys.stderr = (stream and Output(stream) for stream in (sys.stdout, sys.stderr))


def lost_output():
    """The exit status of a run whose output was closed, if it was, else 0."""
    return LOST * any(getattr(stream, "lost", False) for stream in (sys.stdout, sys.stderr))
