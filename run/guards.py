"""What ends a run early: numbers that are not sound, signals, the clock.

The numbers of an update stay on the device, which is not held up. They are read together about once a second, at every
line of the log and before every save. So nothing is saved after an unsound update, and the error names the very step.
"""

import math
import signal
import time

import torch

from configurator import UserError

SECONDS = 1.0  # between two reads. A signal to one of many workers goes unnoticed at most that long and an update
WINDOW = 100  # updates that the running mean of the loss goes back
SPARE = 75  # exit status of a run that saved to be taken up again later: EX_TEMPFAIL, "try again"
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
if hasattr(signal, "SIGUSR1"):  # Windows has none; a cluster sends it ahead of its SIGTERM
    SIGNALS[signal.SIGUSR1] = SPARE


class Guard:
    """Stops the run at the first unsound update, on all ranks; inside its `with` block it notes signals.

    step: how many updates the run has made. scaled: True if the loss is scaled for float16, whose overflowing updates
    are skipped and harmless. mean: the running mean of the loss that an earlier Guard left, or None.
    where(step): text that names the batch of the update that ended at `step`.
    """

    def __init__(self, settings, world, step, scaled, mean, where):
        self.settings, self.world, self.where = settings, world, where
        self.step, self.scaled, self.mean = step, scaled, mean
        self.updates, self.shown, self.clock, self.next_read = [], {}, time.perf_counter(), step + 1
        self.signalled = 0
        self.deadline = time.monotonic() + 60 * settings.max_minutes if settings.max_minutes else math.inf

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        """Takes the first signal; a second one ends the process.

        Not so under torchrun: it passes on signals that its workers may have got already, and ends those that linger.
        """
        self.signalled = self.signalled or SIGNALS[number]
        if self.world.size == 1 and SIGNALS[number] != SPARE:
            self.__exit__()

    @property
    def status(self):
        """The exit status if the run is to end early, else 0."""
        return self.signalled or (SPARE if time.monotonic() > self.deadline else 0)

    def record(self, loss, norm, shown):
        """Takes the numbers of the next update, as tensors without dimensions.

        loss: this rank's share of it. norm: the gradient's, the same on all ranks. shown: {name: this rank's share}.
        """
        self.updates.append((loss, norm))
        self.shown = shown

    def due(self, step):
        """True if it is time to read: on all ranks at the same step."""
        return step >= self.next_read

    def read(self):
        """{"loss", "grad_norm", and what was shown} of the last update, summed over the ranks. Waits for the device.

        Raises UserError at the first unsound update since the last read.
        """
        losses, norms = zip(*self.updates)
        n = len(norms)
        mine = torch.stack((*norms, *losses, *self.shown.values())).tolist()
        norms = mine[:n]
        *sums, seconds = self.world.sum(*mine[n:], time.perf_counter() - self.clock)
        for loss, norm in zip(sums, norms):
            self.require_sound(loss, norm)
        pace = seconds / self.world.size / n  # the mean of the ranks' clocks: all read again at the same step
        self.next_read = self.step + max(1, min(1000, int(SECONDS / max(pace, 1e-9))))
        self.updates, self.clock = [], time.perf_counter()
        return {"loss": sums[n - 1], "grad_norm": norms[-1], **dict(zip(self.shown, sums[n:]))}

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


def require_finite(name, value, step):
    """Raises UserError if the value, measured at `step`, is no number."""
    if not math.isfinite(value):
        raise UserError(f"{name} is {value} at step {step}: try a lower --learning_rate, or --dtype=float32")
