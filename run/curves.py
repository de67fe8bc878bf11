"""Draws the curves of a run as curves.svg in its folder; tools/compare.py compares runs. Does not import torch.

    python -c "from run.curves import draw; draw('out')"      draws the picture again
"""

import json
import math
from contextlib import suppress
from html import escape
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from configurator import UserError, flat_values
from run.files import read_json, write_text

WIDTH, LEFT, INNER = 880, 76, 768  # pixels: the picture's width, a wide panel's left edge and width
COLORS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#06b6d4", "#ca8a04", "#ec4899", "#64748b")
KNOWN = {"step", "loss", "mean_loss", "val_loss", "lr", "grad_norm", "ms", "seconds", "tokens_per_s", "mfu"}
STYLE = """<style>
text { font: 12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #57606a }
.strong { font-weight: 600; fill: #1f2328 } .title { font-size: 17px } .page { fill: #fff; stroke: #d0d7de }
.grid { stroke: #e4e8ec } @media (prefers-color-scheme: dark) { text { fill: #9198a1 } .strong { fill: #f0f6fc }
.grid { stroke: #262c36 } .page { fill: #0d1117; stroke: #3d444d } }
</style>"""


class Curve(NamedTuple):
    points: list  # of (x, y), from low to high x
    color: str
    name: str = ""  # in the legend
    mark: tuple = ()  # a point to draw a ring around


def read_log(out_dir):
    """Returns the rows of log.jsonl, [{name: number}]; [] without a log. Adds "seconds", the training time so far."""
    path = Path(out_dir) / "log.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    rows, last_step, seconds = [], 0, 0.0
    for line in lines:
        with suppress(ValueError, AttributeError, RecursionError):  # a damaged line
            row = {k: v for k, v in json.loads(line).items() if type(v) in (int, float) and abs(v) < 1e100}
            if row.get("step", 0) >= 1 and "loss" in row:
                seconds += max(0, row.get("ms", 0) / 1000 * (row["step"] - last_step))
                last_step = row["step"]
                rows.append(row | {"seconds": seconds})
    return rows


def read_settings(out_dir):
    """Returns a run's settings, {name: value} with names such as vision.n_layer; {} if they can't be read."""
    with suppress(UserError, AttributeError, KeyError, TypeError, RecursionError):
        return flat_values(read_json(Path(out_dir) / "run.json")["settings"])
    return {}


def series(rows, name, instead="", x="step"):
    """Returns [(x, y)], where y is the row's value of `name`, or else of `instead`. Leaves out rows without either."""
    return [(row[x], row[name] if name in row else row[instead]) for row in rows if name in row or instead in row]


def draw(out_dir):
    """Writes curves.svg into a run's folder, unless its log has no rows."""
    if not (rows := read_log(out_dir)):
        return
    how = "mean of each interval" if "mean_loss" in rows[-1] else "last batch of each interval"
    val = series(rows, "val_loss")
    best = min(val, key=lambda point: point[1], default=())
    losses = [Curve(series(rows, "mean_loss", "loss"), COLORS[0], f"training ({how})"),
              Curve(val, COLORS[1], best and f"validation (best {best[1]:.4f} at step {best[0]:,})", best)]
    parts = [panel((LEFT, 116, INNER, 300), "Loss in nats", losses, loss_range(losses))]
    names = [name for name in ("lr", "grad_norm", *sorted(set().union(*rows) - KNOWN)) if series(rows, name)]
    for i, name in enumerate(names):
        title = {"lr": "learning rate", "grad_norm": "gradient norm"}.get(name, name.replace("val_", "validation "))
        box = (LEFT + i % 2 * (INNER + LEFT) / 2, 510 + i // 2 * 210, (INNER - LEFT) / 2, 120)
        curve = Curve(series(rows, name), COLORS[(2 + i) % len(COLORS)])
        parts.append(panel(box, title.replace("_", " ").capitalize(), [curve], logged=name == "grad_norm"))
    s, height = read_settings(out_dir), 470 + (len(names) + 1) // 2 * 210
    shown = [f"{name} {s[name]}" for name in ("task", "dataset", "n_layer", "n_embd", "optimizer", "seed") if name in s]
    about = ", ".join([*shown, f"{rows[-1]['step']:,} updates"])
    write_text(Path(out_dir) / "curves.svg", page(str(out_dir), about, parts, height))


def loss_range(curves, skip=0.1):
    """Returns (low, high) for the y axis of a list of Curve. Rare peaks, losses far above the first one, and the steep
    start may lie outside. skip: the share of the updates that counts as the start."""
    runs = [curve.points for curve in curves if curve.points]
    everything = sorted(y for points in runs for _, y in points)
    late = sorted(y for points in runs for x, y in points if x >= skip * points[-1][0])
    low, first = everything[0], max(points[0][1] for points in runs)
    high = min(late[math.ceil(0.99 * (len(late) - 1))], low + max(1.25 * (first - low), 0.5 * abs(low)))
    shows_all = len(everything) < 10 or everything[-1] - low < 1.6 * (high - low)
    return low, everything[-1] if shows_all else high


def ticks(low, high, count, logged=False):
    """Returns [(value, text)] of about `count` round numbers from low to high. logged: low, high and the returned
    values are log10s, but a text is the number itself. `count` is then ignored: the numbers are the powers of 10, and 3
    times each of them if high - low is at most 2.5."""
    if logged:
        steps = (1,) if high - low > 2.5 else (1, 3)
        found = [n * 10.0 ** power for power in range(math.floor(low), math.ceil(high)) for n in steps]
        return [(math.log10(value), f"{value:,g}") for value in found if low <= math.log10(value) <= high]
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(n * power for n in (1, 2, 5, 10) if n * power * count >= 0.99 * (high - low))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    values = [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(v, f"{v:,.{digits}f}" if digits < 5 and high < 1e7 else f"{v:.2g}".replace("e-0", "e-")) for v in values]


def panel(box, title, curves, limits=None, unit="updates", logged=False):
    """Returns SVG of axes and a list of Curve. box: left, top, width, height in pixels. unit: of x.

    limits: (low, high) of y; None: all y. logged: logarithmic y axis, if the largest value is over 10 times the least.
    """
    (left, top, width, height), points = box, [point for curve in curves for point in curve.points]
    values, longest = [y for _, y in points], max(x for x, _ in points)
    logged = logged and 0 < 10 * min(values) < max(values)
    scale = math.log10 if logged else float
    low, high = map(scale, limits or (min(values), max(values)))
    room = 0.07 * (high - low) or abs(low) or 1
    low, high = low - room, high + room

    def place(x, y):
        return width * x / longest, height * (high - scale(y)) / (high - low)

    out, x = [label(0, -14, title, "strong")], 8 * len(title) + 16
    for curve in (curve for curve in curves if curve.name):
        out.append(f'<path d="M{x} -18h18" stroke="{curve.color}" stroke-width="3"/>' + label(x + 24, -14, curve.name))
        x += 46 + 6.5 * len(curve.name)
    for value, words in ticks(low, high, height / 24, logged):
        y = height * (high - value) / (high - low)
        out.append(f'<path class="grid" d="M0 {y:.1f}H{width}"/>' + label(-9, y + 4, words, anchor="end"))
    for value, words in ticks(0, longest, min(width / 90, max(longest, 1))):
        out.append(label(width * value / longest, height + 18, words, anchor="middle"))
    out.append(label(width, height + 36, unit, anchor="end"))
    if above := sum(scale(y) > high for y in values):
        out.append(label(0, height + 36, f"{above:,} points lie above, up to {max(values):,.4g}"))
    field = "".join(line(curve, width, longest, place) for curve in curves)  # the inner svg clips them
    out.append(f'<svg x="-6" width="{width + 12}" height="{height}" viewBox="-6 0 {width + 12} {height}">{field}</svg>')
    return f'<g transform="translate({left} {top})">' + "\n".join(out) + "</g>"


def label(x, y, words, kind="", anchor="start"):
    """Returns SVG of a text. Characters that XML does not allow become question marks. kind: classes in STYLE."""
    words = escape("".join(c if c.isprintable() else "?" for c in words))
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def line(curve, width, longest, place):
    """Returns SVG of a Curve. If its points are crowded, draws their means, on a band from minimum to maximum.

    width: of the panel, in pixels. longest: the x at its right edge. place(x, y): returns a point's pixels in it.
    """
    crowded, bins = len(curve.points) > width / 2, {}
    for x, y in curve.points:
        bins.setdefault(int(x / longest * width / 2) if crowded else x, []).append((x, y))
    bins = [(fmean(x for x, _ in points), [y for _, y in points]) for points in bins.values()]
    middle, above, below = ([place(x, pick(ys)) for x, ys in bins] for pick in (fmean, max, min))
    path, band = (" ".join(f"{x:.1f},{y:.1f}" for x, y in points) for points in (middle, above + below[::-1]))
    out = f'<polygon fill="{curve.color}" opacity="0.25" points="{band}"/>' if crowded else ""
    out += f'<polyline fill="none" stroke="{curve.color}" stroke-width="1.8" stroke-linejoin="round" points="{path}"/>'
    dots = [(*at, f'r="2.5" fill="{curve.color}"') for at in middle if len(middle) <= 40]
    dots += [(*place(*curve.mark), 'r="5" fill="none" stroke="#ef4444" stroke-width="2"')] if curve.mark else []
    return out + "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" {look}/>' for x, y, look in dots)


def page(title, about, parts, height):
    """Returns the text of the SVG file. about: the line under the title. parts: strings of SVG, as from `panel`."""
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">
{STYLE}<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>
{label(24, 36, title, "strong title")}{label(24, 58, about)}
{"".join(parts)}</svg>"""
