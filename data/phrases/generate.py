"""Sentences of travellers in English and Italian: a small parallel text for tests and for machines without a network.

    python prepare.py phrases                    into data/phrases, ready for training
    python data/phrases/generate.py              prints the pairs

Every noun meets every adjective in every sentence, and Italian articles and endings follow the noun. There is no chance
in it.
"""

import itertools

NOUNS = [  # English, Italian, its gender
    ("room", "camera", "f"), ("train", "treno", "m"), ("station", "stazione", "f"), ("hotel", "albergo", "m"),
    ("coffee", "caffè", "m"), ("water", "acqua", "f"), ("suitcase", "valigia", "f"), ("mirror", "specchio", "m"),
    ("ticket", "biglietto", "m"), ("soup", "zuppa", "f"), ("ice cream", "gelato", "m"), ("island", "isola", "f")]
ADJECTIVES = [  # English, Italian: masculine and feminine
    ("small", "piccolo", "piccola"), ("expensive", "caro", "cara"), ("cold", "freddo", "fredda"),
    ("beautiful", "bello", "bella"), ("new", "nuovo", "nuova"), ("good", "buono", "buona"), ("big", "grande", "grande")]
WITH_NOUN = [
    ("Where is the {noun}?", "Dov'è {il}?"), ("I can't find the {noun}.", "Non trovo {il}."),
    ("How much does the {noun} cost?", "Quanto costa {il}?"), ("We are looking for the {noun}.", "Cerchiamo {il}.")]
WITH_BOTH = [
    ("The {noun} is {adjective}.", "{Il} è {adjective}."), ("Is the {noun} {adjective}?", "{Il} è {adjective}?"),
    ("The {noun} is too {adjective}.", "{Il} è troppo {adjective}."),
    ("The {noun} is not {adjective}, thank you.", "{Il} non è {adjective}, grazie."),
    ("Why is the {noun} so {adjective}?", "Perché {il} è così {adjective}?")]


def generate():
    """A list of pairs, {"en": text, "it": text}, always the same."""
    pairs = []
    for (noun, nome, gender), (english, italian) in itertools.product(NOUNS, WITH_NOUN):
        pairs.append({"en": english.format(noun=noun), "it": italian.format(il=with_article(nome, gender))})
    for (noun, nome, gender), adjective, (english, italian) in itertools.product(NOUNS, ADJECTIVES, WITH_BOTH):
        ending = adjective[1] if gender == "m" else adjective[2]
        il = with_article(nome, gender)
        pairs.append({"en": english.format(noun=noun, adjective=adjective[0]),
                      "it": italian.format(il=il, Il=il[0].upper() + il[1:], adjective=ending)})
    return pairs


def with_article(noun, gender):
    """An Italian noun with its definite article: l'acqua, la zuppa, lo specchio, il treno."""
    if noun[0] in "aeiou":
        return f"l'{noun}"
    needs_lo = noun[0] == "z" or noun[0] == "s" and noun[1] not in "aeiou"
    return f"{'la' if gender == 'f' else 'lo' if needs_lo else 'il'} {noun}"


if __name__ == "__main__":
    for pair in generate():
        print(pair["en"], pair["it"], sep="\t")
