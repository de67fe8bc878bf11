"""The translator of translate_en_it.py on the Bible, English to Spanish: does its cross-attention find the right word?

    python train.py config/translate_bible.py
    python -m tools.alignments --out_dir=out/translate_bible
    python evaluate.py --out_dir=out/translate_bible --beam=4 --test=True

Nobody has run all of its 2,700 updates yet, about 20 minutes of one idle thread. After 960 updates on a busy machine
(--max_iters=2000, stopped and resumed with 1200, and again with 960; seed 1337) the validation loss was 2.76, BLEU 18.3
on the validation chapters, greedily (the most similar training verse: 10.3), and the mean of all heads found 56.0 % of
the test links, taken from the positions that predict a word. The word at the same relative place is right for 34.7 %,
and model 1 for 77.1 %.
"""

_base = "translate_en_it.py"

dataset = "bible_en_es"
out_dir = "out/translate_bible"
