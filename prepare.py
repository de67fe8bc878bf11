"""Makes a data set to train on: data/<name>/{train.bin, val.bin, tokenizer.json, meta.json}.

    python prepare.py my.txt                            a file; also a folder of texts with any suffix, or a URL
    python prepare.py src/ a.md --name=mine             several; --files="*.py,*.md" or "!*.csv" selects inside folders
    python prepare.py my.txt --tokenizer=bpe:4096       char (default), byte, gpt2, or a BPE trained on the text
    python prepare.py my.txt --tokenizer=out            the tokenizer of the model in out/, to fine-tune or evaluate it
    python prepare.py my.txt --tokenizer=HuggingFaceTB/SmolLM2-135M      of a model on the hub
    python prepare.py shakespeare_char                  a known data set (train.py does this by itself)
    python prepare.py my_folder/ --image_size=48        images with a captions.jsonl: see sources/images.py
    python prepare.py my_folder/ --image_size=32        pictures, in a folder for each class or without classes: see
                                                        sources/labelled_images.py
    python prepare.py my_folder/ --tokenizer=gpt2       documents in .parquet, .jsonl, .csv or .tsv files, and
    python prepare.py fineweb                           documents of the Hugging Face Hub: see sources/documents.py
    python prepare.py talks.jsonl                       dialogues, "messages" in each line; or preferences between two
    python prepare.py pairs.jsonl                       answers, "chosen" and "rejected": see sources/dialogues.py
    python prepare.py en.txt it.txt --languages=en,it --name=mine    to translate: line N of one file translates line N
    python prepare.py pairs.tsv --languages=en,it       of the other; or two columns of a table, or a .tmx; or a known
    python prepare.py libreoffice_help --languages=en,it --tokenizer=bpe:4000     one: see sources/pairs.py
    python prepare.py reviews.csv --labels=stars        texts with labels, to classify them; or words with labels, as
    python prepare.py queries.jsonl --tags=True         spans of a text or in CoNLL files: see sources/labelled.py
    python prepare.py passengers.csv --labels=survived --columns=all     to predict one column of a table from others:
    python prepare.py titanic                           numbers, categories, texts, pictures: see sources/columns.py
    python prepare.py questions.jsonl                   questions on texts, with answers: see sources/questions.py

Text must be UTF-8 and may be larger than memory. The first 90 % of each file is for training, the rest for validation.
"""

import os
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from configurator import UserError, check_idle, check_ranges, from_command_line, one_line_errors


@dataclass(frozen=True)
class Settings:
    tokenizer: str = "char"  # char (pairs, labels: bpe:4000), byte, gpt2, bpe:SIZE, word:TIMES, a model's folder or id
    name: str = ""  # the data set's name under data/, or the path of a folder; default: the source's name
    files: str = ""  # which files of a folder to use, such as "*.py,*.md" or "!*.csv"; default: all that can be read
    val_fraction: float = 0.1  # for validation: the end of texts, the last images, else by hash; pairs, labels: 2 parts
    newlines: Literal["one", "keep"] = "one"  # line ends of texts: "one" makes Windows' \r\n a \n, "keep" leaves them
    image_size: int = 48  # width and height in pixels that images are resized to
    column: str = "text"  # the column of a table that holds the documents, the texts to classify, or images' captions
    labels: str = ""  # of a table: the column with the label of each text, or a list of labels; or the one to predict
    tags: bool = False  # the sources are words with labels: CoNLL files, .jsonl with spans, or seq.in, seq.out, label
    processes: int = 0  # processes that tokenize documents in parallel; 0: one per CPU core
    max_files: int = 0  # use only so many files of documents, from the first on; 0: all
    languages: str = ""  # two, such as en,it: the sources are parallel texts; of a known set with labels: its languages
    unreadable: Literal["refuse", "skip"] = "refuse"  # a picture that can't be read: stop, or go on without it
    columns: str = ""  # of pairs: the two (default: the languages; 1,2: unnamed); with --labels: all, a,b:text, or !c
    shared: bool = True  # pairs: one vocabulary for both languages
    min_words: int = 1  # pairs: leave out those with a shorter source
    max_words: int = 100  # pairs: leave out those with a longer side

    def __post_init__(self):
        check_ranges(self, image_size=1, processes=0, max_files=0, min_words=1, max_words=self.min_words)
        if not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction = {self.val_fraction}: must lie between 0 and 1")


if __name__ == "__main__":  # --help and typos are answered before the slow imports
    SOURCES = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    sys.argv[1:] = [arg for arg in sys.argv[1:] if arg.startswith("-")] or ([] if SOURCES else ["--help"])
    SETTINGS, GIVEN = from_command_line(Settings, __doc__)

from machine.terminal import printable
from published import download as download_model
from sources import columns, dialogues, documents, images, known, labelled, labelled_images, pairs, questions, texts
from sources.download import download
from sources.known import CORPORA, GENERATED, PAIRS, TOKENIZERS, claim, locate, prepare_known, prepare_pairs
from tasks import find_task

GPT2_TOKENS = 100_000_000  # training tokens above which a GPT-2 from scratch is worthwhile
MANY_ROWS = 5000  # of a table for training: more than the updates of the recipes for small ones can use
SETTINGS_OF = {  # for each kind of source, its settings that some other kinds lack
    "texts": ("newlines", "files"), "documents": ("column", "processes", "max_files", "files"),
    "captions": ("image_size",),
    **dict.fromkeys(("pictures by class", "pictures without classes"), ("image_size", "files", "unreadable")),
    "known pictures by class": ("image_size",), "metadata": ("image_size", "column"),
    "pairs": ("languages", "columns", "shared", "min_words", "max_words"),
    "known pairs": ("languages", "shared", "min_words", "max_words"),
    "rows of a table": ("labels", "columns", "files", "image_size", "unreadable"),
    "a known table": ("labels", "columns", "image_size", "unreadable"),
    "texts with labels": ("labels", "column", "files"), "words with tags": ("tags", "files"),
    "a known set with labels": ("languages",),
    "questions": (), "dialogues": (), "known dialogues": (), "a known text": (),
    "a known corpus": ("column", "processes", "max_files"), "known images": ("image_size",)}
CHAT_RECIPES = {"chat": "config/chat/dialogues.py", "preferences": "config/chat/dpo.py"}
PAIRS_RECIPE = "config/translate_en_it.py"
PICTURES_RECIPES = {"pictures by class": "config/fashion_mnist.py", "pictures without classes": "--task=masked-patches"}
TASKS = {"vlm": "image-text", "translate": "translation", "classify": "classification", "tag": "tagging",
         "dpo": "dpo", "answer": "question-answering", **{name.partition("_")[0]: "columns" for name in known.COLUMNS}}
# by the start of a recipe's name; others are of texts


def main(settings, sources, named=()):
    """Makes a data set of the sources (paths, a URL, or a known name), and prints a command that trains on it.

    named: the names of settings that the user gave, which others with their defaults may leave out.
    """
    sources = list(map(os.path.expanduser, sources))
    is_known = len(sources) == 1 and sources[0] in TOKENIZERS and not Path(sources[0]).exists()
    given, settings = settings.tokenizer, replace(settings, tokenizer=local_tokenizer(settings.tokenizer))
    name, recipe = (prepare_known_source(settings, sources[0], named) if is_known else
                    prepare_own(settings, sources, named))
    start = [recipe]
    is_model = os.path.isdir(given) and not Path(given, "meta.json").exists()  # else perhaps another data set
    if is_model or given != settings.tokenizer:  # to fine-tune the model that has this tokenizer
        task = TASKS.get(Path(recipe).stem.partition("_")[0]) or find_task(settings.tokenizer)
        start = [f"--task={task}"] * (task != "text") if task != "dpo" else [recipe]  # a recipe without a model's shape
        start.append(f"--init_from={given}")
    command = ["python", "train.py", *start, f"--dataset={name}", f"--out_dir=out/{locate(name).name}"]
    print(printable(f"train on it: {shlex.join(command)}"))


def local_tokenizer(name):
    """The value of --tokenizer; for a model's id on the hub, the folder of its tokenizer, which is downloaded."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or os.path.exists(name):
        return name
    files = ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "config.json", "generation_config.json"]
    return download_model(name, files, "tokenizer")


def prepare_known_source(settings, source, named):
    """Prepares a known data set, under its own name or settings.name. Returns (name, path of a recipe in config/)."""
    if source in PAIRS:
        check_kind(settings, "known pairs")
        name, how = known_settings(settings, source, named, pairs.How(**PAIRS[source]))
        return prepare_pairs(source, name, how), PAIRS_RECIPE
    if source in known.LABELLED:
        check_kind(settings, "a known set with labels")
        _, recipe, usual = known.LABELLED[source]
        name, how = known_settings(settings, source, named, labelled.How(**usual))
        return known.prepare_labelled(source, name, how), recipe
    if source in known.IMAGE_LABELS:
        check_kind(settings, "known pictures by class")
        usual = labelled_images.How(**known.IMAGE_LABELS[source])
        name, how = known_settings(settings, source, named, usual)
        return known.prepare_image_labels(source, name, how), f"config/{source}.py"
    if source in known.COLUMNS:
        check_kind(settings, "a known table")
        name, how = known_settings(settings, source, named, columns.How(**known.COLUMNS[source]))
        return known.prepare_columns(source, name, how), f"config/{source}.py"
    name, is_corpus, has_images = settings.name or source, source in CORPORA, source in GENERATED
    kind = "known dialogues" if source in known.DIALOGUES else "a known text"
    check_kind(settings, "a known corpus" if is_corpus else "known images" if has_images else kind)
    if name == source:  # under its own name, a data set is the same for everyone
        fixed = {"tokenizer": TOKENIZERS[source], "val_fraction": 0.0005 if is_corpus else 0.1, "image_size": 48,
                 "column": "text"}
        for key, value in fixed.items():
            if getattr(settings, key) not in (value, getattr(Settings, key)):
                raise UserError(f"{source} always has {key} = {value}: add --name=NEW to make a different data set")
        settings = replace(settings, **fixed)
    if is_corpus:
        folder = locate(name) if name == source else claim(name, CORPORA[source][0])
        corpus = documents.hub_source(*CORPORA[source])._replace(column=settings.column)
        return name, prepare_documents(settings, corpus, folder)
    if source in known.DIALOGUES:
        check_idle(settings, "a world decides itself which problems are for validation", "val_fraction")
    name = prepare_known(source, name, settings.tokenizer, settings.val_fraction, settings.image_size)
    if source in known.DIALOGUES:
        return name, "config/chat/countdown.py"
    return name, f"config/vlm_{source}.py" if has_images else text_recipe(TOKENIZERS.get(name, settings.tokenizer))


def known_settings(settings, source, named, usual):
    """(name of the data set, dict of settings) for a known source with a How of its own.

    usual: the How of the data set that has the source's own name; it holds for settings that are not given. Another
    choice of languages has another name.
    """
    chosen = {key: getattr(settings, key) for key in usual._fields
              if key in named or getattr(settings, key) != getattr(Settings, key)}
    how = usual._replace(**chosen)
    languages = getattr(how, "languages", "")
    name = source if languages == getattr(usual, "languages", "") else "_".join([source, *re.split(" *, *", languages)])
    name = settings.name or name
    for key in usual._fields:
        if name == source and getattr(how, key) != getattr(usual, key):
            raise UserError(f"{source} always has {key} = {getattr(usual, key) or 'the usual'}: add --name=NEW to make"
                            " a different data set")
    return name, how._asdict()


def prepare_own(settings, sources, named):
    """Prepares files and folders, or a URL. Returns (the data set's name, path of a recipe in config/)."""
    is_url = len(sources) == 1 and "://" in sources[0]
    check_sources(settings, sources, is_url)
    if settings.columns == "all" and not settings.labels:
        raise UserError("columns = all: is for predicting one column from the others: name it with --labels=COLUMN")
    if settings.labels and settings.columns:
        return prepare_own_columns(settings, sources, named)
    if settings.labels or settings.tags:
        return prepare_own_labelled(settings, sources, named)
    paths = list(map(Path, sources))
    if questions.are_questions(paths):
        check_kind(settings, "questions")
        return prepare_labelled(settings, named, paths, "answers", questions.read(paths)), "config/answer_facts.py"
    if settings.languages or settings.columns or sources[0].lower().endswith(".tmx"):
        return prepare_own_pairs(settings, sources, named), PAIRS_RECIPE
    if dialogues.are_dialogues(paths):
        return prepare_own_dialogues(settings, paths)
    tables = images.find_tables(paths[0]) if len(paths) == 1 else []
    if found := [] if is_url or tables or len(paths) > 1 or not paths[0].is_dir() else \
            labelled_images.find(paths[0], settings.files):
        return prepare_own_pictures(settings, paths[0], found)
    text_files, row_files = ([], []) if is_url or tables else texts.find(paths, documents.READERS, settings.files)
    if not (is_url or tables or text_files or row_files):
        which = f" that match --files={settings.files}" if settings.files else ""
        raise UserError(f"{', '.join(sources)}: there are no texts or documents{which}. A folder counts as pictures if"
                        " most of its files are pictures, directly in it or in a folder for each class"
                        " (sources/labelled_images.py), or if it has a captions.jsonl (sources/images.py)")
    check_kind(settings, tables[0].stem.lower() if tables else "documents" if row_files else "texts")
    name = own_name(settings, urlsplit(sources[0]).path if is_url else sources[0])
    source = sources[0] if is_url else ", ".join(map(os.path.abspath, sources))
    source = os.fsencode(source).decode("utf-8", "backslashreplace")  # a file's name may not be UTF-8
    folder, how = claim(name, source), (settings.tokenizer, settings.val_fraction)
    if tables:
        images.prepare(paths[0], folder, *how, settings.image_size, source, settings.column)
        return name, "config/vlm_shapes.py"
    if row_files:
        return name, prepare_documents(settings, documents.local_source(source, row_files, settings.column), folder)
    if is_url:
        text_files = [folder / "input.txt"]
        download(source, text_files[0])
    if len(paths) == 2 and paths == text_files:
        print("one text of both files; if line N of one translates line N of the other, add --languages=en,it")
    texts.prepare(text_files, folder, *how, source, settings.newlines)
    return name, text_recipe(settings.tokenizer)


def prepare_own_pairs(settings, sources, named):
    """Prepares parallel files. Returns the data set's name."""
    check_kind(settings, "pairs")
    if not all(map(os.path.isfile, sources)):
        given = f"languages = {settings.languages}" if settings.languages else f"columns = {settings.columns}"
        raise UserError(f"{given}: pairs come from files on this machine, and {', '.join(sources)} is none")
    paths = list(map(Path, sources))
    rows, languages = pairs.read(paths, settings.languages, settings.columns)
    name, source = own_name(settings, paths[0]), ", ".join(map(os.path.abspath, sources))
    how = pairs.How(**{key: getattr(settings, key) for key in pairs.How._fields})._replace(languages=languages)
    if settings.tokenizer == Settings.tokenizer and "tokenizer" not in named:
        how = how._replace(tokenizer=pairs.How().tokenizer)
    pairs.prepare(rows, claim(name, source), how, source)
    return name


def prepare_own_pictures(settings, path, rows):
    """Prepares a folder of pictures. rows: from labelled_images.find. Returns (the data set's name, how to train)."""
    kind = "pictures by class" if labelled_images.has_classes(rows) else "pictures without classes"
    check_kind(settings, kind)
    check_idle(settings, f"{kind} have no text", "tokenizer")
    name, source = own_name(settings, path), os.path.abspath(path)
    how = labelled_images.How(settings.image_size, settings.val_fraction, settings.unreadable)
    labelled_images.prepare(rows, claim(name, source), how, source)
    return name, PICTURES_RECIPES[kind]


def prepare_own_columns(settings, sources, named):
    """Prepares tables, to predict a column from others. Returns (the data set's name, path of a recipe in config/)."""
    check_kind(settings, "rows of a table")
    if "://" in sources[0]:
        raise UserError(f"{sources[0]}: only texts are fetched from a URL; download the file, and give its path")
    name, source = own_name(settings, sources[0]), ", ".join(map(os.path.abspath, sources))
    how = columns.How(**{key: getattr(settings, key) for key in columns.How._fields})
    if settings.tokenizer == Settings.tokenizer and "tokenizer" not in named:
        how = how._replace(tokenizer=columns.How().tokenizer)
    rows = columns.read(list(map(Path, sources)), settings.labels, settings.files)
    meta = columns.prepare(rows, claim(name, source), how, source)
    has_numbers = any(column["kind"] == "number" for column in meta["columns"])  # config/diabetes.py needs some
    recipe = "diabetes" if has_numbers and not meta["labels"] else "titanic"
    recipe = "diamonds" if meta["train_rows"] >= MANY_ROWS else recipe
    return name, f"config/{recipe}.py"


def prepare_own_labelled(settings, sources, named):
    """Prepares files of texts or words with labels. Returns (the data set's name, path of a recipe in config/)."""
    if settings.labels and settings.tags:
        raise UserError(f"labels = {settings.labels}, tags = True: choose one: texts have labels, or words have tags")
    check_kind(settings, "words with tags" if settings.tags else "texts with labels")
    if "://" in sources[0]:
        raise UserError(f"{sources[0]}: only texts are fetched from a URL; download the file, and give its path")
    paths = list(map(Path, sources))
    if settings.tags:
        kind, recipe, rows = "tags", "config/tag_home.py", labelled.read_tags(paths, settings.files)
    else:
        kind, recipe = "labels", "config/classify_topics.py"
        rows = labelled.read_labels(paths, settings.column, settings.labels, settings.files)
    return prepare_labelled(settings, named, paths, kind, rows), recipe


def prepare_labelled(settings, named, paths, kind, rows):
    """Prepares the rows of some paths, as labelled.prepare takes them. Returns the data set's name."""
    name, source = own_name(settings, paths[0]), ", ".join(map(os.path.abspath, paths))
    has_usual = settings.tokenizer == Settings.tokenizer and "tokenizer" not in named
    how = labelled.How(tokenizer="" if has_usual else settings.tokenizer, val_fraction=settings.val_fraction)
    labelled.prepare(rows, claim(name, source), kind, how, source)
    return name


def prepare_own_dialogues(settings, paths):
    """Prepares files of dialogues or preferences. Returns (the data set's name, path of a recipe in config/)."""
    check_kind(settings, "dialogues")
    name, source = own_name(settings, paths[0]), ", ".join(map(os.path.abspath, paths))
    rows, folder = dialogues.read(paths), claim(name, source)
    meta = dialogues.prepare(rows, folder, settings.tokenizer, settings.val_fraction, source)
    return name, CHAT_RECIPES[meta["kind"]]


def own_name(settings, path):
    """--name, or the name of the first source, a path; of "." the folder's."""
    return settings.name or re.sub(r"\W+", "_", Path(os.path.abspath(path)).stem)


def text_recipe(tokenizer):
    return "config/finetune_gpt2.py" if tokenizer == "gpt2" else "config/shakespeare_char.py"


def check_sources(settings, sources, is_url):
    """Raises UserError for a source that doesn't exist, and for settings that don't fit the sources."""
    for source in sources:
        if not is_url and not os.path.isfile(source) and not os.path.isdir(source):
            raise UserError(f"{source} is not a file, a folder, a URL, or one of {', '.join(TOKENIZERS)}")
    if is_url and Path(urlsplit(sources[0]).path).suffix.lower() in documents.READERS:
        raise UserError(f"{sources[0]}: only texts are fetched from a URL; download the file, and give its path")
    if len(sources) > 1 and not settings.name:
        raise UserError(f"{len(sources)} sources make one data set: choose its name with --name=NEW")
    if settings.files and not any(map(os.path.isdir, sources)):
        raise UserError(f"files = {settings.files}: has no effect without a folder; leave it out")


def prepare_documents(settings, source, folder):
    """Prepares the first max_files files (0: all) of a documents.Source. Returns the path of a recipe in config/.

    The recipe depends on the training tokens found: above GPT2_TOKENS, it trains a GPT-2 from scratch.
    """
    source = source._replace(files=source.files[:settings.max_files or None])
    meta = documents.prepare(source, folder, settings.tokenizer, settings.val_fraction, settings.processes)
    return "config/gpt2.py" if meta["train_tokens"] > GPT2_TOKENS else text_recipe(settings.tokenizer)


def check_kind(settings, kind):
    """Raises UserError for a setting that has no effect on sources of this kind, a key of SETTINGS_OF."""
    for name in sorted(set(sum(SETTINGS_OF.values(), ())) - set(SETTINGS_OF[kind])):
        check_idle(settings, f"does nothing for {kind}", name)


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS, SOURCES, GIVEN)
