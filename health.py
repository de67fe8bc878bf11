"""Watches a run's numbers: a loss or gradient that is no number, a gradient too large, a loss that jumps.

The loop notes every update's loss and gradient norm, which stay on the device; about once a second, at every line of
the log and before every save it looks at all of them together. So the device is not held up, a bad step is told by its
very number, and no weights are saved after it.
"""

import math
import time

import torch

from configurator import UserError

SECONDS = 1.0  # between looks: also the longest that a signal to one of many workers goes unnoticed, beside an update
WINDOW = 100  # updates that the running mean of the loss goes back


class Health:
    """Stops the run at the first update that is not sound, on all ranks.

    scaled: whether the loss is scaled for float16, whose overflowing updates are skipped and thus harmless.
    mean: the running mean of the loss that an earlier `look` left.
    """

    def __init__(self, settings, task, step, scaled, mean=None):
        self.settings, self.task, self.step, self.scaled, self.mean = settings, task, step, scaled, mean
        self.noted, self.clock, self.next_look = [], time.perf_counter(), step + 1

    def note(self, loss, norm):
        """loss, norm: of the next update, as tensors; the loss is this rank's share."""
        self.noted.append((loss, norm))

    def due(self, step):
        return step >= self.next_look

    def look(self, world):
        """{loss, grad_norm} of the last update noted. Raises UserError at the first one that is not sound."""
        losses, norms = (torch.stack(column).tolist() for column in zip(*self.noted))
        *losses, seconds = world.sum(*losses, time.perf_counter() - self.clock)
        for loss, norm in zip(losses, norms):
            self.judge(loss / world.size, norm)
        pace = seconds / world.size / len(self.noted)  # of the ranks' clocks, so that all look again at the same step
        self.next_look = self.step + max(1, min(1000, int(SECONDS / max(pace, 1e-9))))
        self.noted, self.clock = [], time.perf_counter()
        return {"loss": losses[-1] / world.size, "grad_norm": norms[-1]}

    def judge(self, loss, norm):
        s = self.settings
        self.step += 1
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaled):
            self.stop(loss, norm, "try a lower --learning_rate, or --dtype=float32")
        if s.max_grad_norm and s.max_grad_norm < norm < math.inf:
            self.stop(loss, norm, f"max_grad_norm = {s.max_grad_norm}")
        mean = loss if self.mean is None else self.mean
        if s.max_loss_rise and loss > mean + s.max_loss_rise:
            self.stop(loss, norm, f"its running mean is {mean:.4f}, and max_loss_rise = {s.max_loss_rise}")
        self.mean = mean + (loss - mean) / min(self.step, WINDOW)

    def check(self, val_loss):
        """The validation loss if it is sound, else UserError."""
        if not math.isfinite(val_loss):
            raise UserError(f"val_loss is {val_loss} at step {self.step}: try a lower --learning_rate, or"
                            " --dtype=float32")
        return val_loss

    def stop(self, loss, norm, why):
        raise UserError(f"the loss is {loss:.4f} and the gradient's norm {norm:.4f} at step {self.step}: {why}; its"
                        f" batch is {self.task.name_batch(self.step - 1)}")
