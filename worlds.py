"""Worlds in which right and wrong can be checked: problems without end, their answers, and who says what is right.

    world = WORLDS["countdown"]
    world.problem(seed=1, index=0)              ("3 12 17=53", "3*12+17")
    world.check("3 12 17=53", "17+12*3")        1.0: right; 0.0: wrong; None: malformed

A problem is a pure function of (part, seed, index). Each part, train, val or test, has the problems whose key has some
tenths of a hash, so that no problem of one part occurs in another, however its operands are ordered.
"""

import hashlib
import operator
import re

import numpy as np

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
PARTS = {"val": (0,), "test": (1,), "train": range(2, 10)}  # which tenths of all keys each part has
SIZES = {"val": 500, "test": 800}  # how many problems score a model


class World:
    """The base class. A world adds the texts below, draw(generator) and check(prompt, answer)."""
    name = characters = ""  # characters: all that occur in prompts and answers
    longest = (0, 0)  # the most characters of a prompt and of an answer

    def draw(self, generator):
        """(prompt, a right answer, key of the problem, the same for equal problems)."""

    def check(self, prompt, answer):
        """1.0 if the answer is right, 0.0 if it is wrong, None if it is malformed."""

    def equation(self, prompt, answer):
        """A problem and its answer as one true equation."""

    def text(self, count):
        """Lines of eight equations each, from `count` training problems: a text to pre-train on."""
        equations = [self.equation(*self.problem(2, index)) for index in range(count)]
        return "".join(" ".join(equations[i:i + 8]) + "\n" for i in range(0, count, 8))

    def problem(self, seed, index, part="train"):
        """(prompt, a right answer)."""
        stream = np.array((list(PARTS).index(part) << 32 | seed, index), dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=stream))
        while True:
            prompt, answer, key = self.draw(generator)
            if tenth(f"{self.name} {key}") in PARTS[part]:
                return prompt, answer

    def problems(self, part, count, seed=0):
        """[(prompt, a right answer)], `count` different ones."""
        found = {}
        for index in range(100 * count):
            found.setdefault(*self.problem(seed, index, part))
            if len(found) == count:
                return list(found.items())
        raise ValueError(f"{self.name} has only {len(found):,} problems for {part}, not {count:,}")


class Calculator(World):
    """Sums, differences and products of small numbers: ("37+58", "95"). One right answer each."""
    name, characters, longest = "calculator", "0123456789+-*", (5, 3)

    def draw(self, generator):
        sign = "+-*"[generator.integers(3)]
        a, b = (int(generator.integers(0, most)) for most in ((100, 10) if sign == "*" else (100, 100)))
        return f"{a}{sign}{b}", str(SIGNS[sign](a, b)), (sign, *sorted((a, b)))

    def equation(self, prompt, answer):
        return f"{prompt}={answer}"

    def check(self, prompt, answer):
        if not re.fullmatch(r"-?\d+", answer):
            return None
        a, sign, b = re.fullmatch(r"(\d+)([-+*])(\d+)", prompt).groups()
        return float(answer == str(SIGNS[sign](int(a), int(b))))


class Countdown(World):
    """Reach a number from three others, each used once: ("3 12 17=53", "3*12+17"). Many have several right answers."""
    name, characters, longest = "countdown", "0123456789+-*= ", (11, 8)
    largest, most = 20, 99  # of the numbers, and of the number to reach

    def draw(self, generator):
        while True:
            numbers = [int(number) for number in generator.integers(1, self.largest + 1, 3)]
            signs = ["+-*"[i] for i in generator.integers(0, 3, 2)]
            target = value(numbers, signs)
            if 1 <= target <= self.most:
                answer = f"{numbers[0]}{signs[0]}{numbers[1]}{signs[1]}{numbers[2]}"
                prompt = f"{' '.join(map(str, sorted(numbers)))}={target}"
                return prompt, answer, prompt

    def equation(self, prompt, answer):
        return f"{answer}={prompt.partition('=')[2]}"

    def check(self, prompt, answer):
        if not re.fullmatch(r"\d{1,2}([-+*]\d{1,2}){2}", answer):
            return None
        numbers, signs = list(map(int, re.findall(r"\d+", answer))), re.findall(r"[-+*]", answer)
        given, target = prompt.split("=")
        same = sorted(numbers) == sorted(map(int, given.split()))
        return float(same and value(numbers, signs) == int(target))


def value(numbers, signs):
    """What a chain of numbers and signs between them is, products first: 2 + 3 * 4 is 14."""
    terms, signs_of_terms = [numbers[0]], ["+"]
    for sign, number in zip(signs, numbers[1:]):
        if sign == "*":
            terms[-1] *= number
        else:
            terms.append(number)
            signs_of_terms.append(sign)
    return sum(term if sign == "+" else -term for sign, term in zip(signs_of_terms, terms))


def tenth(key):
    """A number from 0 to 9 for a text: a hash."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % 10


WORLDS = {world.name: world for world in (Calculator(), Countdown())}
