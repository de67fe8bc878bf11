"""Text to token ids and back: characters, bytes, GPT-2's BPE, or a BPE of one's own. Saved as JSON, loaded by name.

    python prepare.py my.txt --tokenizer=char|byte|gpt2|bpe:4096
    python prepare.py my.txt --tokenizer=out            a trained model's own, from its folder

A control token that is written in a text, such as <|endoftext|>, is text like any other.
"""

import itertools
import json
import re
from pathlib import Path

import numpy as np

from configurator import UserError
from machine.terminal import progress

MOST_TOKENS = 1 << 20  # of a BPE: the library sets memory aside for all of them before it learns
LONGEST_WORD = 256  # characters, for a BPE to learn from: it takes for ever over a longer one


class Tokenizer:
    """What has kind, vocab_size, save(path), encode(text) -> int64 array of ids (T,), and decode(ids) -> text."""

    eos = None  # the id that ends a text
    fields = {}  # what a saved tokenizer holds beside its kind: the arguments that make it anew
    unit = "tokens"

    def __repr__(self):
        return f"{type(self).__name__}({self.vocab_size} {self.unit})"

    def encode_controls(self, text):
        """As encode, but control tokens that are written in the text are tokens, where the tokenizer has any."""
        return self.encode(text)

    def save(self, path):
        """Writes the file in place: a caller whose readers must never find half of it renames it afterwards."""
        saved = json.dumps({"kind": self.kind, **self.fields}, ensure_ascii=False, indent=1)
        Path(path).write_text(saved + "\n", encoding="utf-8", newline="\n")


class CharTokenizer(Tokenizer):
    """One id per character, in the order of the characters given."""
    kind, unit = "char", "characters"

    def __init__(self, characters):
        self.characters = "".join(characters)
        self.fields = {"characters": self.characters}
        self.vocab_size = len(self.characters)
        self.ids = np.full(0x110000, -1, dtype=np.int32)  # by code point
        self.ids[[ord(character) for character in self.characters]] = np.arange(self.vocab_size)

    def encode(self, text):
        """Raises UserError that names the first character outside the vocabulary."""
        ids = self.ids[np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)]
        if (ids < 0).any():
            at = int((ids < 0).argmax())
            raise UserError(f"the character {text[at]!r} (U+{ord(text[at]):04X}), in {text[max(0, at - 20):at + 20]!r},"
                            f" is not among the vocabulary's {self.vocab_size} characters: {self.characters!r:.200}")
        return ids.astype(np.int64)

    def decode(self, ids):
        return "".join([self.characters[i] for i in ids])


class ByteTokenizer(Tokenizer):
    """One id per byte of the text's UTF-8: any text can be encoded."""
    kind, vocab_size, unit = "byte", 256, "bytes"

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids):
        return bytes(list(ids)).decode("utf-8", errors="replace")


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE through tiktoken, which downloads its 1.5 MB of merges once."""
    kind, vocab_size = "gpt2", 50257

    def __init__(self):
        import tiktoken
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except OSError as error:  # requests' errors are OSErrors
            raise UserError(f"the gpt2 tokenizer could not download its merges ({type(error).__name__}): connect once,"
                            " or use --tokenizer=bpe:4096") from None
        self.eos = self.bpe.eot_token

    def encode(self, text):
        return np.array(self.bpe.encode_ordinary(text), dtype=np.int64)

    def decode(self, ids):
        return self.bpe.decode(list(map(int, ids)))


class BPETokenizer(Tokenizer):
    """A BPE of the tokenizers library, trained here or a published model's; its file is that library's own."""
    kind = "bpe"

    def __init__(self, bpe):
        self.bpe, self.known = bpe, set()  # characters that have tokens
        bpe.no_truncation()
        bpe.no_padding()
        self.vocab_size = max(bpe.get_vocab().values()) + 1  # there may be holes among the ids
        ends = map(bpe.token_to_id, ("<|endoftext|>", "<eos>", "</s>"))
        self.eos = next((token for token in ends if token is not None), None)

    @classmethod
    def train(cls, texts, vocab_size, special=("<|endoftext|>",)):
        """Learns vocab_size tokens, the special ones first, from an iterable of strings. The least are one per byte."""
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
        if most < vocab_size:
            raise UserError(f"tokenizer = bpe:{vocab_size}: the text yields only {most} tokens; use bpe:{most} or less")
        return cls(tokenizers.Tokenizer.from_str(bpe.to_str()))

    def encode(self, text):
        """Raises UserError that names a character without a token, which the library would leave out."""
        ids, characters = self.encode_controls(text, False), set(text)
        if lost := sorted(filter(self.drops, characters - self.known)):
            raise UserError(f"the tokenizer has no token for {lost[0]!r}: leave it out, or choose another tokenizer")
        self.known |= characters
        return ids

    def encode_controls(self, text, controls=True):
        self.bpe.encode_special_tokens = not controls  # as the text that they are
        try:
            return np.array(self.bpe.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"the tokenizer can't encode {text!r:.60}: {error}") from None

    def drops(self, character):
        """Whether a BPE leaves the character out, and not its normalizer. Other models raise an error instead."""
        text, is_bpe = character * 3, type(self.bpe.model).__name__ == "BPE"  # three: a word's start, inside and end
        meant = self.bpe.normalizer.normalize_str(text) if self.bpe.normalizer else text
        return is_bpe and meant.strip() and not self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.bpe.decode(list(map(int, ids)), skip_special_tokens=False)

    def save(self, path):
        Path(path).write_text(self.bpe.to_str(), encoding="utf-8", newline="\n")


def short_words(texts):
    """The texts, cut into more wherever LONGEST_WORD characters come without a blank, or as many blanks."""
    with progress(None, "learning tokens", " characters") as bar:
        for text in texts:
            start = 0
            for run in re.finditer(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}", text):
                yield text[start:run.end()]
                start = run.end()
            yield text[start:]
            bar.update(len(text))


KINDS = {"char": CharTokenizer, "byte": ByteTokenizer, "gpt2": GPT2Tokenizer}


def build(name, texts, train_texts, special=("<|endoftext|>",)):
    """A tokenizer by its name on the command line: char knows all of texts(), a BPE learns from train_texts().

    Or one that exists, by its file, or by the folder of a run, of a checkpoint, or of a published model.
    """
    if name == "char":
        return CharTokenizer(sorted(set(itertools.chain.from_iterable(texts()))))
    if name in ("byte", "gpt2"):
        return KINDS[name]()
    kind, _, size = name.partition(":")
    if kind == "bpe" and size.isdecimal() and len(size) < 20:
        return BPETokenizer.train(train_texts(), int(size), special)
    if kind != "bpe" and (path := find(name)):
        return load(path)
    raise UserError(f"tokenizer = {name}: must be char, byte, gpt2, bpe:SIZE such as bpe:4096, or a model's folder or"
                    " tokenizer.json")


def find(name):
    """The file of a tokenizer: `name` itself, or in a folder of this name, which may be a run's. None if absent."""
    places = [Path(name), *(Path(name, part, "tokenizer.json") for part in ("", "best", "last", "last.old"))]
    return next((path for path in places if path.is_file()), None)


def load(path):
    """The tokenizer saved at `path`, ours or a published `tokenizer.json`. Raises UserError if there is none."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        if "model" in saved:
            import tokenizers
            return BPETokenizer(tokenizers.Tokenizer.from_file(str(path)))
        return KINDS[saved.pop("kind")](**saved)
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise UserError(f"{path} is not a tokenizer file ({type(error).__name__}: {error})") from None


def same_vocabulary(a, b):
    """Whether every id stands for the same text in both."""
    return a.vocab_size == b.vocab_size and all(a.decode([i]) == b.decode([i]) for i in range(a.vocab_size))


class Transcript:
    """One sample as it grows: decodes token by token, holds back unfinished characters, ends at a stop text."""

    def __init__(self, tokenizer, stop=""):
        self.tokenizer, self.stop, self.ended = tokenizer, stop, False
        self.ids, self.done, self.shown = [], "", 0  # all ids; the text that stands; the length shown
        self.settled, self.before, self.start = "", 0, 0  # the text of ids[:start], of which ids[before:] came last

    def append(self, token):
        if self.ended or token == self.tokenizer.eos:
            self.ended = True
            return
        self.ids.append(token)
        text = str(self)
        self.done = text.rstrip("\ufffd")  # which may be the bytes of a character that is not complete
        if self.done == text:
            self.settled, self.before, self.start = text, self.start, len(self.ids)
        if self.stop and self.stop in self.done:
            self.done = self.settled = self.done.partition(self.stop)[0]
            self.start, self.ended = len(self.ids), True

    def __str__(self):
        """All text. New ids are decoded together with those before: some decoders strip a leading space."""
        before = self.tokenizer.decode(self.ids[self.before:self.start])
        return self.settled + self.tokenizer.decode(self.ids[self.before:])[len(before):]

    def news(self, final=False):
        """The text that came since the last call, short of what may turn out to be the beginning of `stop`."""
        text, stop = (str(self), "") if final else (self.done, self.stop)
        held = max((n for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        news = text[self.shown:len(text) - held]
        self.shown += len(news)
        return news


def transcribe(steps, transcripts):
    """Yields (row, its new text) as soon as characters are whole. steps: of `generate`; transcripts: one per row."""
    for tokens in steps:
        for transcript, token in zip(transcripts, tokens.tolist()):
            transcript.append(token)
        yield from ((row, news) for row, transcript in enumerate(transcripts) if (news := transcript.news()))
        if all(transcript.ended for transcript in transcripts):
            break
    yield from ((row, news) for row, transcript in enumerate(transcripts) if (news := transcript.news(final=True)))
