"""The translator of translate_en_it.py on the Bible, English to Spanish: does its cross-attention find the right word?

    python train.py config/translate_bible.py
    python -m tools.alignments --out_dir=out/translate_bible
    python evaluate.py --out_dir=out/translate_bible --beam=4 --test=True
"""

_base = "translate_en_it.py"

dataset = "bible_en_es"
out_dir = "out/translate_bible"
