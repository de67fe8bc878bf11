"""The difference between two recipes, seed by seed, and how sure it is: the arithmetic of tools/versus.py."""

import math
import statistics
from typing import NamedTuple

from run.curves import series


class Pair(NamedTuple):
    """The losses of the two runs of a seed, at the same step or the same second."""
    seed: int
    at: float
    a: float
    b: float


def at_equal_updates(a, b):
    """A list with a Pair for each seed: the losses at the last step at which all runs of a and b were evaluated.

    Returns [] if there is no such step. a, b: for each seed, the rows of its run's log, as `read_log` returns them.
    """
    curves = [[dict(series(rows, "val_loss")) for rows in runs] for runs in (a, b)]
    common = set.intersection(*(set(curve) for runs in curves for curve in runs))
    step = max(common, default=0)
    return [Pair(seed, step, x[step], y[step]) for seed, (x, y) in enumerate(zip(*curves), 1)] if common else []


def at_equal_time(a, b):
    """A list with a Pair for each seed: the losses at the second of the last evaluation of the run that ends first.

    The loss of the other run at that second is interpolated. Returns [] if a run of any seed was not evaluated by then.
    a, b: as in `at_equal_updates`.
    """
    pairs = []
    for seed, runs in enumerate(zip(a, b), 1):
        curves = [series(rows, "val_loss", x="seconds") for rows in runs]
        end = min(curve[-1][0] if curve else 0 for curve in curves)
        if not end or end < max(curve[0][0] for curve in curves):
            return []
        pairs.append(Pair(seed, end, *(between(curve, end) for curve in curves)))
    return pairs


def between(curve, x):
    """The value of a curve at x, on the straight line between the two points around it."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * ((x - x0) / (x1 - x0) if x1 > x0 else 1)
    return curve[0][1] if x <= curve[0][0] else curve[-1][1]


def interval(differences):
    """(mean, half the width of its 95 % confidence interval, which is None for a single difference)."""
    n = len(differences)
    half = t_quantile(n - 1) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else None
    return statistics.fmean(differences), half


def t_quantile(freedom, inside=0.95):
    """The t for which Student's T, with `freedom` degrees of freedom, lies in [-t, t] with probability `inside`."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, freedom) < inside else (low, middle)
    return high


def t_inside(t, freedom):
    """The probability that Student's T lies in [-t, t]: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    term = total = 1.0 if freedom % 2 == 0 else math.cos(angle)
    for k in range(2 + freedom % 2, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    if freedom % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0))


def verdict(pairs):
    """Text that says which of a and b is better, by how much, or that no difference is shown."""
    mean, half = interval([pair.b - pair.a for pair in pairs])
    if all(pair.a == pair.b for pair in pairs):
        return "no difference at all: the losses are the same numbers"
    winner = "b" if mean < 0 else "a"
    if half is None:
        return f"{winner} is better by {abs(mean):.4f} with this seed; use --seeds=5 to learn how sure that is"
    if abs(mean) > half:
        return f"{winner} is better by {abs(mean):.4f} \u00b1 {half:.4f}"
    return f"no difference is shown: b - a is {mean:+.4f} \u00b1 {half:.4f}"
