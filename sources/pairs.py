"""Makes a data set of pairs, a sentence and its translation: {train,val,test}.jsonl, their token ids, meta.json.

    python prepare.py en.txt it.txt --languages=en,it --name=mine     two files: line N translates line N
    python prepare.py pairs.tsv --languages=en,it                     .tsv, .csv, .jsonl, .parquet: columns en and it
    python prepare.py pairs.csv --columns=question,answer             columns of other names; 1,2 if none are named
    python prepare.py memory.tmx --languages=en,it                    a translation memory
    python prepare.py libreoffice_help                                a known one: see corpora.py
    python prepare.py pairs.tsv --languages=en,it --tokenizer=word:2 --shared=False     a vocabulary of words for each

The source comes first. A hash decides whether a pair is for training, validation or test, so it stays where it is when
others are added. It is the hash of the row's `page`, if the table has such a column: whole pages are held out. Else it
is the hash of the source in lower case, with its numbers as 0 and without punctuation, so that near-copies are on the
same side. In both cases a sentence for validation or test is left out if a near-copy is in training.

All pairs are in memory at once: about 1 GB, and six minutes of one CPU core, for a million.
"""

import collections
import functools
import hashlib
import itertools
import json
import re
import reprlib
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

import tokenizer as tokenizers
from configurator import UserError
from machine.terminal import printable, progress
from sources.documents import READERS
from sources.texts import finish, id_type, read_file, sample, writing

SPLITS = ("train", "val", "test")
SIDES = ("source", "target")
FILES = (".jsonl", "_source.bin", "_target.bin", "_lengths.bin")  # of each split
USUAL_SIZE = 4000  # tokens of a BPE if none is named
SPECIAL = ("<pad>", "<bos>", "<eos>")  # a vocabulary of words has <unk> too
MARKUP = ("bpt", "ept", "ph", "it", "ut")  # TMX: elements inside a sentence that hold another program's codes
NO_SPACES = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"  # Thai, Lao, Khmer, Japanese, Chinese
WORD = re.compile(rf"[{NO_SPACES}]|[^\s{NO_SPACES}]+")


class How(NamedTuple):
    """How pairs are prepared; prepare.py's settings of the same names."""
    languages: str = ""  # two codes, such as "en,it", source first
    tokenizer: str = ""  # bpe:SIZE, word:TIMES, char and byte (both one token per byte), or a model's folder
    # "": bpe:4000, or for a small text a BPE of as many tokens as it yields
    shared: bool = True  # one vocabulary for both languages
    val_fraction: float = 0.1  # the share of pairs for validation, and once more for test
    min_words: int = 1  # of a source
    max_words: int = 100  # of either side


def prepare(rows, folder, how, source, revision=""):
    """Writes the data set of an iterable of rows into the folder, and returns the dict of meta.json.

    rows: dicts with source, target (texts), and perhaps page, or split. A row with split "val" or "test" is taken as it
    is, without any check: it belongs to a published test. Raises UserError if a split would be empty.
    """
    languages = two(how.languages, "languages")
    with writing(folder):
        chosen, left_out = choose(rows, how)
        splits = {split: [row for row in chosen if row["split"] == split] for split in SPLITS}
        for split, found in splits.items():
            if not found:
                raise UserError(f"{source}: none of {len(chosen):,} pairs is for {split} (left out:"
                                f" {words_for(left_out)}): add pairs, or change --val_fraction={how.val_fraction}")
        vocabularies = learn(how, splits["train"])
        wide = [vocabulary for vocabulary in vocabularies.values() if id_type(vocabulary) == "uint32"]
        target, side = vocabularies["tokenizer"], vocabularies.get("tokenizer_source", vocabularies["tokenizer"])
        meta = {"kind": "pairs", "source": source, "revision": revision, "sha256": "", "source_language": languages[0],
                "target_language": languages[1], "tokenizer": target.kind, "shared": target is side,
                "vocab_size": target.vocab_size, "source_vocab_size": side.vocab_size,
                "dtype": "uint32" if wide else "uint16", "left_out": left_out}
        digest = hashlib.sha256()
        for split in SPLITS:
            meta[f"{split}_rows"] = len(splits[split])
            meta[f"{split}_tokens"] = write_split(folder, split, splits[split], (side, target), meta["dtype"], digest)
        meta["sha256"] = digest.hexdigest()
        for name, vocabulary in vocabularies.items():
            vocabulary.save(folder / f"{name}.json.new")
        files = [f"{split}{end}" for split in SPLITS for end in FILES]
        return finish(folder, (*files, *(f"{name}.json" for name in vocabularies)), meta)


def two(text, setting):
    """The two names in a setting such as languages = en,it. Raises UserError if there are not two."""
    names = [name.strip() for name in text.split(",")]
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise UserError(f"{setting} = {text}: must be two names, the source's first, such as --{setting}=en,it")
    return names


# ----------------------------------------------------------------------------------------------------------------------
# Which pairs are used, and what for

def choose(rows, how):
    """Returns (rows, {reason: number of rows left out}). Each row has a split, its sides have single spaces."""
    if not 0 < how.val_fraction < 0.5:
        raise UserError(f"val_fraction = {how.val_fraction}: must lie between 0 and 0.5: the test part is as large")
    left_out, kept, seen, how_split = collections.Counter(), [], set(), "by a hash of the source"
    for row in rows:
        row = {**row, "source": " ".join(row["source"].split()), "target": " ".join(row["target"].split())}
        pair = row["source"], row["target"]
        if row.get("split", "train") == "train":
            if reason := why_not(*pair, how) or ("duplicate" if pair in seen else ""):
                left_out[reason] += 1
                continue
            seen.add(pair)
        if "split" in row:
            how_split = "as their publisher split them"
        else:
            how_split = "whole pages" if "page" in row else how_split
            row["split"] = split_of(row.get("page") or normal(row["source"]), how.val_fraction)
        kept.append(row)
    if "publisher" not in how_split:
        kept = without_copies(kept, left_out)
    print(printable(f"pairs: {len(kept):,}; left out: {words_for(left_out)}"), flush=True)
    print(f"validation and test: {how_split}", flush=True)
    return kept, dict(left_out)


def why_not(source, target, how):
    """A word that says why a pair is left out; "" if it is used."""
    if not source or not target:
        return "empty"
    if source == target:
        return "identical"
    size, other = len(WORD.findall(source)), len(WORD.findall(target))
    return "short" if size < how.min_words else "long" if max(size, other) > how.max_words else ""


def words_for(left_out):
    names = {"empty": "empty on one side", "identical": "identical on both sides", "short": "too short",
             "long": "too long", "duplicate": "twice the same",
             "copy": "for validation or test but almost the same as one for training"}
    return ", ".join(f"{count:,} {names[reason]}" for reason, count in left_out.items()) or "none"


def normal(text):
    """The text in lower case, with numbers as 0, without punctuation. Texts that share this are near-copies."""
    return " ".join(re.findall(r"\w+", re.sub(r"\d+", "0", text.lower()))) or text


def split_of(group, val_fraction):
    """The split of a page, or of a normal sentence: its hash decides."""
    place = place_of(group)
    return "val" if place < val_fraction else "test" if place < 2 * val_fraction else "train"


def place_of(text):
    """A number from 0 to 1: the text's SHA-256, as a fraction."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64


def without_copies(rows, left_out):
    """The rows without those for validation that are nearly in training, and those for test that are nearly in either.

    Adds their number to left_out["copy"].
    """
    seen = {split: {normal(row["source"]) for row in rows if row["split"] == split} for split in ("train", "val")}
    earlier = {"train": set(), "val": seen["train"], "test": seen["train"] | seen["val"]}
    kept = [row for row in rows if normal(row["source"]) not in earlier[row["split"]]]
    if len(kept) < len(rows):
        left_out["copy"] = len(rows) - len(kept)
    return kept


# ----------------------------------------------------------------------------------------------------------------------
# Token ids

def learn(how, rows):
    """The vocabularies, learned from training rows: {"tokenizer": of the target, and unless shared "tokenizer_source"}.

    A model's folder has its own: one, or two.
    """
    name = f"bpe:{256 + len(SPECIAL)}" if how.tokenizer in ("char", "byte") else how.tokenizer
    path = tokenizers.find(name) if name and not name.startswith(("bpe:", "word:")) else None
    if path and not how.shared:
        raise UserError(f"shared = False: does nothing beside --tokenizer={how.tokenizer}, a model's; leave it out")
    if path:
        found = {part: tokenizers.load(path.with_name(f"{part}.json")) for part in ("tokenizer", "tokenizer_source")
                 if path.with_name(f"{part}.json").exists()}
    else:
        parts = {"tokenizer": SIDES} if how.shared else {"tokenizer": ("target",), "tokenizer_source": ("source",)}
        found = {part: tokenizers.build(name, None, functools.partial(texts_of, rows, sides), SPECIAL) if name else
                 tokenizers.BPETokenizer.train(texts_of(rows, sides), USUAL_SIZE, SPECIAL, exact=False)
                 for part, sides in parts.items()}
    for vocabulary in found.values():
        if None in (vocabulary.pad, vocabulary.bos, vocabulary.eos):
            raise UserError(f"tokenizer = {how.tokenizer}: pairs need bpe:SIZE, word:TIMES, char or byte (both one"
                            " token per byte), or the folder of a model that translates, with <pad>, <bos>, <eos>")
    return found


def texts_of(rows, sides):
    """Yields the sentences of some sides of the rows, or a sample of them: a vocabulary is learned from these."""
    total = sum(len(row[side]) for row in rows for side in sides)
    return sample((row[side] for row in rows for side in sides), total)


def write_split(folder, split, rows, vocabularies, dtype, digest):
    """Writes the four files of a split. Returns the number of tokens. vocabularies: of source and target.

    digest: updated with the text. {split}_lengths.bin has the tokens of each source and target, int32 (n, 2).
    """
    lengths, unknown = np.zeros((len(rows), 2), dtype=np.int32), 0
    with (progress(len(rows), f"pairs for {split}") as bar, open(folder / f"{split}.jsonl.new", "wb") as texts,
          open(folder / f"{split}_source.bin.new", "wb") as sources,
          open(folder / f"{split}_target.bin.new", "wb") as targets):
        for number, row in enumerate(rows):
            saved = {name: row[name] for name in ("source", "target", "page", "links") if name in row}
            line = json.dumps(saved, ensure_ascii=False).encode("utf-8") + b"\n"
            texts.write(line)
            digest.update(line)
            for side, vocabulary, file in zip((0, 1), vocabularies, (sources, targets)):
                ids = vocabulary.encode(row[SIDES[side]])
                unknown += np.count_nonzero(ids == vocabulary.unk) if vocabulary.unk is not None else 0
                file.write(ids.astype(dtype).tobytes())
                lengths[number, side] = len(ids)
            bar.update()
    lengths.tofile(folder / f"{split}_lengths.bin.new")
    total = int(lengths.sum())
    if unknown:
        print(f"{split}: {100 * unknown / total:.1f} % of the words are unknown", flush=True)
    return total


# ----------------------------------------------------------------------------------------------------------------------
# Reading

def read(paths, languages, columns=""):
    """An iterable of rows {"source", "target", perhaps "page"} of files: two texts line by line, tables, or .tmx.

    languages, columns: as in prepare.py's settings; columns default to the languages, and for a .tmx with just two
    languages both may be "". Returns (rows, the two languages as "en,it").
    """
    suffixes = {path.suffix.lower() for path in paths}
    names = two(columns, "columns") if columns else two(languages, "languages") if languages else []
    if suffixes == {".tmx"}:
        names = names or languages_of(paths[0])
        return itertools.chain.from_iterable(read_tmx(path, names) for path in paths), ",".join(names)
    languages = languages or columns
    if suffixes <= READERS.keys():
        return read_rows(paths, names), languages
    if suffixes & {".tmx", *READERS}:
        raise UserError(f"{', '.join(map(str, paths))}: give files of one kind: .tmx, or tables, or two texts")
    if len(paths) != 2 or columns:
        raise UserError(f"{', '.join(map(str, paths))}: pairs come from two texts, line by line, and --languages=en,it;"
                        " or from a .tsv, .csv, .jsonl, .parquet or .tmx")
    return read_lines(*paths), languages


def read_lines(source, target):
    """A list of the rows of two texts: line N of `target` translates line N of `source`."""
    sources, targets = list(lines(source)), list(lines(target))
    if len(sources) != len(targets):
        raise UserError(f"{source} has {len(sources):,} lines and {target} {len(targets):,}: line N of one must"
                        " translate line N of the other; an empty line keeps the place of a missing translation")
    for path, found in ((source, sources), (target, targets)):
        if not any(line.strip() for line in found):
            raise UserError(f"{path} has no text: both sides need some")
    return [{"source": one, "target": other} for one, other in zip(sources, targets)]


def lines(path):
    """Yields the lines of a text in UTF-8, without their ends."""
    rest = ""
    for piece in read_file(path):
        *whole, rest = (rest + piece).split("\n")
        yield from whole
    if rest:
        yield rest


def read_rows(paths, names):
    """Yields the rows of tables. names: the columns of source and target; "1" and "2": of a .tsv without a first line.

    The Hugging Face Hub's layout works too: a column `translation` that holds {"en": ..., "it": ...}.
    """
    for path in paths:
        suffix = path.suffix.lower()
        numbered = suffix == ".tsv" and all(name.isdecimal() for name in names)
        reader = read_numbered if numbered else read_parquet if suffix == ".parquet" else READERS[suffix]
        for where, row in reader(path):
            inner = row["translation"] if isinstance(row.get("translation"), dict) else row
            found = {side: pick(inner, name, where) for side, name in zip(SIDES, names)}
            yield {**found, "page": str(row["page"])} if row.get("page") not in (None, "") else found


def pick(row, name, where):
    """The text in a column; "" for null. Raises UserError if there is no such column, or it holds something else."""
    if name not in row:
        raise UserError(f"{where}: no column is named {name}, only {', '.join(map(str, row))}: choose two with"
                        " --columns=SOURCE,TARGET, or --columns=1,2 in a .tsv whose first line has no names")
    text = "" if row[name] is None else row[name]
    if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: {name} = {reprlib.repr(text)}: is not valid text; correct or remove the row")
    return text


def read_numbered(path):
    for number, line in enumerate(lines(path), start=1):
        yield f"{path}, line {number}", {str(i): field for i, field in enumerate(line.split("\t"), start=1)}


def read_parquet(path):
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install pyarrow") from None
    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a complete parquet file ({error}): fetch it again") from None


# ----------------------------------------------------------------------------------------------------------------------
# TMX, the exchange format of translation memories: <tu><tuv xml:lang="en"><seg>...</seg></tuv> <tuv ...> ... </tu>

def read_tmx(path, languages):
    """Yields the rows of a .tmx. A unit without one of the languages has an empty side."""
    found = set()
    for unit in units(path):
        found |= unit.keys()
        texts = [next((unit[code] for code in unit if matches(code, language)), "") for language in languages]
        yield dict(zip(SIDES, texts))
    for language in languages:
        if not any(matches(code, language) for code in found):
            raise UserError(f"{path} has no language {language}, only {', '.join(sorted(found))}: choose two with"
                            " --languages=en,it")


def matches(code, language):
    """True if a code such as en-US is the language, such as en or en-us."""
    return f"{code.lower()}-".startswith(f"{language.lower()}-")


def languages_of(path):
    found = sorted(set().union(*units(path)))
    if len(found) != 2:
        raise UserError(f"{path} has {len(found)} languages ({', '.join(found)}): choose two with --languages=en,it")
    return found


def units(path):
    """Yields {language code: text} of each unit of a .tmx."""
    try:
        for _, element in ElementTree.iterparse(path):
            if element.tag == "tu":
                yield {language_of(variant): text_in(segment) for variant in element.iter("tuv")
                       if (segment := variant.find("seg")) is not None}
                element.clear()
    except ElementTree.ParseError as error:
        raise UserError(f"{path} is not a complete .tmx: {error}") from None


def language_of(variant):
    return variant.get("{http://www.w3.org/XML/1998/namespace}lang") or variant.get("lang") or ""


def text_in(element):
    """The text of an element, without the codes in its MARKUP."""
    inner = ("" if part.tag in MARKUP else text_in(part) for part in element)
    tails = (part.tail or "" for part in element)
    return (element.text or "") + "".join(itertools.chain.from_iterable(zip(inner, tails)))
