"""Short texts of invented facts, and questions about them, some without an answer: made from templates.

    python prepare.py facts                      into data/facts, ready for training
    python data/facts/generate.py                prints the texts with their questions and answers

A text tells of two or three people, towns, ships, bridges or books: for each, two facts of three kinds. So the kind of
fact that is asked for does not tell which sentence has it. A template is a way to ask for a fact or to state it: a
phrase of FACTS inside one of the frames. Each kind of fact keeps some of its templates for validation alone, and some
for test alone; a hash sets names apart in the same way. So a held-out question, the sentence with its answer, and the
names in both were in no training text. Phrases, years, numbers and things are in all parts.
"""

import random
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sources.pairs import place_of, split_of

SEED = 0
TEXTS = {"train": 2400, "val": 150, "test": 150}
QUESTIONS = 3  # for each text
UNANSWERED = 0.25  # the share of questions without an answer
HELD_OUT = 0.15  # the share of templates and of names for validation, and again for test

STARTS = """
    Bal Bren Cor Dal Dor Elm Fal Fen Gar Gil Hal Hol Jar Kel Kor Lam Lor Mal Mer Nor Osk Pel Quin Ral Ros Sel Sor Tal
    Tor Ul Val Ver Wen Wil Yor Zan""".split()
ENDS = """
    a ado an ard by den dil dor ek el en eth ford gar go ham i in is ka lin low mar mond na nik o old on or ra rick
    sey sin ten tor uk und vik wen""".split()
FIRST_NAMES = """
    Ada Anton Bela Carla Dario Edith Emil Flora Gustav Hanna Igor Ilse Jonas Karin Leo Lydia Marta Nils Olga Oskar
    Paul Rosa Simon Tessa Ursula Viktor Walter Yvonne""".split()
THINGS = {  # values that are in all parts
    "trade": "weaver baker miller printer sailor teacher painter carpenter doctor gardener tailor judge",
    "product": "salt wool glass paper cheese honey silk pottery rope candles leather timber",
    "material": "granite oak iron brick marble steel limestone slate copper concrete",
    "subject": "bees clouds chess gardens whales music volcanoes clocks spiders bread maps glaciers",
    "number": " ".join(str(number) for number in range(120, 980, 7)),
    "year": " ".join(str(year) for year in range(1640, 1960, 3)),
}

# {kind of subject: {kind of value: (what is asked for, a clause, questions, statements)}}; | stands between several
FACTS = {
    "person": {
        "place": ("the birthplace of {x} | the town in which {x} was born", "where {x} was born",
                  "where was {x} born | in which town was {x} born",
                  "{x} was born in {v} | {v} is the birthplace of {x} | the birthplace of {x} is {v}"),
        "year": ("the year in which {x} died", "when {x} died", "when did {x} die | in which year did {x} die",
                 "{x} died in {v} | in {v} {x} died | {x} died in the year {v}"),
        "trade": ("the trade of {x} | the occupation of {x}", "what work {x} did",
                  "what was the trade of {x} | what work did {x} do",
                  "{x} worked as a {v} | the trade of {x} was that of a {v} | {x} was a {v}"),
        "person": ("the teacher of {x}", "who taught {x}", "who taught {x} | who was the teacher of {x}",
                   "{x} was taught by {v} | {v} taught {x} | {v} was the teacher of {x}"),
    },
    "town": {
        "person": ("the mayor of {x}", "who governs {x}", "who is the mayor of {x} | who governs {x}",
                   "{v} is the mayor of {x} | the mayor of {x} is {v} | {x} is governed by {v}"),
        "year": ("the year in which {x} was founded", "when {x} was founded",
                 "when was {x} founded | in which year was {x} founded",
                 "{x} was founded in {v} | in {v} {x} was founded | the founding of {x} was in {v}"),
        "product": ("the main product of {x} | what {x} is famous for", "what {x} sells",
                    "what does {x} sell | what is {x} famous for",
                    "{x} is famous for {v} | {x} sells {v} | the main product of {x} is {v}"),
        "number": ("the number of people in {x}", "how many people live in {x}",
                   "how many people live in {x} | how many people does {x} have",
                   "{v} people live in {x} | {x} has {v} people | the number of people in {x} is {v}"),
        "place": ("the river of {x} | the river that flows through {x}", "which river flows through {x}",
                  "which river flows through {x} | on which river is {x}",
                  "the river {v} flows through {x} | {x} is on the river {v} | the river of {x} is the {v}"),
    },
    "ship": {
        "person": ("the captain of {x}", "who commands {x}", "who is the captain of {x} | who commands {x}",
                   "{v} commands {x} | the captain of {x} is {v} | {x} has {v} as captain"),
        "place": ("the home port of {x}", "which port is the home of {x}",
                  "which port is the home of {x} | what is the home port of {x}",
                  "the home port of {x} is {v} | {v} is the home port of {x} | {x} has its home in the port of {v}"),
        "product": ("the cargo of {x}", "what {x} carries", "what does {x} carry | what is the cargo of {x}",
                    "{x} carries {v} | the cargo of {x} is {v} | {x} has a cargo of {v}"),
        "year": ("the year in which {x} was launched", "when {x} was launched",
                 "when was {x} launched | in which year was {x} launched",
                 "{x} was launched in {v} | in {v} {x} was launched | the launch of {x} was in {v}"),
    },
    "bridge": {
        "person": ("the architect of {x} | the person who built {x}", "who built {x}",
                   "who built {x} | who was the architect of {x}",
                   "{x} was built by {v} | {v} built {x} | the architect of {x} was {v}"),
        "material": ("the material of {x}", "what {x} is made of", "what is {x} made of | of what is {x} built",
                     "{x} is made of {v} | {x} is built of {v} | the material of {x} is {v}"),
        "number": ("the length of {x} in metres", "how many metres {x} measures",
                   "how long is {x} | how many metres does {x} measure",
                   "{x} is {v} metres long | {x} measures {v} metres | the length of {x} is {v} metres"),
        "year": ("the year in which {x} was opened", "when {x} was opened",
                 "when was {x} opened | in which year was {x} opened",
                 "{x} was opened in {v} | in {v} {x} was opened | the opening of {x} was in {v}"),
    },
    "book": {
        "person": ("the author of {x}", "who wrote {x}", "who wrote {x} | who is the author of {x}",
                   "{v} wrote {x} | {x} was written by {v} | the author of {x} is {v}"),
        "subject": ("the subject of {x}", "what {x} is about", "what is {x} about | what is the subject of {x}",
                    "{x} is about {v} | the subject of {x} is {v} | {x} is a book about {v}"),
        "place": ("the town in which {x} was printed", "where {x} was printed",
                  "where was {x} printed | in which town was {x} printed",
                  "{x} was printed in {v} | {x} was printed at the press of {v} | the printing of {x} was done in {v}"),
        "year": ("the year in which {x} appeared", "when {x} appeared",
                 "when did {x} appear | in which year did {x} appear",
                 "{x} appeared in {v} | in {v} {x} appeared | {x} appeared in the year {v}"),
    },
}
SUBJECTS = {"person": "{first} {name}", "town": "{name}", "ship": "the ship {name}", "bridge": "the {name} Bridge",
            "book": '"The {name} Papers"'}
FRAMES = (  # around each of a fact's four kinds of phrases
    "what is {} ? | name {} . | tell me {} . | give me {} , please . | please find {} .",
    "tell me {} . | do you know {} ? | can you say {} ? | I want to know {} . | please find out {} .",
    "{} ? | according to the text , {} ? | here , {} ? | {} , according to the text ?",
    "{} . | it is known that {} . | according to the records , {} . | {} , as most people know . | {} , it is said . "
    "| as the records say , {} .")


def split(text):
    """The parts of a text between its | marks."""
    return [" ".join(part.split()) for part in text.split("|")]


def one_of(items, rng):
    return items[int(rng.random() * len(items))]  # Python promises that random() stays as it is, not choice()


def templates(phrases, frames):
    """{split: templates} of some phrases in their frames: a hash orders them, and each part gets at least one."""
    found = sorted((frame.format(phrase) for phrase, frame in zip_all(phrases, frames)), key=place_of)
    count = max(1, round(HELD_OUT * len(found)))
    return {"val": found[:count], "test": found[count:2 * count], "train": found[2 * count:]}


def zip_all(phrases, frames):
    """All pairs of a phrase and a frame of its kind. phrases, frames: texts, one for each kind."""
    return [(phrase, frame) for some, around in zip(phrases, frames) for phrase in split(some)
            for frame in split(around)]


def as_written(text):
    """The text with a capital at its start, and without spaces before its marks."""
    for mark in ".,?":
        text = text.replace(f" {mark}", mark)
    return text[:1].upper() + text[1:] if not text.startswith('"') else text


def fill(template, subject, value):
    """(sentence, where the value begins in it)."""
    sentence = as_written(template.replace("{x}", subject).replace("{v}", "\0"))
    return sentence.replace("\0", value), sentence.find("\0")


class Maker:
    """Makes the texts of one part. Its names and templates belong to that part alone."""

    def __init__(self, part):
        self.part, self.rng = part, random.Random(f"{SEED} {part}")
        names = [start + end for start in STARTS for end in ENDS]
        self.names = [name for name in names if split_of(name, HELD_OUT) == part]
        self.asked, self.stated = ({(kind, value): templates(phrases[some], FRAMES[some])[part]
                                    for kind, facts in FACTS.items() for value, phrases in facts.items()}
                                   for some in (slice(3), slice(3, 4)))

    def named(self, kind):
        """A new subject of the kind, as text."""
        return SUBJECTS[kind].format(first=one_of(FIRST_NAMES, self.rng), name=one_of(self.names, self.rng))

    def value(self, kind):
        if kind in THINGS:
            return one_of(THINGS[kind].split(), self.rng)
        return self.named("town" if kind == "place" else kind)

    def text(self):
        """(text, {(subject, kind of fact): (value, its place)}, kind of subjects, kinds of facts, absent subject)."""
        rng, kind = self.rng, one_of([*FACTS], self.rng)
        facts = sorted(FACTS[kind], key=lambda fact: rng.random())[:3]
        subjects = list(dict.fromkeys(self.named(kind) for _ in range(4)))
        told = [(subject, fact) for subject in subjects[:2 + (rng.random() < 0.5)]
                for fact in sorted(facts, key=lambda fact: rng.random())[:2]]
        text, found = "", {}
        for subject, fact in sorted(told, key=lambda pair: rng.random()):
            value = self.value(fact)
            sentence, place = fill(one_of(self.stated[kind, fact], rng), subject, value)
            found[subject, fact] = value, len(text) + place
            text += f"{sentence} "
        return text.strip(), found, kind, facts, subjects[-1]

    def rows(self):
        """Yields the rows of a text."""
        text, found, kind, facts, absent = self.text()
        told = list(dict.fromkeys(subject for subject, _ in found))
        missing = [(subject, fact) for subject in (*told, absent) for fact in facts if (subject, fact) not in found]
        for known in sorted(found, key=lambda pair: self.rng.random())[:QUESTIONS]:
            subject, fact = pair = one_of(missing, self.rng) if self.rng.random() < UNANSWERED else known
            question, _ = fill(one_of(self.asked[kind, fact], self.rng), subject, "")
            values, places = zip(found[pair]) if pair in found else ((), ())
            yield {"question": question, "context": text, "split": self.part,
                   "answers": {"text": [*values], "answer_start": [*places]}}


def generate():
    """A list of rows, {"question", "context", "answers", "split"}, always the same."""
    rows = {}
    for part, count in TEXTS.items():
        maker = Maker(part)
        for _ in range(count):
            for row in maker.rows():
                rows.setdefault((row["question"], row["context"]), row)
    return [*rows.values()]


if __name__ == "__main__":
    for number, row in enumerate(generate()):
        if number % QUESTIONS == 0:
            print(f"\n{row['split']}: {row['context']}")
        print(f"  {row['question']} -> {', '.join(row['answers']['text']) or 'no answer'}")
