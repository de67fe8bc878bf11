"""The data sets that are known by name: where their raw material comes from, and how they are prepared.

To add one, write a row into one of the tables below, and a data/<name>/README.md with its origin and licence.
"""

import contextlib
import hashlib
import os
import platform
import runpy
from pathlib import Path

from configurator import UserError
from machine.terminal import printable
from run.files import read_json
from run.lock import owned
from sources.download import Offline, download

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"

SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
KNOWN = {  # texts to download: tokenizer, URL, SHA-256
    "shakespeare_char": ("char", *SHAKESPEARE), "shakespeare_gpt2": ("gpt2", *SHAKESPEARE)}
BUILT_IN = "python_reference"  # a text that needs no network: CPython's language reference, which help() shows
GENERATED = {"shapes": "bpe:1600", "digits": "char"}  # images with questions, from data/<name>/generate.py: tokenizer
CORPORA = {  # documents on the hub: data set, folder of its parquet files, commit
    "fineweb": ("HuggingFaceFW/fineweb", "sample/10BT", "9bb295ddab0e05d785b879661af7260fed5140fc"),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"),
    "openwebtext": ("Skylion007/openwebtext", "plain_text", "b4325f019c648b1641a1784748667e8b74e5e064")}
PAIRS = {  # parallel texts, from sources/corpora.py: settings of prepare.py, for sources.pairs.How
    "libreoffice_help": dict(languages="en,it", tokenizer="bpe:4000", val_fraction=0.05, min_words=3, max_words=40),
    "bible_en_es": dict(languages="en,es", tokenizer="bpe:4000", val_fraction=0.05, max_words=40),
    "opus_books": dict(languages="en,it", tokenizer="bpe:8000", val_fraction=0.05),
    "multi30k": dict(languages="en,de", tokenizer="bpe:8000"),
    "phrases": dict(languages="en,it", tokenizer="bpe:400")}
BUILT_IN_PAIRS = "phrases"  # needs no network
LABELLED = {  # texts with labels, from sources/labelled_sets.py: kind, recipe, settings for sources.labelled.How
    "help_topics": ("labels", "config/classify_topics.py", dict(languages="en")),
    "help_languages": ("labels", "config/classify_languages.py", dict(languages="")),
    "home_assistant_intents": ("tags", "config/tag_home.py", dict(languages="en", tokenizer="word:1")),
    "flights": ("tags", "config/tag_flights.py", dict(tokenizer="word:1")),
    "facts": ("answers", "config/answer_facts.py", dict(tokenizer="bpe:800")),
    "squad": ("answers", "config/answer_facts.py", dict(tokenizer="bpe:8000")),
    **dict.fromkeys(("atis", "snips"), ("tags", "config/tag_home.py", {})),
    **dict.fromkeys(("sst2", "imdb"), ("labels", "config/classify_topics.py", {}))}
IMAGE_LABELS = {  # pictures by class: settings for sources.labelled_images.How
    "fashion_mnist": dict(image_size=28), "digit_scans": dict(image_size=16)}
BUILT_IN_PICTURES = "digit_scans"  # needs no network, but scikit-learn
COLUMNS = {  # rows of a table, each with a label: settings for sources.columns.How
    "titanic": dict(labels="survived", columns="pclass:category,sex:category,age:number,sibsp:number,parch:number,"
                                               "fare:number,embarked:category,name:text", tokenizer="bpe:500",
                    val_fraction=0.15),
    "breast_cancer": dict(labels="tumour", val_fraction=0.15),
    "diabetes": dict(labels="progression", columns="all,sex:category", val_fraction=0.15),
    "diamonds": dict(labels="price"),
    "ledger": dict(labels="reached", columns="slip:picture,note:text,kind:category,target:number", image_size=16)}
DIALOGUES = ("countdown", "calculator")  # of worlds.py, which need no network
EQUATIONS = {f"{world}_text": world for world in DIALOGUES}  # texts of those worlds, to pre-train on
BUILT_IN_TAGS = "flights"  # needs no network
TOKENIZERS = {  # all known data sets: tokenizer
    **{name: row[0] for name, row in KNOWN.items()}, BUILT_IN: "char", **GENERATED, **dict.fromkeys(CORPORA, "gpt2"),
    **{name: row["tokenizer"] for name, row in PAIRS.items()}, **dict.fromkeys((*LABELLED, *IMAGE_LABELS), ""),
    **dict.fromkeys(COLUMNS, ""), **dict.fromkeys((*DIALOGUES, *EQUATIONS), "char")}
KINDS = {  # of all known data sets but preferences: what meta.json will say
    **dict.fromkeys((*KNOWN, BUILT_IN, *CORPORA, *EQUATIONS), "text"), **dict.fromkeys(GENERATED, "image-text"),
    **dict.fromkeys(PAIRS, "pairs"), **{name: row[0] for name, row in LABELLED.items()},
    **dict.fromkeys(IMAGE_LABELS, "image-labels"), **dict.fromkeys(COLUMNS, "columns"),
    **dict.fromkeys(DIALOGUES, "chat")}


def locate(dataset):
    """The folder of a data set: data/<name> for a name; a path, which has a slash, is the folder itself."""
    return Path(dataset).expanduser() if "/" in dataset or os.sep in dataset else DATA / dataset


def claim(dataset, source):
    """The folder to prepare `source` in. Raises UserError if it holds something else than a data set of `source`."""
    folder = locate(dataset)
    if not dataset or DATA.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"name = {dataset!r}: {folder} holds all data sets: choose another name, --name=NEW")
    if folder.resolve().parent == DATA.resolve() and folder.resolve().name in TOKENIZERS:
        raise UserError(f"name = {dataset}: belongs to a known data set: choose another name, --name=NEW")
    names = {path.name for path in folder.glob("*")} - {"README.md", "input.txt"}
    for name in ("meta.json", "recipe.json"):  # unfinished documents have a recipe.json only
        if name in names:
            found = ""
            with contextlib.suppress(UserError, TypeError, ValueError):  # the file is damaged
                found = dict(read_json(folder / name)).get("source")
            if found != source:
                raise UserError(f"{folder} holds another data set, of {found or 'an unknown source'}: delete it, or"
                                " choose another name, --name=NEW")
            print(printable(f"{folder} already has a data set of this source: updating it"), flush=True)
            return folder
    if names and "run.lock" not in names or "run.json" in names:  # without run.json, run.lock is a killed prepare.py's
        raise UserError(f"name = {dataset}: {folder} holds unrelated files: choose another name, --name=NEW")
    return folder


def check_dataset(dataset, init_from="scratch", kinds=()):
    """Raises UserError, with the command that prepares it, unless the data set is ready or `ensure` can prepare it.

    init_from: the model whose tokenizer the command names. kinds: those that the task learns from; (): any.
    """
    folder = locate(dataset)
    if kinds and KINDS.get(dataset, kinds[0]) not in kinds:
        known = ", ".join(name for name, kind in KINDS.items() if kind in kinds)
        raise UserError(f"dataset = {dataset}: is a data set of kind {KINDS[dataset]}, and this task needs one of kind"
                        f" {' or '.join(kinds)}: name another --dataset" + f" (known: {known})" * bool(known))
    if dataset in TOKENIZERS and dataset not in CORPORA or (folder / "meta.json").exists():
        return
    how = f"make it first with python prepare.py {dataset}, which downloads tens of gigabytes"
    if dataset not in CORPORA:
        known = {*TOKENIZERS, *(path.parent.name for path in DATA.glob("*/meta.json"))}
        own = "" if init_from == "scratch" else f" --tokenizer={init_from}"
        how = f"make one with python prepare.py FILE{own} --name={dataset} (known: {', '.join(sorted(known))})"
    raise UserError(f"there is no data set at {folder}: {how}")


def ensure(dataset):
    """Prepares `dataset` if missing. Returns it, or a built-in one if offline. Raises UserError like check_dataset."""
    check_dataset(dataset)
    meta = locate(dataset) / "meta.json"
    if meta.exists():
        return dataset
    with owned(DATA, "dataset", "been preparing data", wait=True):  # two runs may start at once
        return dataset if meta.exists() else prepare_known(dataset, dataset, TOKENIZERS[dataset])


def prepare_known(name, target, tokenizer, val_fraction=0.1, image_size=48):
    """Prepares the known data set `name`, if it is not one of CORPORA, as the data set `target`.

    target: a data set's name or path, as for `locate`. Returns the data set to train on: `target`. If a download fails
    for want of a network, returns the built-in one where target is name, and else raises Offline. Pairs and texts with
    labels: with the settings in PAIRS and LABELLED; `prepare_pairs` and `prepare_labelled` take others.
    Pictures by class, and rows of columns: likewise, with those in IMAGE_LABELS and COLUMNS.
    """
    if name in GENERATED:
        from sources import images  # imports numpy, which is slow
        raw, script = DATA / name / "source", f"data/{name}/generate.py"
        if target != name:
            claim(target, script)
        with owned(raw, "dataset", "been making images"):
            print(f"generating {raw}", flush=True)
            runpy.run_path(str(ROOT / script))["generate"](raw)
            images.prepare(raw, locate(target), tokenizer, val_fraction, image_size, script)
        return target
    if name in DIALOGUES:
        from sources import dialogues
        folder = locate(target) if target == name else claim(target, f"the world {name}")
        dialogues.prepare(dialogues.of_world(name), folder, tokenizer, val_fraction, f"the world {name}", name)
        return target
    if name in PAIRS:
        return prepare_pairs(name, target, PAIRS[name])
    if name in LABELLED:
        return prepare_labelled(name, target, LABELLED[name][2])
    if name in IMAGE_LABELS:
        return prepare_image_labels(name, target, IMAGE_LABELS[name])
    if name in COLUMNS:
        return prepare_columns(name, target, COLUMNS[name])
    from sources import texts  # imports numpy, which is slow
    try:
        path, origin = known_text(name)
    except Offline as error:
        if target != name:  # BUILT_IN can't replace a data set with settings of its own
            raise
        return built_in(BUILT_IN, name, error, f", or put the text at {DATA / name / 'input.txt'} yourself")
    if target != name:
        claim(target, origin)
    texts.prepare([path], locate(target), tokenizer, val_fraction, origin)
    return target


def prepare_pairs(name, target, how):
    """Prepares the parallel text `name` as the data set `target`; returns and raises as prepare_known does.

    how: a dict of settings, for sources.pairs.How.
    """
    from sources import corpora, pairs  # they import numpy, which is slow
    how = pairs.How(**how)
    try:
        rows, source, revision = corpora.fetch(name, pairs.two(how.languages, "languages"), DATA / name)
    except Offline as error:
        if target != name:
            raise
        return built_in(BUILT_IN_PAIRS, name, error)
    pairs.prepare(rows, locate(target) if target == name else claim(target, source), how, source, revision)
    return target


def prepare_labelled(name, target, how):
    """Prepares the texts with labels `name` as the data set `target`; returns and raises as prepare_known does.

    how: a dict of settings, for sources.labelled.How. No set to classify texts is built in: Offline is raised.
    """
    from sources import labelled, labelled_sets  # they import numpy, which is slow
    how = labelled.How(**how)
    languages = [code.strip() for code in how.languages.split(",") if code.strip()]
    try:
        rows, source, revision = labelled_sets.fetch(name, languages, DATA / name)
    except Offline as error:
        if target != name or LABELLED[name][0] != "tags":
            raise
        return built_in(BUILT_IN_TAGS, name, error)
    folder = locate(target) if target == name else claim(target, source)
    labelled.prepare(rows, folder, LABELLED[name][0], how, source, revision)
    return target


def prepare_image_labels(name, target, how):
    """Prepares the pictures by class `name` as the data set `target`; returns and raises as prepare_known does.

    how: a dict of settings, for sources.labelled_images.How.
    """
    from sources import labelled_images  # imports numpy, which is slow
    try:
        rows, source, revision = labelled_images.fetch(name, DATA / name)
    except Offline as error:
        if target != name:
            raise
        return built_in(BUILT_IN_PICTURES, name, error)
    folder = locate(target) if target == name else claim(target, source)
    labelled_images.prepare(rows, folder, labelled_images.How(**how), source, revision)
    labelled_images.write_examples(folder)
    return target


def prepare_columns(name, target, how):
    """Prepares the table `name` as the data set `target`, and returns it. Raises Offline if the table can't be had.

    how: a dict of settings, for sources.columns.How.
    """
    from sources import columns  # imports numpy, which is slow
    rows, source, revision = columns.fetch(name, DATA / name)
    folder, how = locate(target) if target == name else claim(target, source), columns.How(**how)
    if how.columns == COLUMNS[name].get("columns"):  # these are all but the usual label
        kept = [column for column in how.columns.split(",") if column.partition(":")[0] != how.labels.partition(":")[0]]
        how = how._replace(columns=",".join(kept))
    columns.prepare(rows, folder, how, source, revision)
    return target


def built_in(name, wanted, error, remedy=""):
    """Says that the data set `wanted` can't be had, for the reason `error`; prepares and returns `name` instead."""
    bar = "!" * 100
    print(f"\n{bar}\nNO NETWORK: {error}\nUsing the built-in data set {name!r} instead. Its losses can't be compared"
          f" with those of {wanted}.\nRun again when you are online{remedy}.\n{bar}\n", flush=True)
    return name if (locate(name) / "meta.json").exists() else prepare_known(name, name, TOKENIZERS[name])


def known_text(name):
    """(path, origin) of a known text. BUILT_IN and EQUATIONS are made; others are downloaded and checked by SHA-256.

    origin: text that meta.json will show as the source: the URL, or "pydoc_data.topics of Python 3.12.1".
    """
    path = DATA / name / "input.txt"
    if name == BUILT_IN:
        from pydoc_data.topics import topics
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "\n\n".join(topics[topic].strip() for topic in sorted(topics))
        path.write_text(text + "\n", encoding="utf-8", newline="\n")
        return path, f"pydoc_data.topics of Python {platform.python_version()}"
    if name in EQUATIONS:
        from worlds import WORLDS  # imports numpy, which is slow
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(WORLDS[EQUATIONS[name]].text(100_000), encoding="utf-8", newline="\n")
        return path, f"the world {EQUATIONS[name]}"
    _, url, expected = KNOWN[name]
    if not path.exists():
        download(url, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise UserError(f"{path} is not the expected text (SHA-256 {found}): delete it and run again")
    return path, url
