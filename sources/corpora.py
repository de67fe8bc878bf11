"""Parallel texts that are known by name: fetches each, and yields its rows as `pairs.prepare` takes them.

    python prepare.py libreoffice_help --languages=en,it     from two Debian packages, by apt-get; needs no root
    python prepare.py bible_en_es                            verses, from two Debian packages, with links of words
    python prepare.py opus_books --languages=en,it           novels, from the Hugging Face Hub
    python prepare.py multi30k --languages=en,de             captions of photographs, from GitHub
    python prepare.py phrases                                made here, needs no network

data/<name>/README.md says what each holds. A row is a dict with source and target, and with page (rows of a page stay
in one split) or split. Links, which bible_en_es has, are pairs [source word, target word] of numbers from 0: the second
word translates the first. Words are what spaces separate.
"""

import gzip
import hashlib
import html
import os
import re
import runpy
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

from configurator import UserError
from machine.terminal import watched
from sources.documents import hub, hub_source
from sources.download import Offline, download
from sources.pairs import read_rows

BIBLES = {  # {language: (Debian package, the module in it)}
    "en": ("sword-text-kjv", "engKJV2006eb"), "es": ("sword-text-sparv", "spaRV1909eb")}
HELP = "libreoffice-help-"  # how the names of LibreOffice's packages begin
OPUS_BOOKS = ("Helsinki-NLP/opus_books", "1f9f6191d0e91a3c539c2595e2fe48fc1420de9b")  # data set, commit
PASSAGE = 100  # sentences of a book that follow each other and stay in one split
MULTI30K = "https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw"
CAPTIONS = {"train": "train", "val": "val", "test": "test_2016_flickr"}  # {split: start of the files' names}
CHECKSUMS = {  # SHA-256 of a language's three compressed files, one after the other
    "cs": "e80c733e5cfc3af3ed5919ac4f45b6a4f46f96bce341c0c0588e41be9bafff52",
    "de": "4bdd16707a89a1cb493b7c825f66310040b48a45bef3b2df3bbc4642bf471196",
    "en": "b5fd6f8a3aaea3a30cb23f385f5e8649b47cf825b6580f98e1d75789a3be00c7",
    "fr": "56e343a0946cdae3f45a3ce4b121895bc8c3eabebeaeaa48bda6fa1df9c09010"}


def fetch(name, languages, folder):
    """Returns (rows, source, revision) of a known parallel text. rows: an iterable of dicts. The others: for meta.json.

    languages: two codes, source first. folder: what is downloaded and kept lies there. Raises Offline without a network
    or apt-get, and UserError for a language that the text doesn't have.
    """
    loaders = {"libreoffice_help": libreoffice_help, "bible_en_es": bible_en_es, "opus_books": opus_books,
               "multi30k": multi30k, "phrases": phrases}
    return loaders[name](languages, folder)


# ----------------------------------------------------------------------------------------------------------------------
# LibreOffice's help: a page is the same file in each language, and a paragraph has the same id

PARAGRAPH = re.compile(r'<(p|h[1-6])\b[^>]*\bid="(\w+)"[^>]*>(.*?)</\1>', re.DOTALL)


def libreoffice_help(languages, folder):
    packages = [help_package(language) for language in languages]
    with tempfile.TemporaryDirectory() as temporary:
        apt_get(packages, temporary)
        versions = [unpack(package, temporary, temporary) for package in packages]
        help_folder = Path(temporary, "usr/share/libreoffice/help")
        roots = [help_in(help_folder, package.removeprefix(HELP)) for package in packages]
        pages = sorted(path.relative_to(roots[0]).as_posix() for path in roots[0].rglob("*.html"))
        pages = [page for page in pages if (roots[1] / page).is_file()]
        rows = [row for page in watched(pages, "reading pages") for row in aligned(page, *roots)]
    print(f"{packages[0]} {versions[0]}, {packages[1]} {versions[1]}: {len(pages):,} pages", flush=True)
    return rows, f"Debian packages {packages[0]} and {packages[1]}", " and ".join(dict.fromkeys(versions))


def apt_get(packages, folder):
    """Downloads Debian packages into the folder."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise Offline(f"{packages[0]} is a Debian package, and this machine has no apt-get: prepare it on Debian or"
                      " Ubuntu")
    more = f" and {len(packages) - 1} more packages" if packages[1:] else ""
    print(f"downloading {packages[0]}{more}", flush=True)
    # As root, apt would like to work as another user, who can't write into this folder.
    command = ["apt-get", "-o", "APT::Sandbox::User=root", "download", *packages]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    absent = [package for package in packages if not list(Path(folder).glob(f"{package}_*.deb"))]
    if done.returncode or absent:
        raise missing([*absent, *packages][0], done.stderr.strip().splitlines())


def unpack(package, folder, to):
    """Unpacks a package, which `apt_get` has put into the folder, into the folder `to`. Returns its version."""
    file = str(next(Path(folder).glob(f"{package}_*.deb")))
    subprocess.run(["dpkg-deb", "-x", file, to], check=True)
    shown = subprocess.run(["dpkg-deb", "-f", file, "Version"], check=True, capture_output=True, text=True)
    return shown.stdout.strip()


def missing(package, said):
    """The error for a package that apt-get did not download. said: the lines of its complaint."""
    codes = help_codes()
    if package.startswith(HELP) and codes and package not in map(help_package, codes):
        return UserError(f"there is no package {package}: choose languages of {', '.join(codes)}")
    remedy = "go online" if codes else "run apt-get update (as root) first"
    return Offline(f"{package} can't be downloaded ({said[-1] if said else 'apt-get failed'}): {remedy}")


def help_package(language):
    return HELP + {"en": "en-us"}.get(language, language).lower()


def help_codes():
    """The languages that the help has, as far as apt-get knows: a sorted list of codes."""
    no_apt = not shutil.which("apt-cache")
    names = "" if no_apt else subprocess.run(["apt-cache", "pkgnames", HELP], capture_output=True, text=True).stdout
    codes = {name.removeprefix(HELP) for name in names.split()} - {"common"}
    return sorted({"en-us": "en"}.get(code, code) for code in codes)


def help_in(folder, code):
    """The folder of the pages in the language of a package, such as help/en-US/text for en-us."""
    return next(path / "text" for path in folder.iterdir() if path.name.lower() == code)


def aligned(page, *roots):
    """The rows of a page: the paragraphs that have an id in both languages."""
    sources, targets = (paragraphs((root / page).read_text(encoding="utf-8")) for root in roots)
    names = [name for name in sources if name in targets]
    return [{"source": sources[name], "target": targets[name], "page": page} for name in names]


def paragraphs(page):
    """{id: text} of the paragraphs and headings of a page in HTML."""
    return {name: Paragraph(text).text for _, name, text in PARAGRAPH.findall(page)}


class Paragraph(HTMLParser):
    """Parses a paragraph. text: without tags; of each group of alternatives, the first one that is not for a Mac.

    Alternatives are hidden spans inside one span, such as "Cmd" for a Mac and "Ctrl" for others; the browser shows one.
    """

    def __init__(self, content):
        super().__init__()
        self.text = ""
        self.spans = [{"shown": True, "chosen": False}]  # those that are open; chosen: an alternative in it is shown
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag == "br":
            self.text += " "
        elif tag == "span":
            outer, attributes = self.spans[-1], dict(attributes)
            shown = outer["shown"]
            if "hidden" in attributes:
                shown = shown and not outer["chosen"] and attributes.get("class") != "MAC"
                outer["chosen"] |= shown
            self.spans.append({"shown": shown, "chosen": False})

    def handle_endtag(self, tag):
        if tag == "span" and len(self.spans) > 1:
            self.spans.pop()

    def handle_data(self, data):
        if self.spans[-1]["shown"]:
            self.text += data


# ----------------------------------------------------------------------------------------------------------------------
# The Bible: modules of the SWORD project, format zText, marked up in OSIS. A word, or a few, are marked with the number
# that Strong's concordance gives to the Hebrew or Greek word which they translate.

NO_TEXT = re.compile(r"<(note|title)\b[^>]*(?<!/)>.*?</\1>|¶|\\nd ", re.DOTALL)  # \nd: a slip of the converter
CHAPTER = re.compile(r'<chapter [^>]*osisID="([^"]+)"')


def bible_en_es(languages, folder):
    if set(languages) != set(BIBLES):
        raise UserError(f"languages = {','.join(languages)}: bible_en_es has only en and es")
    packages, modules = zip(*(BIBLES[language] for language in languages))
    with tempfile.TemporaryDirectory() as temporary:
        apt_get(packages, temporary)
        versions = [unpack(package, temporary, temporary) for package in packages]
        texts = Path(temporary, "usr/share/sword/modules/texts/ztext")
        rows = list(verses(*([*entries(texts / module)] for module in modules)))
    print(f"{packages[0]} {versions[0]}, {packages[1]} {versions[1]}: {len(rows):,} verses", flush=True)
    return rows, f"Debian packages {packages[0]} and {packages[1]}", " and ".join(versions)


def entries(module):
    """Yields the entries of a module's folder, as text in OSIS: headings and verses, "" where there is none.

    Of each testament, .bzz holds compressed blocks, .bzs where each of them is, and .bzv where in them each entry is.
    Bibles with the same verses have as many entries, in the same order.
    """
    for part in ("ot", "nt"):
        places, blocks, packed = ((module / f"{part}.{end}").read_bytes() for end in ("bzv", "bzs", "bzz"))
        blocks = struct.iter_unpack("<III", blocks)
        unpacked = [zlib.decompress(packed[start:start + size]) for start, size, _ in blocks]
        for block, start, size in struct.iter_unpack("<IIH", places):
            yield unpacked[block][start:start + size].decode("utf-8") if size else ""


def verses(sources, targets):
    """Yields the rows of two Bibles, without links to words that stand for several. sources, targets: their entries."""
    page = ""
    for source, target in zip(sources, targets, strict=True):
        if heading := CHAPTER.search(source):
            page = heading[1]
        (text, words), (other, others) = read_verse(source), read_verse(target)
        if text or other:  # else it is a heading
            links = sorted([words[number], others[number]] for number in words.keys() & others.keys())
            yield {"source": text, "target": other, "page": page, "links": links}


def read_verse(osis):
    """(text, {Strong's number: the word that it marks}) of a verse: those numbers that mark just one word, once."""
    text, marks = "", []  # marks: (numbers, where the text that they mark starts, where it ends)
    for piece in re.split("(<[^>]*>)", NO_TEXT.sub("", osis)):
        if piece.startswith("<w "):
            numbers, start = re.findall(r"strong:(\w+)", piece), len(text)
        elif piece == "</w>":
            marks.append((numbers, start, len(text)))
        elif not piece.startswith("<"):
            text += html.unescape(piece)
    often = Counter(number for numbers, *_ in marks for number in numbers)
    spans, found = [word.span() for word in re.finditer(r"\S+", text)], {}
    for numbers, start, end in marks:
        marked = [i for i, (first, last) in enumerate(spans) if first < end and start < last]
        if len(numbers) == len(marked) == often[numbers[0]] == 1:
            found[numbers[0]] = marked[0]
    return " ".join(text.split()), found


# ----------------------------------------------------------------------------------------------------------------------
# Other corpora

def opus_books(languages, folder):
    name, revision = OPUS_BOOKS
    pair = "-".join(sorted(languages))
    try:
        with hub(name) as api:
            pairs = [entry.path for entry in api.list_repo_tree(name, revision=revision, repo_type="dataset")]
        if pair not in pairs:
            known = ", ".join(sorted(path for path in pairs if re.fullmatch("[a-z]+-[a-z]+", path)))
            raise UserError(f"languages = {','.join(languages)}: opus_books has no such pair, only {known}")
        source = hub_source(name, pair, revision)
        paths = [source.fetch(path, folder) for path, _ in source.files]
    except UserError as error:
        if "can't be fetched" in str(error):
            raise Offline(str(error)) from None
        raise
    rows = ({"source": row["source"], "target": row["target"], "page": f"passage {number // PASSAGE}"}
            for number, row in enumerate(read_rows(paths, languages)))
    return rows, f"{name} {pair}", revision


def multi30k(languages, folder):
    for language in languages:
        if language not in CHECKSUMS:
            raise UserError(f"languages = {','.join(languages)}: multi30k has only {', '.join(CHECKSUMS)}")
    texts = [captions(language, folder / "download") for language in languages]
    rows = [{"source": source, "target": target, "split": split}
            for split in CAPTIONS for source, target in zip(texts[0][split], texts[1][split], strict=True)]
    return rows, MULTI30K, ""


def captions(language, folder):
    """{split: lines} of one language of Multi30k, which is downloaded if it is not in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {split: folder / f"{name}.{language}.gz" for split, name in CAPTIONS.items()}
    for path in paths.values():
        if not path.exists():
            download(f"{MULTI30K}/{path.name}", path)
    found = hashlib.sha256(b"".join(path.read_bytes() for path in paths.values())).hexdigest()
    if found != CHECKSUMS[language]:
        raise UserError(f"{folder}/*.{language}.gz are not the expected files (SHA-256 {found}): delete them and run"
                        " again")
    return {split: gzip.decompress(path.read_bytes()).decode("utf-8").splitlines() for split, path in paths.items()}


def phrases(languages, folder):
    if set(languages) != {"en", "it"}:
        raise UserError(f"languages = {','.join(languages)}: phrases has only en and it")
    script = "data/phrases/generate.py"
    made = runpy.run_path(str(Path(__file__).resolve().parents[1] / script))["generate"]()
    return [{"source": row[languages[0]], "target": row[languages[1]]} for row in made], script, ""
