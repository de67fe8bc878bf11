"""tools/alignments.py: attention that is known finds the links that it must, and model 1 is what its formula says."""

import collections
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import settings_for
from PIL import Image

import tokenizer as tokenizers
import train
from configurator import UserError
from sources import pairs
from tools import alignments

WORDS = "ab cde f ghij klm nop".split()


def reversed_pairs(links=True):
    """Sentences of five to seven words, translated backwards in capitals. Each word is linked to its translation."""
    generator = np.random.default_rng(0)
    for _ in range(150):
        words = [str(word) for word in generator.choice(WORDS, size=generator.integers(5, 8))]
        row = {"source": " ".join(words), "target": " ".join(words[::-1]).upper()}
        found = [[i, len(words) - 1 - i] for i in range(len(words))]
        yield row | {"links": found} if links else row


def trained_on(folder, rows):
    """The out directory of a run of two updates on rows: two blocks of two heads, tokens are words."""
    pairs.prepare(rows, folder / "data", pairs.How(languages="en,xx", tokenizer="word:1", val_fraction=0.1), "made up")
    tiny = dict(dataset=str(folder / "data"), n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=300,
                max_iters=2, warmup_iters=1, eval_interval=2, device="cpu", out_dir=str(folder / "run"))
    train.main(settings_for("translation", **tiny), {})
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_on(tmp_path_factory.mktemp("linked"), list(reversed_pairs()))


def looking(model, source, lengths, tokens):
    """A stand-in for `cross_attention`, where two heads look at the right word, and the others at <eos>.

    Head 2 of block 1 looks at the word that it predicts, head 1 of block 2 at the word that it reads.
    """
    weights = torch.zeros(2, len(source), 2, tokens.shape[1], source.shape[1])
    for row, count in enumerate((lengths - 1).tolist()):  # count: words of the source, and of the target
        weights[:, row, :, :, count] = 1
        backwards = torch.eye(count).flip(0)
        weights[0, row, 1, :count] = F.pad(backwards, (0, source.shape[1] - count))
        weights[1, row, 0, 1:count + 1] = F.pad(backwards, (0, source.shape[1] - count))
    return weights


def test_known_attention_finds_what_it_must(run, monkeypatch, capsys):
    monkeypatch.setattr(alignments, "cross_attention", looking)
    alignments.main(alignments.Settings(out_dir=str(run)))
    result = json.loads((run / "alignments.json").read_text())
    for split in ("val", "test"):
        found, first = result["found"][split], len(rows_of(run, split)) / result["links"][split]
        assert found["output"]["block 1, head 2"] == found["input"]["block 2, head 1"] == 1
        assert found["output"]["block 1, mean"] == found["input"]["block 2, mean"] == 1
        # One too late, it looks at the word before; at the end at <eos>, so no word has more than the first one.
        assert found["input"]["block 1, head 2"] == pytest.approx(first) and found["output"]["block 2, head 1"] == 0
        assert found["output"]["block 1, head 1"] == pytest.approx(first)
    assert result["best"] == {"word": "output", "way": "block 1, head 2", "val": 1, "test": 1}
    assert "block 1, head 2, output 100.0 the best on validation" in " ".join(capsys.readouterr().out.split())
    assert Image.open(run / "alignments.png").width > 100


def rows_of(run, split):
    return [json.loads(line) for line in (run.parent / "data" / f"{split}.jsonl").read_text().splitlines()]


def test_floors_are_what_they_say(run):
    rows, lexicon = rows_of(run, "test"), alignments.Lexicon(list(reversed_pairs()))
    found = alignments.floors(rows, lexicon)
    sizes = [len(row["links"]) for row in rows]
    assert found["a random word"] == pytest.approx(len(sizes) / sum(sizes))
    assert found["the same relative place"] == pytest.approx(sum(size % 2 for size in sizes) / sum(sizes))  # the middle
    right = [row["source"].split().index(row["source"].split()[i]) == i for row in rows for i, _ in row["links"]]
    assert found["IBM's model 1"] == pytest.approx(np.mean(right))  # of equal words it can only choose the first
    assert lexicon.choose(["ab", "f"], "unseen", otherwise=1) == 1
    assert alignments.same_place(0, 1, 5) == 0 and alignments.same_place(4, 5, 9) == 8


def test_model_1_is_its_formula():
    texts = (("the house", "la casa"), ("The book", "el libro"), ("a green house", "una casa verde."), ("the", "la la"))
    rows = [{"source": source, "target": target} for source, target in texts]
    lexicon = alignments.Lexicon(rows)
    p = collections.defaultdict(lambda: 1.0)
    for _ in range(alignments.ROUNDS):
        counts, totals = collections.Counter(), collections.Counter()
        for row in rows:
            sources, targets = (row[side].lower().replace(".", "").split() for side in ("source", "target"))
            for target in targets:
                norm = sum(p[source, target] for source in ("", *sources))
                for source in ("", *sources):
                    counts[source, target] += p[source, target] / norm
                    totals[source] += p[source, target] / norm
        p = {pair: count / totals[pair[0]] for pair, count in counts.items()}
    names = {number: word for word, number in lexicon.ids.items()}
    found = {(names[pair // lexicon.size], names[pair % lexicon.size]): value
             for pair, value in zip(lexicon.pairs.tolist(), lexicon.p.tolist())}
    assert found == pytest.approx(p)
    assert lexicon.choose("a green house".split(), "casa", 0) == 2


def test_attention_between_words_is_summed_over_the_source_and_averaged_over_the_target():
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.1, 0.1, 0.3], [0.0, 0.6, 0.2, 0.2]])  # <eos> is last
    source, target = torch.tensor([0, 1, 1]), torch.tensor([0, 0])
    torch.testing.assert_close(alignments.between_words(weights, source, target, 0), torch.tensor([[0.3, 0.35]]))
    torch.testing.assert_close(alignments.between_words(weights, source, target, 1), torch.tensor([[0.25, 0.5]]))
    text = "Uno, due tre."
    for tokenizer in (tokenizers.ByteTokenizer(), tokenizers.WordTokenizer.train([text], 1)):
        words = alignments.words_of(tokenizer, text, tokenizer.encode(text))
        assert [tokenizer.decode(tokenizer.encode(text)[words == word]).strip() for word in range(3)] == text.split()
    with pytest.raises(UserError, match="'Uno, due tre.': its tokens reach over spaces"):
        alignments.words_of(tokenizer, text, tokenizer.encode(text)[:-1])


def test_what_has_no_links_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match="its model does not translate; see config/translate_bible.py"):
        alignments.main(alignments.Settings(out_dir=trained))
    folder = trained_on(tmp_path, reversed_pairs(links=False))
    with pytest.raises(UserError, match="data has no links between words: take a model trained on bible_en_es"):
        alignments.main(alignments.Settings(out_dir=str(folder)))
