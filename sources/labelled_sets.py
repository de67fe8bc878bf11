"""Texts with labels that are known by name: fetches each, and yields its rows as `labelled.prepare` takes them.

    python prepare.py help_topics                       pages of LibreOffice's help and their topics, by apt-get
    python prepare.py help_languages                    its sentences in 32 languages, by apt-get
    python prepare.py home_assistant_intents            commands to a house, their slots and intents, by pip
    python prepare.py atis                              questions on flights, their slots and intents, from GitHub
    python prepare.py snips                             orders to a voice assistant, likewise
    python prepare.py sst2                              phrases of film reviews: positive or negative? from GLUE
    python prepare.py imdb                              film reviews: positive or negative? from Stanford
    python prepare.py flights                           questions of air travellers, made by data/flights/generate.py
    python prepare.py facts                             questions on texts, made by data/facts/generate.py
    python prepare.py squad                             questions on Wikipedia's articles, SQuAD 2.0

data/<name>/README.md says what each holds.
"""

import hashlib
import json
import re
import runpy
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from configurator import UserError
from machine.terminal import watched
from sources import questions
from sources.corpora import HELP, apt_get, help_codes, help_in, help_package, paragraphs, unpack
from sources.download import Offline, download
from sources.labelled import read_tags
from sources.pairs import WORD, place_of, split_of

ROOT = Path(__file__).resolve().parents[1]
TOPICS = {"sbasic": "basic", "scalc": "calc", "schart": "chart", "sdatabase": "database", "sdraw": "draw",
          "shared": "shared", "simpress": "impress", "smath": "math", "swriter": "writer"}  # {folder: topic}
PAGES, SENTENCES = 0.2, 600  # help_languages: the share of the pages that it reads, the most sentences of a language
PARALLEL = "https://raw.githubusercontent.com/monologg/JointBERT/00324f60dda4a491b2913bc3065ae93966caea3f/data"
SST2 = "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip"
IMDB = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
SQUAD = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
CHECKSUMS = {  # of all that is downloaded: SHA-256, or the MD5 that is published
    "atis": "0eb296184a86edd4d61fc00aed9dc2c62760ec2e0d533c61e4f5d28b3896bd5b",
    "snips": "f8378c640a65544090f4bf2902a6f6d9045f72abc0cdb03d8ca5dfd66bbdba44",
    "train-v2.0.json": "68dcfbb971bd3e96d5b46c7177b16c1a4e7d4bdef19fb204502738552dede002",
    "dev-v2.0.json": "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
    "sst2": "9f81648d4199384278b86e315dac217c", "imdb": "7c2ac02c03563afcf9b574c7e56c153a"}
INTENTS = ("home-assistant-intents", "2026.10.27", "256eb1e4fc6e6f4943d0ba4e089c9639d74d0e9d62ccddeb7148bc168de55e40")


def fetch(name, languages, folder):
    """Returns (rows, source, revision) of a known set. rows: an iterable of dicts. The others: for meta.json.

    languages: a list of codes. folder: what is downloaded and kept lies there. Raises Offline without a network or
    the tool that downloads, and UserError for a language that the set doesn't have.
    """
    of_languages = {"help_topics": help_topics, "help_languages": help_languages,
                    "home_assistant_intents": home_assistant_intents}
    if name in of_languages:
        return of_languages[name](languages, folder)
    if languages:
        raise UserError(f"languages = {','.join(languages)}: {name} is in English alone; leave it out")
    loaders = {"atis": parallel, "snips": parallel, "sst2": sst2, "imdb": imdb,
               "flights": made, "facts": made, "squad": squad}
    return loaders[name](name, folder / "download")


# ----------------------------------------------------------------------------------------------------------------------
# LibreOffice's help

def help_topics(languages, folder):
    if len(languages) != 1:
        raise UserError(f"languages = {','.join(languages)}: help_topics is of one language, such as --languages=en")
    (_, pages, version), = help_pages(languages)
    rows = [{"text": " ".join(found.values()), "labels": [TOPICS[page.partition("/")[0]]], "page": page}
            for page, found in pages.items() if page.partition("/")[0] in TOPICS]
    return rows, f"Debian package {help_package(languages[0])}", version


def help_languages(languages, folder):
    """Sentences of the help and their languages. languages: []: all but British English, most of which is English."""
    languages = languages or [code for code in help_codes() if code != "en-gb"] or ["en"]
    sentences, versions = {}, {}  # {sentence: {language: page}}; {version: None}, in order
    for language, pages, version in help_pages(languages, share=PAGES):
        versions[version] = None
        for page, found in pages.items():
            for text in found.values():
                text = " ".join(text.split())
                if 3 <= len(WORD.findall(text)) <= 20 and len(text) <= 200:
                    sentences.setdefault(text, {})[language] = page
    rows = {language: [] for language in languages}
    for text, found in sentences.items():
        if len(found) == 1:  # else code, a name, or not translated
            (language, page), = found.items()
            rows[language].append({"text": text, "labels": [language], "page": page})
    for found in rows.values():
        found.sort(key=lambda row: place_of(row["text"]))
    chosen = [row for found in rows.values() for row in found[:SENTENCES]]
    return chosen, f"Debian packages libreoffice-help-{{{','.join(languages)}}}", " and ".join(versions)


def help_pages(languages, share=1.0):
    """Yields (language, {path of a page: {id: paragraph}}, version) of the help in some languages.

    share: of the pages, the same ones in each language.
    """
    packages = [help_package(language) for language in languages]
    with tempfile.TemporaryDirectory() as downloaded:
        apt_get(packages, downloaded)
        for language, package in zip(languages, packages):
            with tempfile.TemporaryDirectory() as temporary:
                version = unpack(package, downloaded, temporary)
                root = help_in(Path(temporary, "usr/share/libreoffice/help"), package.removeprefix(HELP))
                names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.html"))
                names = [name for name in names if place_of(f"page {name}") < share]
                pages = {name: paragraphs((root / name).read_text(encoding="utf-8"))
                         for name in watched(names, f"reading pages in {language}")}
            print(f"{package} {version}: {len(pages):,} pages", flush=True)
            yield language, pages, version


# ----------------------------------------------------------------------------------------------------------------------
# Commands to a house

def home_assistant_intents(languages, folder):
    if languages != ["en"]:
        raise UserError(f"languages = {','.join(languages)}: home_assistant_intents is in English alone,"
                        " --languages=en")
    package, version, expected = INTENTS
    wheel = pip_download(package, version, folder / "download")
    check([wheel], expected)
    with zipfile.ZipFile(wheel) as file:
        intents = json.loads(file.read("home_assistant_intents/data/en.json"))
    generate = runpy.run_path(str(ROOT / "data/home_assistant_intents/generate.py"))["generate"]
    return generate(intents), f"{package} on PyPI", version


def pip_download(package, version, folder):
    """The path of a package's wheel in the folder. It is downloaded by pip if missing, and not installed."""
    found = sorted(folder.glob(f"{package.replace('-', '_')}-{version}-*.whl"))
    if found:
        return found[0]
    print(f"downloading {package} {version} by pip", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder),
               f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = sorted(folder.glob(f"{package.replace('-', '_')}-{version}-*.whl"))
    if done.returncode or not found:
        said = done.stderr.strip().splitlines()
        raise Offline(f"{package} {version} can't be downloaded ({said[-1] if said else 'pip failed'}): go online, or"
                      f" put its wheel into {folder}")
    return found[0]


def check(paths, expected):
    """Raises UserError unless the files, one after the other, have the checksum: SHA-256, or MD5 in 32 digits."""
    digest = hashlib.md5() if len(expected) == 32 else hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    if digest.hexdigest() != expected:
        raise UserError(f"{paths[0]}{' and others are' if paths[1:] else ' is'} not as expected ({digest.name}"
                        f" {digest.hexdigest()}): delete {paths[0].parent} and run again")


# ----------------------------------------------------------------------------------------------------------------------
# Published sets

def parallel(name, folder):
    """ATIS and SNIPS as Goo et al. 2018 split them, in folders with seq.in, seq.out and label."""
    files = [f"{split}/{file}" for split in ("train", "dev", "test") for file in ("seq.in", "seq.out", "label")]
    for file in files:
        fetch_file(f"{PARALLEL}/{name}/{file}", folder / file)
    check([folder / file for file in files], CHECKSUMS[name])
    return read_tags([folder]), f"{PARALLEL}/{name}", ""


def fetch_file(url, path):
    """Downloads a file, if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        download(url, path)


def sst2(name, folder):
    """The publisher's dev part is the test here: the labels of the published test part are secret."""
    path = folder / "SST-2.zip"
    fetch_file(SST2, path)
    check([path], CHECKSUMS[name])
    rows = []
    with zipfile.ZipFile(path) as file:
        for part, split in (("train", "train"), ("dev", "test")):
            _, *found = file.read(f"SST-2/{part}.tsv").decode("utf-8").splitlines()
            for line in found:
                text, label = line.rsplit("\t", 1)
                rows.append({"text": text, "labels": [{"0": "negative", "1": "positive"}[label]], "split": split})
    return rows, SST2, ""


def imdb(name, folder):
    """Reviews with labels. The page of a row is the film, so that validation is on films that training lacks."""
    path = folder / "aclImdb_v1.tar.gz"
    fetch_file(IMDB, path)
    check([path], CHECKSUMS[name])
    texts, films = {}, {}
    with tarfile.open(path) as file:
        for member in file:
            if match := re.search("(train|test)/(urls_)?(pos|neg)(?:/([0-9]+)_[0-9]+)?[.]txt$", member.name):
                split, is_list, label, number = match.groups()
                text = file.extractfile(member).read().decode("utf-8")
                if is_list:
                    films[split, label] = re.findall(r"title/(\w+)", text)  # line N: of review N
                else:
                    texts[split, label, int(number)] = re.sub("<br */?>", " ", text)
    names = {"pos": "positive", "neg": "negative"}
    rows = [{"text": text, "labels": [names[label]], "split": split, "page": films[split, label][number]}
            for (split, label, number), text in sorted(texts.items())]
    return rows, IMDB, ""


# ----------------------------------------------------------------------------------------------------------------------
# Questions of air travellers

def squad(name, folder):
    """The dev part is the test here: the published test part is secret. Validation: some of the training articles."""
    paths = [folder / f"{part}-v2.0.json" for part in ("train", "dev")]
    for path in paths:
        fetch_file(f"{SQUAD}/{path.name}", path)
        check([path], CHECKSUMS[path.name])
    (train, dev) = ([*questions.read([path])] for path in paths)
    rows = [{**row, "split": "train" if split_of(row["page"], 0.05) == "train" else "val"} for row in train]
    return rows + [{**row, "split": "test"} for row in dev], SQUAD, ""


def made(name, folder):
    script = f"data/{name}/generate.py"
    return runpy.run_path(str(ROOT / script))["generate"](), script, ""
