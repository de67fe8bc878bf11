"""Texts with labels that are known by name: fetches each, and yields its rows as `labelled.prepare` takes them.

    python prepare.py help_topics                       pages of LibreOffice's help and their topics, by apt-get
    python prepare.py home_assistant_intents            commands to a house, their slots and intents, by pip
    python prepare.py flights                           questions of air travellers, made by data/flights/generate.py

data/<name>/README.md says what each holds.
"""

import hashlib
import json
import runpy
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from configurator import UserError
from machine.terminal import watched
from sources.corpora import help_in, paragraphs, unpack
from sources.download import Offline

ROOT = Path(__file__).resolve().parents[1]
TOPICS = {"sbasic": "basic", "scalc": "calc", "schart": "chart", "sdatabase": "database", "sdraw": "draw",
          "shared": "shared", "simpress": "impress", "smath": "math", "swriter": "writer"}  # {folder: topic}
INTENTS = ("home-assistant-intents", "2026.10.27", "256eb1e4fc6e6f4943d0ba4e089c9639d74d0e9d62ccddeb7148bc168de55e40")


def fetch(name, languages, folder):
    """Returns (rows, source, revision) of a known set. rows: an iterable of dicts. The others: for meta.json.

    languages: a list of codes. folder: what is downloaded and kept lies there. Raises Offline without a network or
    the tool that downloads, and UserError for a language that the set doesn't have.
    """
    loaders = {"help_topics": help_topics, "home_assistant_intents": home_assistant_intents,
               "flights": flights}
    return loaders[name](languages, folder)


# ----------------------------------------------------------------------------------------------------------------------
# LibreOffice's help

def help_topics(languages, folder):
    language = only(languages, "help_topics")
    pages, package, version = help_pages(language)
    rows = [{"text": " ".join(found.values()), "labels": [TOPICS[page.partition("/")[0]]], "page": page}
            for page, found in pages.items() if page.partition("/")[0] in TOPICS]
    return rows, f"Debian package {package}", version


def only(languages, name):
    if len(languages) != 1:
        raise UserError(f"languages = {','.join(languages)}: {name} is of one language, such as --languages=en")
    return languages[0]


def help_pages(language):
    """({path of a page: {id: paragraph}}, Debian package, its version) of the help in a language."""
    package = "libreoffice-help-" + {"en": "en-us"}.get(language, language).lower()
    with tempfile.TemporaryDirectory() as temporary:
        version = unpack(package, temporary)
        root = help_in(Path(temporary, "usr/share/libreoffice/help"), package.removeprefix("libreoffice-help-"))
        paths = sorted(root.rglob("*.html"))
        pages = {path.relative_to(root).as_posix(): paragraphs(path.read_text(encoding="utf-8"))
                 for path in watched(paths, f"reading pages in {language}")}
    print(f"{package} {version}: {len(pages):,} pages", flush=True)
    return pages, package, version


# ----------------------------------------------------------------------------------------------------------------------
# Commands to a house

def home_assistant_intents(languages, folder):
    if languages != ["en"]:
        raise UserError(f"languages = {','.join(languages)}: home_assistant_intents has values for English alone: en")
    package, version, expected = INTENTS
    wheel = pip_download(package, version, folder / "download")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != expected:
        raise UserError(f"{wheel} is not the expected file (SHA-256 {found}): delete it and run again")
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


# ----------------------------------------------------------------------------------------------------------------------
# Questions of air travellers

def flights(languages, folder):
    if languages != ["en"]:
        raise UserError(f"languages = {','.join(languages)}: flights is in English alone: en")
    script = "data/flights/generate.py"
    return runpy.run_path(str(ROOT / script))["generate"](), script, ""
