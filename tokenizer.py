"""Text to token ids and back: characters, bytes, words, GPT-2's BPE, or a BPE trained on your text. Saved as JSON.

    python prepare.py my.txt --tokenizer=char|byte|gpt2|bpe:4096|word:2
    python prepare.py my.txt --tokenizer=out            the tokenizer of a trained model, from the model's folder

A control token in a text, such as <|endoftext|>, is encoded as ordinary text, except by `encode_controls`.
"""

import collections
import contextlib
import itertools
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import UserError
from machine.terminal import progress

MOST_TOKENS = 1 << 20  # the largest vocab_size of a BPE: the library reserves memory for all tokens before training
ENDS = ("<|endoftext|>", "<eos>", "</s>", "<|end_of_text|>")  # names of end-of-text tokens; the first counts
TEMPLATE = "chat_template.jinja"  # the name of the file that holds a tokenizer's template
JOINER = "\u2060"  # Unicode's word joiner, invisible: see WordTokenizer
LONGEST_WORD = 256  # characters: longer words are cut for BPE training, which would take very long over them


class Tokenizer:
    """The base class. Subclasses add kind, vocab_size, encode(text) -> int64 ids (T,), and decode(ids) -> text.

    as_library() returns the same as a tokenizers.Tokenizer, which other programs, such as transformers, can use.
    """

    eos = None  # the id of the end-of-text token; None if there is none
    ends = ()  # ids that end a sample, eos among them
    start = ()  # ids that begin every text
    pad = bos = unk = None  # likewise: padding, the start of a text, and an unknown word
    template = ""  # how a dialogue is written, in Jinja: see chat.py; saved beside the tokenizer
    fields = {}  # the arguments of __init__, which are saved beside the kind
    unit = "tokens"

    def __repr__(self):
        return f"{type(self).__name__}({self.vocab_size} {self.unit})"

    def encode_controls(self, text):
        """Like encode, but turns each control token in the text into its id, if the tokenizer has such tokens."""
        return self.encode(text)

    def as_library(self):
        raise UserError(f"{self!r} can't be published: the tokenizers library has no such form; use bpe:SIZE instead")

    def save(self, path):
        """Writes the file in place, not atomically: write to a temporary path and rename if others may read it."""
        saved = json.dumps({"kind": self.kind, **self.fields}, ensure_ascii=False, indent=1)
        Path(path).write_text(saved + "\n", encoding="utf-8", newline="\n")
        self.save_template(path)

    def save_template(self, path):
        """Writes the template into a file beside `path`, under the name that other programs look for."""
        if self.template:
            Path(path).with_name(TEMPLATE).write_text(self.template, encoding="utf-8", newline="\n")


class CharTokenizer(Tokenizer):
    """One id per character: its index in `characters`."""
    kind, unit = "char", "characters"

    def __init__(self, characters):
        self.characters = "".join(characters)
        self.fields = {"characters": self.characters}
        self.vocab_size = len(self.characters)
        self.ids = np.full(0x110000, -1, dtype=np.int32)  # the id of each code point, or -1
        self.ids[[ord(character) for character in self.characters]] = np.arange(self.vocab_size)

    def encode(self, text):
        """Returns the ids. Raises UserError for the first character outside the vocabulary."""
        ids = self.ids[np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)]
        if (ids < 0).any():
            at = int((ids < 0).argmax())
            raise UserError(f"the character {text[at]!r} (U+{ord(text[at]):04X}), in {text[max(0, at - 20):at + 20]!r},"
                            f" is not among the vocabulary's {self.vocab_size} characters: {self.characters!r:.200}")
        return ids.astype(np.int64)

    def decode(self, ids):
        return "".join([self.characters[i] for i in ids])

    def as_library(self):
        """It raises an Exception for a character outside the vocabulary, as it has no token for unknown ones."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        library = Tokenizer(models.WordLevel({character: i for i, character in enumerate(self.characters)}))
        library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # every character is a word
        library.decoder = decoders.Fuse()
        return library


class ByteTokenizer(Tokenizer):
    """One id per byte of the text in UTF-8. Any text can be encoded."""
    kind, vocab_size, unit = "byte", 256, "bytes"

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids):
        return bytes(list(ids)).decode("utf-8", errors="replace")

    def as_library(self):
        return byte_level([bytes([i]) for i in range(256)], words=False)


class WordTokenizer(Tokenizer):
    """One id per word or punctuation mark, in its own case. A word outside the vocabulary becomes <unk>.

    A token that stands beside another without a space holds a JOINER on that side, as the last token of "so." does. So
    decode(encode(text)) is the text, if all words are known and its spaces are single. A mark that is known with other
    JOINERs only is encoded as one of those. Words are not found in scripts without spaces, such as Chinese.
    """
    kind, unit = "word", "words"
    pad, bos, eos, unk = range(4)
    SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
    # A line end; a word up to its apostrophe, as in l'ora; a word, with what stands inside, as in A1:B2; a single mark.
    PATTERN = re.compile(r"\n|\w+(?:[^\w\s'’]+\w+)*(?:['’](?=\w))?|[^\w\s]")

    def __init__(self, words):
        self.words = (*self.SPECIAL, *words)
        self.fields = {"words": self.words[len(self.SPECIAL):]}
        self.vocab_size = len(self.words)
        self.ids = {word: i for i, word in enumerate(self.words)}
        for word in self.words[len(self.SPECIAL):]:
            self.ids.setdefault(word.strip(JOINER), self.ids[word])  # the first is the most frequent

    @classmethod
    def train(cls, texts, least):
        """The vocabulary of all words that occur at least `least` times in the strings `texts`."""
        counts = collections.Counter(word for text in texts for word in cls.split(text))
        words = [word for word in sorted(counts, key=lambda word: (-counts[word], word)) if counts[word] >= least]
        if not words:
            raise UserError(f"tokenizer = word:{least}: no word occurs {least} times; word:2 keeps those seen twice")
        print(f"words that occur at least {least} times: {len(words):,} of {len(counts):,}", flush=True)
        return cls(words)

    @classmethod
    def split(cls, text):
        """The words and marks of a text, a list of str, with their JOINERs."""
        text, found = text.replace(JOINER, ""), []
        for match in cls.PATTERN.finditer(text):
            word, before, after = match[0], text[match.start() - 1:match.start()], text[match.end():match.end() + 1]
            is_mark = not is_wordy(word[0])
            glued_left = word == "\n" or is_mark and before and not before.isspace()
            glued_right = word == "\n" or is_wordy(after) and not is_wordy(word[-1])
            found.append(JOINER * bool(glued_left) + word + JOINER * bool(glued_right))
        return found

    def find(self, word):
        return self.ids.get(word, self.ids.get(word.strip(JOINER), self.unk))

    def encode(self, text):
        return np.array([self.find(word) for word in self.split(text)], dtype=np.int64)

    def unknown(self, text):
        """The different words of the text that are outside the vocabulary, in order: a list of str."""
        words = (word for word in self.split(text) if self.find(word) == self.unk)
        return list(dict.fromkeys(word.strip(JOINER) for word in words))

    def decode(self, ids):
        text = " ".join(self.words[i] for i in ids)
        return text.replace(f" {JOINER}", "").replace(f"{JOINER} ", "").replace(JOINER, "")


def is_wordy(text):
    """True if the text is not empty, and holds letters, digits and underscores only."""
    return text.replace("_", "a").isalnum()


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE, from tiktoken, which downloads 1.5 MB of merges the first time."""
    kind, vocab_size = "gpt2", 50257

    def __init__(self):
        import tiktoken
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except OSError as error:  # requests' errors are OSErrors
            raise UserError(f"the gpt2 tokenizer could not download its merges ({type(error).__name__}): go"
                            " online once, or use --tokenizer=bpe:4096") from None
        self.eos = self.bpe.eot_token

    def encode(self, text):
        return np.array(self.bpe.encode_ordinary(text), dtype=np.int64)

    def decode(self, ids):
        return self.bpe.decode(list(map(int, ids)))

    def as_library(self):
        library = byte_level([self.bpe.decode_single_token_bytes(i) for i in range(self.eos)])
        library.add_special_tokens(["<|endoftext|>"])  # it gets the next id
        return library


class BPETokenizer(Tokenizer):
    """A BPE of the tokenizers library, trained here or published with a model; or BERT's WordPiece, or another kind of
    that library. Its file has that library's format.

    ends: ids of control tokens that end a text, the usual one first; without one, ENDS tells by their names.
    roles: {"bos" or "pad": id} of the control tokens that other programs use so; kept for publishing only.
    """
    kind = "bpe"

    def __init__(self, bpe, ends=(), roles=None):
        self.bpe, self.known = bpe, set()  # known: characters found to have tokens
        bpe.no_truncation()
        bpe.no_padding()
        self.vocab_size = max(bpe.get_vocab().values()) + 1  # some ids may be unused
        named = [token for token in map(bpe.token_to_id, ENDS) if token is not None]
        controls = bpe.get_added_tokens_decoder()
        self.ends = [token for token in ends if token in controls] or named[:1]
        self.eos = next(iter(self.ends), None)
        self.marked = self.ends != named[:1]  # the names don't tell
        self.roles = {role: token for role, token in (roles or {}).items() if token in controls}
        self.start = first_controls(bpe)
        self.pad, self.bos = map(bpe.token_to_id, ("<pad>", "<bos>"))

    @classmethod
    def train(cls, texts, vocab_size, special=("<|endoftext|>",), exact=True):
        """Learns a BPE of vocab_size tokens from an iterable of strings. special: control tokens, with ids 0, 1, ...

        exact: raise UserError if the text yields fewer tokens; False: take those.
        """
        import tokenizers
        least = 256 + len(special)
        if vocab_size < least:
            raise UserError(f"tokenizer = bpe:{vocab_size}: 256 bytes and the special tokens need at least bpe:{least}")
        if vocab_size > MOST_TOKENS:
            raise UserError(f"tokenizer = bpe:{vocab_size}: a BPE may have at most bpe:{MOST_TOKENS}")
        bpe = tokenizers.ByteLevelBPETokenizer()
        bpe.train_from_iterator(short_words(texts), vocab_size, min_frequency=0, show_progress=False,
                                special_tokens=list(special))
        most = bpe.get_vocab_size()
        if most < vocab_size and exact:
            raise UserError(f"tokenizer = bpe:{vocab_size}: the text yields only {most} tokens; use bpe:{most} or less")
        return cls(tokenizers.Tokenizer.from_str(bpe.to_str()))

    def encode(self, text):
        """Returns the ids. Raises UserError for a character without a token, which the library would drop silently."""
        ids, characters = self.encode_controls(text, False), set(text)
        if lost := sorted(filter(self.drops, characters - self.known)):
            raise UserError(f"the tokenizer has no token for {lost[0]!r}: leave it out, or choose another tokenizer")
        self.known |= characters
        return ids

    def encode_controls(self, text, controls=True):
        self.bpe.encode_special_tokens = not controls  # True: as ordinary text
        try:
            return np.array(self.bpe.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        except Exception as error:  # the library raises nothing more specific
            if len(text) == 1:
                raise UserError(f"the tokenizer has no token for {text!r} ({error})") from None
            for character in dict.fromkeys(text):
                self.encode_controls(character, controls)  # raises for the one without a token
            raise UserError(f"the tokenizer can't encode {text!r:.60}: {error}") from None

    def drops(self, character):
        """True if the BPE drops the character although its normalizer keeps it. Models other than BPE raise errors."""
        text, is_bpe = character * 3, type(self.bpe.model).__name__ == "BPE"  # three: a word's start, middle and end
        kept = self.bpe.normalizer.normalize_str(text) if self.bpe.normalizer else text
        return is_bpe and kept.strip() and not self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.bpe.decode(list(map(int, ids)), skip_special_tokens=False)

    def as_library(self):
        return self.bpe

    def save(self, path):
        """The library reads the file too: it passes over the numbers "end", "bos" and "pad" of control tokens."""
        saved = self.bpe.to_str()
        marks = {"end": self.ends * self.marked, **{role: [token] for role, token in self.roles.items()}}
        if any(marks.values()):
            saved = json.loads(saved)
            for token in saved["added_tokens"]:
                token.update({mark: ids.index(token["id"]) for mark, ids in marks.items() if token["id"] in ids})
            saved = json.dumps(saved, ensure_ascii=False)
        Path(path).write_text(saved, encoding="utf-8", newline="\n")
        self.save_template(path)


class ControlTokenizer(Tokenizer):
    """Another tokenizer, and control tokens, whose ids follow its own. The last one ends a text.

    base: the Tokenizer, or what its file holds. controls: names such as <|user|>.
    """
    kind = "controls"

    def __init__(self, base, controls):
        self.base = base if isinstance(base, Tokenizer) else of_kind(**base)
        self.controls = list(controls)
        self.fields = {"base": {"kind": self.base.kind, **self.base.fields}, "controls": self.controls}
        self.vocab_size, self.unit = self.base.vocab_size + len(self.controls), self.base.unit
        self.ids = {name: self.base.vocab_size + i for i, name in enumerate(self.controls)}
        self.pattern = re.compile(f"({'|'.join(map(re.escape, self.controls))})")
        self.eos = self.vocab_size - 1
        self.ends = [self.eos] + [self.base.eos] * (self.base.eos is not None)

    def encode(self, text):
        return self.base.encode(text)

    def encode_controls(self, text):
        pieces = [piece for piece in self.pattern.split(text) if piece]
        ids = [[self.ids[piece]] if piece in self.ids else self.base.encode(piece) for piece in pieces]
        return np.concatenate([np.zeros(0, np.int64), *ids]).astype(np.int64)

    def decode(self, ids):
        first, text = self.base.vocab_size, ""
        for is_control, run in itertools.groupby(map(int, ids), lambda i: i >= first):
            run = list(run)
            text += "".join(self.controls[i - first] for i in run) if is_control else self.base.decode(run)
        return text

    def as_library(self):
        library = self.base.as_library()
        library.add_special_tokens(self.controls)  # they get the next ids
        return library


def with_controls(tokenizer, controls):
    """The tokenizer, with those of the control tokens that it lacks. The last one of `controls` ends a text then."""
    if isinstance(tokenizer, BPETokenizer):
        import tokenizers
        bpe = tokenizers.Tokenizer.from_str(tokenizer.bpe.to_str())
        bpe.add_special_tokens(list(controls))
        end = bpe.token_to_id(controls[-1])
        return BPETokenizer(bpe, dict.fromkeys([end, *tokenizer.ends]), tokenizer.roles)
    if isinstance(tokenizer, ControlTokenizer):
        return tokenizer
    return ControlTokenizer(tokenizer, controls)


def first_controls(bpe):
    """The ids of the control tokens that the library's post-processor puts before every text."""
    try:
        example = bpe.encode("a", add_special_tokens=True)
    except Exception:  # a vocabulary of words has no token for it
        return []
    pairs = zip(example.ids, example.special_tokens_mask)
    return [token for token, _ in itertools.takewhile(lambda pair: pair[1], pairs)]


def controls_of(saved, path, mark):
    """The ids of the tokens with a mark, the usual one first; [] if unknown. saved: the content of the file `path`.

    mark: end, bos or pad, as BPETokenizer.save writes them. A published model's are in the JSON files beside it.
    """
    key = f"{mark.replace('end', 'eos')}_token_id"
    if marked := sorted((token[mark], token["id"]) for token in saved.get("added_tokens", ()) if mark in token):
        return [token for _, token in marked]
    for name in ("generation_config.json", "config.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            ids = json.loads((Path(path).parent / name).read_text(encoding="utf-8")).get(key)
            if ids := [token for token in (ids if isinstance(ids, list) else [ids]) if type(token) is int]:
                return ids
    return []


def byte_level(tokens, words=True):
    """A byte-level BPE of the tokenizers library. tokens: a list of bytes; a token's index is its id and its rank.

    words: split the text into words first, as GPT-2 does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    letters = byte_letters()
    names = {token: "".join(letters[byte] for byte in token) for token in tokens}
    merges = [(names[left], names[right]) for left, right in merges_of(tokens)]
    library = Tokenizer(models.BPE({name: i for i, name in enumerate(names.values())}, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    library.decoder = decoders.ByteLevel()
    return library


def byte_letters():
    """The character that GPT-2's files and the tokenizers library write for each byte: itself if it is printable."""
    printable, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, itertools.count(256)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def merges_of(tokens):
    """Yields, for each token of several bytes, the two tokens that it is made of. tokens: as in `byte_level`."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for token in tokens:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:  # merges the pair of the lowest rank, as encoding does
            found = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
            at = found.index(min(found))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield parts


def short_words(texts):
    """Yields the texts in pieces, in which no word and no run of white space is longer than LONGEST_WORD characters."""
    with progress(None, "learning tokens", " characters") as bar:
        for text in texts:
            start = 0
            for run in re.finditer(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}", text):
                yield text[start:run.end()]
                start = run.end()
            yield text[start:]
            bar.update(len(text))


KINDS = {"char": CharTokenizer, "byte": ByteTokenizer, "gpt2": GPT2Tokenizer, "word": WordTokenizer,
         "controls": ControlTokenizer}


def of_kind(kind, **fields):
    return KINDS[kind](**fields)


def build(name, texts, train_texts, special=("<|endoftext|>",)):
    """The tokenizer for a value of --tokenizer. Raises UserError for a bad one.

    name: char, whose vocabulary is the characters of texts(); byte; gpt2; bpe:SIZE, which learns from train_texts();
    word:TIMES, with the words that occur so often there; or a tokenizer's file, or the folder of a run, a checkpoint or
    a published model. special: the control tokens of a BPE.
    """
    if name == "char":
        return CharTokenizer(sorted(set(itertools.chain.from_iterable(texts()))))
    if name in ("byte", "gpt2"):
        return KINDS[name]()
    kind, _, size = name.partition(":")
    if kind == "bpe" and size.isdecimal() and len(size) < 20:
        return BPETokenizer.train(train_texts(), int(size), special)
    if kind == "word" and size.isdecimal() and 0 < len(size) < 20:
        return WordTokenizer.train(train_texts(), int(size))
    if kind not in ("bpe", "word") and (path := find(name)):
        return load(path)
    if os.path.isdir(name):
        raise UserError(f"tokenizer = {name}: this folder holds no tokenizer.json and no checkpoint")
    raise UserError(f"tokenizer = {name}: must be char, byte, gpt2, bpe:SIZE such as bpe:4096, word:TIMES such as"
                    " word:2, or a model's folder or tokenizer.json")


def find(name):
    """The path of a tokenizer's file: `name`, or one in the folder `name` (a run's or a model's). None if absent."""
    places = [Path(name), *(Path(name, part, "tokenizer.json") for part in ("", "best", "last", "last.old")),
              Path(name, "vocab.txt")]
    return next((path for path in places if path.is_file()), None)


def load(path):
    """The tokenizer saved at `path`, by Quill or the tokenizers library. Raises UserError if it can't be read.

    A vocab.txt is a BERT's: see `word_piece`.
    """
    try:
        found = read(Path(path))
        found.template = template_beside(Path(path))
        return found
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise UserError(f"{path} is not a tokenizer file ({type(error).__name__}: {error})") from None


def read(path):
    if path.name == "vocab.txt":
        return BPETokenizer(word_piece(path))
    saved = json.loads(path.read_text(encoding="utf-8"))
    if "model" in saved:
        import tokenizers
        ends, *roles = (controls_of(saved, path, mark) for mark in ("end", "bos", "pad"))
        roles = {role: ids[0] for role, ids in zip(("bos", "pad"), roles) if ids}
        return BPETokenizer(tokenizers.Tokenizer.from_file(str(path)), ends, roles)
    return of_kind(**saved)


def template_beside(path):
    """The template of the tokenizer at `path`: the file TEMPLATE, else what tokenizer_config.json holds; "" if none."""
    with contextlib.suppress(OSError):
        return path.with_name(TEMPLATE).read_text(encoding="utf-8")
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found = json.loads(path.with_name("tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {each["name"]: each["template"] for each in found}.get("default")
        return found or ""
    return ""


def word_piece(path):
    """BERT's tokenizer, of the tokenizers library, from its list of tokens, one a line, and tokenizer_config.json."""
    import tokenizers
    beside = path.with_name("tokenizer_config.json")
    given = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    made = tokenizers.BertWordPieceTokenizer(
        str(path), lowercase=given.get("do_lower_case", True), strip_accents=given.get("strip_accents"),
        handle_chinese_chars=given.get("tokenize_chinese_chars", True))
    return tokenizers.Tokenizer.from_str(made.to_str())


class Marks(NamedTuple):
    """The ids of an encoder's control tokens."""
    cls: int  # before every text
    sep: int | None  # after every text; None: nothing
    mask: int  # instead of a hidden token
    pad: int  # fills a row; the encoder does not see it
    size: int  # of the vocabulary, these included


def marks_of(tokenizer):
    """The Marks of a tokenizer. One that has [CLS] and [MASK], as BERT's, keeps them; to any other they are added."""
    V = tokenizer.vocab_size
    if isinstance(tokenizer, BPETokenizer):
        cls, sep, mask, pad = map(tokenizer.bpe.token_to_id, ("[CLS]", "[SEP]", "[MASK]", "[PAD]"))
        if None not in (cls, mask):
            return Marks(cls, sep, mask, pad or 0, V)
    return Marks(V, None, V + 1, 0, V + 2)


def same_vocabulary(a, b):
    """True if every id stands for the same text in both tokenizers."""
    return a.vocab_size == b.vocab_size and all(a.decode([i]) == b.decode([i]) for i in range(a.vocab_size))


def prompt_tokens(tokenizer, prompt):
    """The ids that begin every text, then the prompt's, (T,). If there are none: end of text, newline, or id 0."""
    begin = tokenizer.start or ([] if prompt or tokenizer.eos is None else [tokenizer.eos])
    try:
        return np.array([*begin, *tokenizer.encode(prompt if prompt or begin else "\n")], dtype=np.int64)
    except UserError as error:
        if not prompt:
            return np.zeros(1, dtype=np.int64)
        raise UserError(f"prompt: {error}") from None


class Transcript:
    """The text of a sample while it is generated. `append` adds one token id, and `news` returns the new text.

    It holds back unfinished characters. It ends before the text `stop` (if that is not "") or an end token: `ended` is
    True then, and further ids are ignored.
    """

    def __init__(self, tokenizer, stop=""):
        self.tokenizer, self.stop, self.ended = tokenizer, stop, False
        self.ids, self.done, self.shown = [], "", 0  # all ids; the text without an unfinished end; the length returned
        self.settled, self.before, self.start = "", 0, 0  # the text of ids[:start]; the newest are ids[before:start]

    def append(self, token):
        if self.ended or token in (self.tokenizer.eos, *self.tokenizer.ends):
            self.ended = True
            return
        self.ids.append(token)
        text = str(self)
        self.done = text.rstrip("\ufffd")  # \ufffd may be the first bytes of an unfinished character
        if self.done == text:
            self.settled, self.before, self.start = text, self.start, len(self.ids)
        if self.stop and self.stop in self.done:
            self.done = self.settled = self.done.partition(self.stop)[0]
            self.start, self.ended = len(self.ids), True

    def __str__(self):
        """The whole text. New ids are decoded with the ones before them: some decoders strip a leading space."""
        context = self.tokenizer.decode(self.ids[self.before:self.start])
        return self.settled + self.tokenizer.decode(self.ids[self.before:])[len(context):]

    def news(self, final=False):
        """The text since the last call. Unless final, an end that may be the start of `stop` is held back."""
        text, stop = (str(self), "") if final else (self.done, self.stop)
        held = max((n for n in range(len(stop)) if text.endswith(stop[:n])), default=0)  # characters
        news = text[self.shown:len(text) - held]
        self.shown += len(news)
        return news


def transcribe(steps, transcripts):
    """Yields (row, new text) until every row has ended. steps: an iterable of the rows' next tokens, (B,) each."""
    for tokens in steps:
        for transcript, token in zip(transcripts, tokens.tolist()):
            transcript.append(token)
        yield from ((row, news) for row, transcript in enumerate(transcripts) if (news := transcript.news()))
        if all(transcript.ended for transcript in transcripts):
            break
    yield from ((row, news) for row, transcript in enumerate(transcripts) if (news := transcript.news(final=True)))
