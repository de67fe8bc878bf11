"""Does cross-attention look at the right word? Compares it with the links between words that a data set has.

    python train.py config/translate_bible.py
    python -m tools.alignments --out_dir=out/translate_bible         a minute of one CPU core

The model reads each verse with its right translation. Of each linked target word: which source word gets most of its
attention, and is it the linked one? The attention that a target word pays is the mean of its tokens', and the attention
that a source word gets is the sum of its tokens'; <eos> is no word. A word's attention can be taken in two ways:

    output    from the positions that predict its tokens
    input     from the positions one later, which read its tokens (better in Chen et al. 2020, worse here)

Prints the share of links that are found, for each head, the mean of each decoder block's heads, and the mean of all.
Then the one that is best on the validation split, with its share on the test split, beside what needs no attention: a
random word, the word at the same relative place, and the likeliest word by IBM's model 1 (Brown et al. 1993). Writes
these to alignments.json in the run's folder, and the map of a test verse to alignments.png, with the links in red.

Axes: L decoder blocks, H heads, K ways to take the attention (L * H heads, L blocks, all), T target positions, S source
positions, V and W words of a target and of a source.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, check_run, from_command_line, one_line_errors


@dataclass(frozen=True)
class Settings:
    out_dir: str = "out"  # the folder of a run, or of one checkpoint
    checkpoint: Literal["best", "last"] = "best"  # which checkpoint of the run: best or last
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps

    def __post_init__(self):
        check_run(self.out_dir)


if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, _ = from_command_line(Settings, __doc__)

import numpy as np
import torch
import torch.nn.functional as F

from inside.attention import cross_attention
from machine.device import pick_device
from machine.distributed import World
from machine.terminal import watched
from run.files import write_json
from run.pictures import draw_map, save_picture
from sources.known import locate
from tasks.loading import load
from tasks.translation import TranslationTask, length_batches

SHIFTS = {"output": 0, "input": 1}  # how much later than the position that predicts a token
AT_ONCE = 4096  # tokens of a batch: it limits memory
ROUNDS = 5  # of model 1
MOST_WORDS = 15  # of the verse in the picture


# ----------------------------------------------------------------------------------------------------------------------
# Attention between words

def words_of(tokenizer, text, ids):
    """The number of the word that each token is in, int64 (tokens,). ids: of the text. Words are between spaces.

    Raises UserError if a token reaches over a space.
    """
    parts = [tokenizer.encode(" " * (i > 0) + word) for i, word in enumerate(text.split())]
    if not np.array_equal(np.concatenate(parts), ids):
        raise UserError(f"{text!r:.60}: its tokens reach over spaces, so their attention can't be told apart by words")
    return torch.from_numpy(np.repeat(np.arange(len(parts)), [len(part) for part in parts]))


def between_words(weights, source, target, shift):
    """Attention from target words to source words, (..., V, W), of the weights (..., T, S) of `cross_attention`.

    source, target: from `words_of`; position t predicts token t of the target. shift: see SHIFTS.
    """
    of_source = F.one_hot(source).float()  # (S, W)
    of_target = F.one_hot(target).float()  # (T, V)
    looks = weights[..., shift:shift + len(target), :len(source)]  # without <eos> and padding
    return (of_target / of_target.sum(0)).mT @ looks @ of_source


def in_all_ways(weights):
    """(L, H, V, W) -> (K, V, W): each head, the mean of each block, the mean of all, as in `names_of_ways`."""
    return torch.cat((weights.flatten(0, 1), weights.mean(1), weights.mean((0, 1))[None]))


def names_of_ways(config):
    blocks = range(1, config.n_layer + 1)
    heads = [f"block {block}, head {head}" for block in blocks for head in range(1, config.n_head + 1)]
    return [*heads, *(f"block {block}, mean" for block in blocks), "mean of all"]


def attention_of(task, model, split, rows):
    """Yields (row, {a key of SHIFTS: attention (K, V, W)}) for some rows of a split, in the order of their lengths."""
    rows = np.asarray(rows)
    for batch in watched(length_batches(task.lengths[split][rows].max(1), AT_ONCE), f"reading {split}"):
        arguments, _ = task.gather(split, rows[batch])
        weights = cross_attention(model, arguments["source"], arguments["lengths"], arguments["tokens"]).cpu()
        for i, row in enumerate(rows[batch]):
            texts, ids = task.dataset.rows[split][row], task.dataset.ids(split, row)
            source = words_of(task.source_tokenizer, texts["source"], ids[0])
            target = words_of(task.tokenizer, texts["target"], ids[1])
            yield row, {name: in_all_ways(between_words(weights[:, i], source, target, shift))
                        for name, shift in SHIFTS.items()}


def shares(task, model, split, rows):
    """{a key of SHIFTS: the share of the rows' links that is found in each way, a list (K,)}."""
    found, count = dict.fromkeys(SHIFTS, 0), 0
    for row, ways in attention_of(task, model, split, rows):
        source, target = torch.tensor(task.dataset.rows[split][row]["links"]).T
        count += len(source)
        for name, attention in ways.items():
            found[name] += (attention.argmax(-1)[:, target] == source).sum(1)
    return {name: (hits / count).tolist() for name, hits in found.items()}


# ----------------------------------------------------------------------------------------------------------------------
# What needs no attention

def floors(rows, lexicon):
    """{name: share of the links of the rows, dicts, that is found by chance, by place, by `Lexicon`}."""
    found = []
    for row in rows:
        source, target = row["source"].split(), row["target"].split()
        for i, j in row["links"]:
            place = same_place(j, len(target), len(source))
            found.append((1 / len(source), place == i, lexicon.choose(source, target[j], place) == i))
    return dict(zip(("a random word", "the same relative place", "IBM's model 1"), np.mean(found, axis=0).tolist()))


def same_place(word, count, other_count):
    """The word at the same relative place among other_count words as `word` among count."""
    return round(word * (other_count - 1) / max(1, count - 1))


class Lexicon:
    """p(target word | source word), learned from a list of rows by IBM's model 1, without case and punctuation.

    Each target word comes from one source word of its sentence, or from none, "", all of them equally likely before.
    """

    def __init__(self, rows):
        self.ids = {}  # of the words of both languages
        ids = [[[self.id_of(word) for word in (*extra, *row[side].split())] for row in rows]
               for side, extra in (("source", ("",)), ("target", ()))]
        self.size = len(self.ids)
        cells = [np.add.outer(np.array(source) * self.size, target).T.ravel() for source, target in zip(*ids)]
        self.pairs, cells = np.unique(np.concatenate(cells), return_inverse=True)
        widths = np.concatenate([np.full(len(target), len(source)) for source, target in zip(*ids)])
        tokens = np.repeat(np.arange(len(widths), dtype=np.int32), widths)  # which target word of the text a cell is of
        self.p = np.ones(len(self.pairs))
        for _ in watched(range(ROUNDS), "model 1"):
            parts = self.p[cells]
            parts /= np.bincount(tokens, parts)[tokens]
            counts = np.bincount(cells, parts)
            self.p = counts / np.bincount(self.pairs // self.size, counts)[self.pairs // self.size]

    def id_of(self, word):
        return self.ids.setdefault(plain(word), len(self.ids))

    def choose(self, source, word, otherwise):
        """The number of the source word, of a list, that most likely gave a target word, or if none did `otherwise`."""
        target = self.ids.get(plain(word))
        if target is None:
            return otherwise
        pairs = [self.ids.get(plain(one), -1) * self.size + target for one in source]
        places = np.searchsorted(self.pairs, pairs).clip(max=len(self.pairs) - 1)
        p = np.where(self.pairs[places] == pairs, self.p[places], 0)
        return int(p.argmax()) if p.any() else otherwise


def plain(word):
    return re.sub(r"\W", "", word.lower())


# ----------------------------------------------------------------------------------------------------------------------

def main(settings):
    device = pick_device(settings.device)
    task, model, config = load(settings.out_dir, device, which=settings.checkpoint)
    if not isinstance(task, TranslationTask):
        raise UserError(f"out_dir = {settings.out_dir}: its model does not translate; see config/translate_bible.py")
    task.open(locate(config["dataset"]), World(0, 1, device))
    task.fit(model)
    rows = {split: [row for row in task.rows[split] if task.dataset.rows[split][row].get("links")]
            for split in ("val", "test")}
    if not all(rows.values()):
        raise UserError(f"{config['dataset']} has no links between words: take a model trained on bible_en_es")
    result = measure(task, model, rows)
    best, folder = result["best"], Path(settings.out_dir)
    print("\n".join(table(result)))
    write_json(folder / "alignments.json", {"step": config["step"], "checkpoint": settings.checkpoint, **result})
    print(f"wrote {folder / 'alignments.json'}")
    print(draw(task, model, rows["test"], best, folder / "alignments.png"))


def measure(task, model, rows):
    """The dict in alignments.json. rows: {split: the rows that have links}."""
    texts = {split: [task.dataset.rows[split][row] for row in rows[split]] for split in rows}
    names, found = names_of_ways(model.config), {}
    for split in rows:
        found[split] = {name: dict(zip(names, part)) for name, part in shares(task, model, split, rows[split]).items()}
    word, way = max(((word, way) for word in SHIFTS for way in names), key=lambda pair: found["val"][pair[0]][pair[1]])
    best = {"word": word, "way": way, "val": found["val"][word][way], "test": found["test"][word][way]}
    links = {split: sum(len(row["links"]) for row in texts[split]) for split in rows}
    return {"links": links, "found": found, "best": best,
            "floors": floors(texts["test"], Lexicon(task.dataset.rows["train"]))}


def table(result):
    """The lines of a table of the dict in alignments.json."""
    links, best = result["links"], result["best"]
    yield f"share of {links['val']:,} validation links and {links['test']:,} test links found, %"
    columns = [(split, name) for split in ("val", "test") for name in SHIFTS]
    yield f"{'':26}" + "".join(f"{f'{split}, {name}':>14}" for split, name in columns)
    for way in result["found"]["val"]["input"]:
        yield f"{way:26}" + "".join(f"{100 * result['found'][split][name][way]:14.1f}" for split, name in columns)
    yield "on test:"
    yield f"{best['way'] + ', ' + best['word']:26}{100 * best['test']:14.1f}   the best on validation"
    yield from (f"{name:26}{100 * share:14.1f}" for name, share in result["floors"].items())


def draw(task, model, rows, best, path):
    """Writes the map of a short verse with many links, of some rows of the test split. Returns a line that says so."""
    texts = task.dataset.rows["test"]
    short = [row for row in rows if len(texts[row]["target"].split()) <= MOST_WORDS] or rows
    row = max(short, key=lambda row: len(texts[row]["links"]))
    (_, ways), = attention_of(task, model, "test", [row])
    weights = ways[best["word"]][names_of_ways(model.config).index(best["way"])]
    words = [texts[row][side].split() for side in ("target", "source")]
    return save_picture(draw_map(weights, *words, marks=[(j, i) for i, j in texts[row]["links"]]), path)


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS)
