"""Makes a data set of texts with labels: {train,val,test}.jsonl, tokenizer.json, meta.json.

    python prepare.py reviews.csv --labels=stars        texts in the column `text`, or --column=NAME: to classify them
    python prepare.py queries.jsonl --tags=True         {"text", "spans": [{"start", "end", "label"}], "intent"} in each
    python prepare.py my_folder/ --tags=True            line: to label words; or CoNLL files, or seq.in, seq.out, label
    python prepare.py help_topics                       a known one: see labelled_sets.py

Tables are .csv, .tsv, .jsonl or .parquet. A text may have several labels, or none: then each cell is a JSON list. CoNLL
files have a word and its tag in each line, an empty line between sentences, and perhaps "# intent: NAME" before one.

The files train, valid (val, dev) and test of a folder keep that part, and so do rows whose `split` says it. What has no
part gets one by the hash of its text without numbers and punctuation, or of its `page`, if the table has that column.
A text for validation or test that gets its part so is left out if nearly all of it is in training.

Rows stay texts. The task makes tokens of them with its model's tokenizer, so that a data set serves every model.
"""

import collections
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import tokenizer as tokenizers
from configurator import UserError
from machine.terminal import printable
from sources.documents import READERS
from sources.pairs import SPLITS, USUAL_SIZE, lines, normal, read_parquet, split_of
from sources.texts import files_in, finish, print_choice, sample, writing

COLUMNS = {"labels": ("text", "labels"), "tags": ("words", "tags", "intent"),
           "answers": ("question", "context", "answers")}  # of each kind's rows
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
         "test": "test"}  # what files and rows call a split
TAGGED = (".jsonl", ".conll", ".bio", ".iob", ".txt", ".tsv", ".in")  # files with words and tags
RUN, COPIED = 8, 0.8  # a near-copy has this share of its runs of so many words in another text
WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")  # a word, or a punctuation mark


class How(NamedTuple):
    """How texts with labels are prepared; prepare.py's settings of the same names."""
    languages: str = ""  # of a known set, such as "en"
    tokenizer: str = ""  # as in prepare.py; "": bpe:4000, or for a small text a BPE of as many tokens as it yields
    val_fraction: float = 0.1  # the share of texts for validation, and once more for test


def prepare(rows, folder, kind, how, source, revision=""):
    """Writes the data set of an iterable of rows into the folder, and returns the dict of meta.json.

    kind "labels": rows are dicts with text and labels, a list of names. kind "tags": words, tags (a BIO label for each
    word, or []), and intent (a name, or ""). kind "answers": see questions.py. All may have page or split. A row with
    split "val" or "test" is taken as it is. Raises UserError if a split would be empty, or a label has one row.
    """
    with writing(folder):
        chosen, left_out = choose(rows, kind, how, source)
        if not chosen:
            raise UserError(f"{source}: holds no text (left out: {words_for(left_out)})")
        splits = {split: [row for row in chosen if row["split"] == split] for split in SPLITS}
        for split, found in splits.items():
            if not found:
                raise UserError(f"{source}: none of {len(chosen):,} texts is for {split} (left out:"
                                f" {words_for(left_out)}): add texts, or a column split; texts that differ in"
                                " numbers and punctuation alone are in one split")
        names = names_of(splits, kind)
        vocabulary = learn(how.tokenizer, splits)
        meta = {"kind": kind, "source": source, "revision": revision, "sha256": "", "tokenizer": vocabulary.kind,
                "vocab_size": vocabulary.vocab_size, **names, "left_out": left_out}
        digest = hashlib.sha256()
        for split, found in splits.items():
            meta[f"{split}_rows"] = len(found)
            write_rows(folder / f"{split}.jsonl.new", found, COLUMNS[kind], digest)
        meta["sha256"] = digest.hexdigest()
        vocabulary.save(folder / "tokenizer.json.new")
        return finish(folder, (*(f"{split}.jsonl" for split in SPLITS), "tokenizer.json"), meta)


def write_rows(path, rows, columns, digest):
    """Writes some columns of the rows, a JSON object in each line. digest: updated with the lines."""
    with open(path, "wb") as file:
        for row in rows:
            saved = {name: row[name] for name in (*columns, "page") if name in row}
            line = json.dumps(saved, ensure_ascii=False).encode("utf-8") + b"\n"
            file.write(line)
            digest.update(line)


def text_of(row):
    if "question" in row:
        return f"{row['question']}\n{row['context']}"
    return row["text"] if "text" in row else " ".join(row["words"])


def learn(name, splits):
    """The tokenizer `name`, learned from the training rows; characters: from all rows."""
    texts = {split: [text_of(row) for row in rows] for split, rows in splits.items()}
    training = sample(texts["train"], sum(map(len, texts["train"])))
    if not name:
        return tokenizers.BPETokenizer.train(training, USUAL_SIZE, exact=False)
    return tokenizers.build(name, lambda: (text for found in texts.values() for text in found), lambda: training)


# ----------------------------------------------------------------------------------------------------------------------
# Which rows are used, and what for

def choose(rows, kind, how, source):
    """Returns (rows, {reason: number of rows left out}). Each row has a split, and its text has single spaces."""
    if not 0 < how.val_fraction < 0.5:
        raise UserError(f"val_fraction = {how.val_fraction}: must lie between 0 and 0.5: the test part is as large")
    left_out, kept, seen = collections.Counter(), [], set()
    for row in rows:
        if kind == "labels":
            row = {**row, "text": " ".join(row["text"].split())}
        key = key_of(row, kind)
        if not text_of(row):
            left_out["empty"] += 1
        elif key in seen and "split" not in row:
            left_out["duplicate"] += 1
        else:
            kept.append(row)
        seen.add(key)
    missing = {"val", "test"} - {row.get("split") for row in kept}
    if missing:
        check_counts(kept, kind, source, left_out)
    elif how.val_fraction != How().val_fraction:
        raise UserError(f"val_fraction = {how.val_fraction}: the texts of {source} name their split; leave it out")
    kept = [{**row, "split": split_for(row, missing, how.val_fraction)} for row in kept]
    kept = without_copies(kept, missing, left_out)
    print(printable(f"texts: {len(kept):,}; left out: {words_for(left_out)}"), flush=True)
    times = collections.Counter(text for text, _ in {key_of(row, kind) for row in kept})
    if contrary := sum(count > 1 for count in times.values()):
        print(f"texts that occur with different labels, and are kept with each of them: {contrary:,}", flush=True)
    by_hash = "whole pages, by hash" if any("page" in row for row in kept) else "by a hash of the text"
    print(", ".join(f"{split}: {by_hash if split in missing else 'as given'}" for split in ("val", "test")), flush=True)
    return kept, dict(left_out)


def key_of(row, kind):
    """(text, its labels) of a row, as text. Rows that share it are duplicates."""
    return text_of(row), json.dumps([row[name] for name in COLUMNS[kind]])


def split_for(row, missing, val_fraction):
    """The split of a row: its own; but if no row is for some splits, a hash takes these out of training."""
    if row.get("split", "train") != "train":
        return row["split"]
    drawn = split_of(str(row.get("page") or normal(text_of(row))), val_fraction)
    return drawn if drawn in missing else "train"


def without_copies(rows, splits, left_out):
    """The rows without those of some splits that are nearly in an earlier one. Counts these in left_out["copy"].

    A text is nearly there if COPIED of its runs of words are, such as a page that is quoted in another one.
    """
    kept, earlier = [], set()
    for split in SPLITS if splits else ():
        found = [(runs(text_of(row)), row) for row in rows if row["split"] == split]
        kept += [row for own, row in found if split not in splits or len(own & earlier) < COPIED * len(own)]
        earlier.update(*(own for own, _ in found))
    if splits and len(kept) < len(rows):
        left_out["copy"] = len(rows) - len(kept)
    return kept if splits else rows


def runs(text):
    """The hashes of all RUN neighbouring words of a text; of a shorter text, of all its words. See pairs.normal."""
    words = normal(text).split()
    return {hash(tuple(words[i:i + RUN])) for i in range(max(1, len(words) - RUN + 1))}


def words_for(left_out):
    names = {"empty": "empty", "duplicate": "with the text and labels of an earlier one",
             "copy": "for validation or test but almost the same as one for training"}
    return ", ".join(f"{count:,} {names[reason]}" for reason, count in left_out.items()) or "none"


def check_counts(rows, kind, source, left_out):
    """Raises UserError if a class has one row, which can't be in two splits. Several labels of a text: no check."""
    if any(len(classes_of(row, kind)) > 1 for row in rows):
        return
    counts = collections.Counter(name for row in rows for name in classes_of(row, kind))
    if lonely := [name for name, count in counts.items() if count == 1]:
        raise UserError(f"{source}: only one text has the label {lonely[0]} ({len(lonely):,} such labels; left out:"
                        f" {words_for(left_out)}), so that none can be held out: add texts, or leave it out")


def classes_of(row, kind):
    return row["labels"] if kind == "labels" else [row["intent"]] if row.get("intent") else []


def names_of(splits, kind):
    """The names of the labels in training, as meta.json has them. Says how many other rows have labels beyond these."""
    if kind == "answers":
        return {}

    def distinct(split, names_in):
        return sorted({name for row in splits[split] for name in names_in(row)})

    if kind == "labels":
        several = any(len(row["labels"]) != 1 for rows in splits.values() for row in rows)
        names = {"labels": distinct("train", lambda row: row["labels"]), "several": several}
        if len(names["labels"]) < 2 - several:
            raise UserError(f"the labels of the texts for training are {names['labels']}: there must be at least"
                            f" {2 - several}")
        print(f"labels: {len(names['labels']):,}, {'perhaps several' if several else 'one'} for each text", flush=True)
    else:
        names = {"tags": distinct("train", lambda row: row["tags"]),
                 "intents": distinct("train", lambda row: classes_of(row, kind))}
        if names["tags"] in ([], ["O"]) and not names["intents"]:
            raise UserError("no text for training has a tag other than O, or an intent")
    known = {name for found in names.values() if isinstance(found, list) for name in found}
    for split in ("val", "test"):
        unknown = sum(not known.issuperset({*row.get("tags", ()), *classes_of(row, kind)}) for row in splits[split])
        if unknown:
            print(f"{split}: {unknown:,} of {len(splits[split]):,} texts have a label that no text for training has;"
                  " it counts as an error", flush=True)
    return names


# ----------------------------------------------------------------------------------------------------------------------
# Reading one's own files

def find(paths, pattern, suffixes):
    """[(file, {"split": ...} or {})] of some files, and of the files in some folders that have one of the suffixes.

    A file or folder that is named train, valid or test says the split, unless all files have the same. pattern: see
    texts.wanted; it is for files in folders.
    """
    found = []
    for path in paths:
        inside = [file for file in files_in(path, pattern) if file.suffix.lower() in suffixes] if path.is_dir() else []
        for file in inside or [path]:
            names = [path.name, *file.relative_to(path).parts] if inside else [path.name]
            found.append((file, [PARTS[stem] for name in names if (stem := Path(name).stem.lower()) in PARTS]))
    if any(path.is_dir() for path in paths):
        print_choice([file for file, _ in found], [])
    is_told = len({tuple(splits) for _, splits in found}) > 1
    return [(file, {"split": splits[-1]} if splits and is_told else {}) for file, splits in found]


def own_parts(row, where):
    """{"split", "page"} as far as a row of a file has them. Raises UserError for a split of another name."""
    found = {"page": str(row["page"])} if row.get("page") not in (None, "") else {}
    if row.get("split") in (None, ""):
        return found
    if str(row["split"]) not in PARTS:
        raise UserError(f"{where}: split = {row['split']!r}: must be train, val or test")
    return {**found, "split": PARTS[row["split"]]}


def tables(paths, pattern, label_column):
    """[(table, {"split": ...} or {})] as from `find`. Raises UserError if a file is no table."""
    found = find(paths, pattern, READERS)
    for path, _ in found:
        if path.suffix.lower() not in READERS:
            raise UserError(f"labels = {label_column}: {path} is no table: give a .csv, .tsv, .jsonl or .parquet, or a"
                            " folder of these")
    return found


def read_labels(paths, text_column, label_column, pattern=""):
    """Yields the rows of tables: {"text", "labels", perhaps "page" and "split"}."""
    for path, part in tables(paths, pattern, label_column):
        for where, row in rows_of(path):
            for setting, name in (("labels", label_column), ("column", text_column)):
                if name not in row:
                    may = setting == "column" or ":" in name
                    several = ", or predict the labels from several, --columns=all" * may
                    raise UserError(f"{where}: no column is named {name}, only {', '.join(map(str, row))}: choose one"
                                    f" with --{setting}=NAME{several}")
            text = "" if row[text_column] is None else row[text_column]
            check_text(text, where)
            yield {"text": text, "labels": labels_in(row[label_column], where, label_column), **part,
                   **own_parts(row, where)}


def rows_of(path):
    """Yields (where, {column: value}) of a table."""
    return read_parquet(path) if path.suffix.lower() == ".parquet" else READERS[path.suffix.lower()](path)


def check_text(text, where):
    if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: {text!r:.60} is not valid text; correct or remove the row")


def one_line(name):
    """The name of a label without line ends and tabs: results show it in a line or a table."""
    return " ".join(name.split())


def labels_in(value, where, column):
    """The list of names in a cell: one name or number, or a list of these, which in a .csv or .tsv is JSON."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"{where}: {column} = {value!r:.60} is no list in JSON ({error})") from None
    names = value if isinstance(value, list) else [value]
    names = [one_line(str(name)) if isinstance(name, (str, int, float)) else "" for name in names]
    if not all(names):
        raise UserError(f"{where}: {column} = {value!r:.60}: must be a name, or a list of names; [] where a text has"
                        " none of several labels")
    return sorted(set(names))


# ----------------------------------------------------------------------------------------------------------------------
# Reading words with labels

def read_tags(paths, pattern=""):
    """An iterable of the rows of files, {"words", "tags", "intent", perhaps "split"}: .jsonl, CoNLL, or seq.in."""
    files = find(paths, pattern, TAGGED)
    for path, _ in files:
        if path.is_dir():
            raise UserError(f"tags = True: {path} holds no file that ends in {', '.join(TAGGED)}")
    parallel = [(path, part) for path, part in files if path.name == "seq.in"]
    return ({**part, **row} for path, part in parallel or files for row in reader_of(path)(path))


def reader_of(path):
    return read_parallel if path.name == "seq.in" else read_spans if path.suffix.lower() == ".jsonl" else read_conll


def read_spans(path):
    """Yields the rows of a .jsonl with text and spans, or with words and tags, and perhaps an intent."""
    for where, row in READERS[".jsonl"](path):
        intent = row.get("intent") or ""
        check_text(intent, where)
        if "words" in row:
            words, tags = row["words"], row.get("tags") or []
            if not isinstance(words, list) or not isinstance(tags, list):
                raise UserError(f"{where}: words and tags must be lists")
            tags = bio(tags, where)
        elif isinstance(row.get("text"), str) and (intent or "spans" in row):
            check_text(row["text"], where)
            words, tags = cut(row["text"], row["spans"], where) if "spans" in row else (WORD.findall(row["text"]), [])
        else:
            raise UserError(f"{where}: has only {', '.join(row)}: each line needs text and spans or an intent, or words"
                            " and tags")
        check_words(words, tags, where)
        yield {"words": words, "tags": tags, "intent": one_line(intent), **own_parts(row, where)}


def check_words(words, tags, where):
    if tags and len(words) != len(tags):
        raise UserError(f"{where}: has {len(words)} words and {len(tags)} tags: each word needs one")
    for word in words:
        check_text(word, where)
        if not word.strip():
            raise UserError(f"{where}: {word!r} is no word: leave it and its tag out")


def cut(text, spans, where):
    """(words, their BIO tags) of a text. spans: dicts with start, end (characters, end exclusive) and label.

    Raises UserError if a span overlaps another one, or begins or ends inside a word.
    """
    words = list(WORD.finditer(text))
    tags, end = ["O"] * len(words), 0
    try:
        spans = sorted((int(span["start"]), int(span["end"]), one_line(str(span["label"]))) for span in spans)
    except (TypeError, ValueError, KeyError):
        raise UserError(f"{where}: spans = {spans!r:.60}: must be a list of objects with start, end, label") from None
    for start, stop, label in spans:
        inside = [i for i, word in enumerate(words) if start < word.end() and word.start() < stop]
        shown = f"the span {label} from {start} to {stop} ({text[start:stop]!r:.40})"
        if label in ("", "O"):
            raise UserError(f"{where}: {shown} needs a name other than '' and O, which stands for words in no span")
        if stop > len(text):
            raise UserError(f"{where}: {shown} ends after the text, which has {len(text)} characters")
        if start < end:
            raise UserError(f"{where}: {shown} overlaps the one before it: a word has one label")
        if not inside or words[inside[0]].start() < start or stop < words[inside[-1]].end():
            raise UserError(f"{where}: {shown} does not begin and end at a word of {text!r:.60}")
        tags[inside[0]:inside[-1] + 1] = [f"B-{label}"] + [f"I-{label}"] * (len(inside) - 1)
        end = stop
    return [word[0] for word in words], tags


def bio(tags, where):
    """The tags in BIO, where each span begins with B-. They may be in IOB1, which often begins with I-, or in BIOES."""
    found, before = [], ""
    for tag in tags:
        tag = one_line(str(tag))
        mark, _, label = tag.partition("-")
        if not (mark in ("B", "I", "E", "S") and label or tag == "O"):
            raise UserError(f"{where}: tag = {tag!r:.40}: must be O, or B- or I- and a name; see"
                            " sources/labelled.py for --tags=True")
        begins = mark in ("B", "S") or before != label
        found.append("O" if tag == "O" else f"{'B' if begins else 'I'}-{label}")
        before = label
    return found


def read_conll(path):
    """Yields the rows of a CoNLL file: the first field of a line is a word, the last its tag."""
    words, tags, intent, first = [], [], "", 1
    for number, line in enumerate([*lines(path), ""], start=1):
        fields = line.split("\t") if "\t" in line else line.split()
        if match := re.fullmatch(r"#\s*intent:\s*(.+?)\s*", line):
            intent = one_line(match[1])
        elif len(fields) > 1 and not line.startswith("-DOCSTART-"):
            words.append(fields[0])
            tags.append(fields[-1].strip())
        elif len(fields) == 1:
            raise UserError(f"{path}, line {number}: {line!r:.40} has no tag: write a word and its tag in each line,"
                            " and an empty line after each sentence")
        elif words:
            where = f"{path}, lines {first} to {number - 1}"
            check_words(words, tags, where)
            yield {"words": words, "tags": bio(tags, where), "intent": intent}
            words, tags, intent = [], [], ""
        first = first if words else number + 1


def read_parallel(path):
    """Yields the rows of a file seq.in, and of seq.out and perhaps label beside it: line N of each is of sentence N."""
    folder = path.parent
    names = [name for name in ("seq.in", "seq.out", "label") if (folder / name).exists()]
    found = {name: list(lines(folder / name)) for name in names}
    counts = {name: len(each) for name, each in found.items()}
    if "seq.out" not in names or len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise UserError(f"{folder}: its files must have a line for each sentence, in seq.in, seq.out and perhaps label;"
                        f" they have {shown}")
    intents = found.get("label", [""] * counts["seq.in"])
    for number, (text, tags, intent) in enumerate(zip(found["seq.in"], found["seq.out"], intents), start=1):
        where = f"{folder}, line {number}"
        words, tags = text.split(), bio(tags.split(), where)
        check_words(words, tags, where)
        yield {"words": words, "tags": tags, "intent": one_line(intent)}
