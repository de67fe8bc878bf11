"""Commands to a house, with the intent of each and the slots in it: expands the templates of home-assistant-intents.

    python prepare.py home_assistant_intents     fetches the templates by pip, and makes a data set of them

A template such as `turn on [the] {area} (light|lamp)[s]` stands for many sentences: [...] may be absent, (a|b) is a or
b, (a;b) is a and b in any order, <rule> is another template, and {list} or {list:slot} is a slot with a value from a
list. The package's lists of rooms, devices, messages and the like are open; the values for these are below.
"""

import hashlib
import random
import re

HELD_OUT = 0.15  # the share of an intent's templates that is for validation, and once more for test
EXPANSIONS = 6  # sentences made of a template, at least
OF_INTENT = 40  # sentences made of an intent, at least, if its templates yield so many
TOKEN = re.compile(r"[\[\]()|;]|\{[^{}]*\}|<[^<>]*>|[^\[\]()|;{}<>]+")
WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")

# ----------------------------------------------------------------------------------------------------------------------
# The values of open slots: of five neighbours, the fourth is for validation, the fifth for test

VALUES = {name: text.split(", ") for name, text in {
    "area": "kitchen, living room, bedroom, bathroom, office, hallway, garage, basement, attic, dining room, laundry"
            " room, guest room, nursery, patio, garden, balcony, porch, library, studio, workshop, pantry, den,"
            " playroom, gym, music room, conservatory, cellar, cloakroom, utility room, game room, backyard, driveway,"
            " greenhouse, study, foyer, sunroom, mudroom, loft, home theater, master bedroom",
    "floor": "ground, first, second, third, top, upper, lower, main, middle, bottom, fourth, fifth, sixth, seventh,"
             " mezzanine",
    "zone": "home, work, school, the gym, the office, grandma's house, the park, the station, the library, church, the"
            " supermarket, the airport, town, the pool, the cabin",
    "message": "dinner is ready, the taxi is here, we leave in ten minutes, lunch is on the table, it is bedtime, the"
               " dog is out, please come downstairs, the guests have arrived, homework first, turn the music down, the"
               " movie is about to start, somebody left the tap running, breakfast is served, the cat wants in, time to"
               " wake up, the package came, I am going out, your bath is ready, be quiet for a while, grandpa is on the"
               " phone",
    "search_query": "the beatles, some jazz, bohemian rhapsody, taylor swift, mozart, the daily news, miles davis, dark"
                    " side of the moon, blue in green, nina simone, the four seasons, a love supreme, daft punk,"
                    " nirvana, summer hits, hotel california, johnny cash, the science hour, radiohead, clair de lune,"
                    " david bowie, road trip, abbey road, billie holiday, kind of blue",
    "timer_name": "pizza, pasta, tea, laundry, egg, bread, homework, chicken, workout, oven, rice, nap, cookies, piano"
                  " practice, sauna, meditation, roast, coffee, dishwasher, parking",
    "timer_command": "turn off the lights, open the garage door, close the blinds, play some music, lock the front"
                     " door, turn on the heating, pause the movie, start the vacuum, turn down the volume, set the"
                     " thermostat to 20 degrees, switch off the fan, open the curtains, dim the lamp, stop the"
                     " sprinkler, unlock the gate",
    "shopping_list_item": "milk, eggs, bread, apples, toilet paper, butter, coffee beans, orange juice, rice, olive"
                          " oil, tomatoes, dish soap, a bag of flour, chicken, cheese, bananas, light bulbs, two"
                          " lemons, yogurt, sparkling water, onions, batteries, brown sugar, cat food, spinach",
    "todo_list_item": "call the dentist, wash the car, pay the rent, water the plants, clean the windows, book the"
                      " flights, fix the sink, buy a present, walk the dog, write to anna, renew the passport, return"
                      " the books, mow the lawn, paint the fence, do the dishes, file the taxes, sharpen the knives,"
                      " order firewood, change the sheets, visit grandma"}.items()}
NAMES = {domain: text.split(", ") for domain, text in {  # of devices and the like, by what they are
    "light": "ceiling light, desk lamp, floor lamp, reading light, fairy lights, night light, chandelier, bedside"
             " lamp, spotlights, strip light, wall lamp, lantern, pendant, piano lamp, mirror light",
    "switch": "coffee maker, heater, christmas tree, kettle, fountain, printer, aquarium pump, toaster, humidifier,"
              " radio",
    "fan": "ceiling fan, desk fan, extractor fan, tower fan, bathroom fan, box fan, window fan, exhaust, attic fan,"
           " pedestal fan",
    "cover": "blinds, garage door, left curtain, shutters, awning, roller shade, front gate, skylight, right curtain,"
             " venetian blind",
    "lock": "front door, back door, side gate, garage lock, cellar door, patio door, office door, mailbox, shed door,"
            " deadbolt",
    "valve": "water valve, sprinkler, gas valve, garden hose, main valve, drip line, lawn valve, pool valve, tap,"
             " radiator valve",
    "media_player": "tv, speaker, soundbar, stereo, projector, apple tv, kitchen speaker, record player, big screen,"
                    " radio alarm",
    "climate": "thermostat, air conditioner, heat pump, radiator, floor heating, bedroom thermostat, boiler, hallway"
               " heating, wall unit, fireplace",
    "sensor": "outdoor temperature, humidity sensor, power meter, rain gauge, battery level, wind sensor, fridge"
              " temperature, air quality, light sensor, pool temperature",
    "binary_sensor": "motion sensor, parking space, crib, driver's seat, hallway sensor, window contact, couch sensor,"
                     " presence sensor, guest bed, doorbell",
    "person": "anna, john, maria, david, sophie, michael, emma, peter, julia, thomas, laura, ben, clara, oliver, nora",
    "weather": "london, home, berlin, outdoor, paris, seattle, garden, local, madrid, airport",
    "lawn_mower": "robot, mower bot, front lawn, grass cutter, shaun, back lawn, robby, clipper, goat, hedgehog",
    "todo": "chores, weekend, work, packing, family, birthday, household, holiday, errands, garage",
    "scene": "movie night, sunset, romantic dinner, good morning, party, reading time, relax, bright evening, focus,"
             " christmas mood",
    "button": "doorbell, restart, identify, emergency stop, feeder, gong, reset, alarm test, reboot, camera snapshot",
    "script": "bedtime routine, leave home, wake up, vacation mode, cleaning day, lunch break, arrive home, game time,"
              " fire drill, goodnight sequence",
    "vacuum": "roomba, dusty, vacuum cleaner, robot vacuum, rosie, deebot, sweeper, wall-e, dust buster,"
              " cleaner"}.items()}


def part(values, split):
    """The values that a split may use."""
    return [value for i, value in enumerate(values) if split == {3: "val", 4: "test"}.get(i % 5, "train")]


# ----------------------------------------------------------------------------------------------------------------------
# Templates

def parse(template):
    """A template as a tree: a list of parts, each a str (text, {slot} or <rule>) or a tuple (optional, mark, choices).

    mark: ";" if all choices are said, in any order, else "|". choices: a list of trees.
    """
    tokens = TOKEN.findall(template)[::-1]
    tree = group(tokens)
    assert not tokens, f"unbalanced brackets: {template}"
    return tree[2][0] if len(tree[2]) == 1 else [tree]


def group(tokens, optional=False):
    """Takes tokens up to the bracket that ends the group from the end of the list. Returns the group, a tuple."""
    mark, choices = "|", [[]]
    while tokens and (token := tokens.pop()) not in (")", "]"):
        if token in ("|", ";"):
            mark = token
            choices.append([])
        else:
            choices[-1].append(group(tokens, token == "[") if token in ("(", "[") else token)
    return optional, mark, choices


class Expansion:
    """One sentence of a template. text: the sentence. slots: for each character None, or (slot, its number).

    intents: the language's file. domains: what {name} may be, keys of NAMES. split: whose values it may use.
    """

    def __init__(self, template, intents, domains, split, draw):
        self.intents, self.domains, self.split, self.draw = intents, domains, split, draw
        self.text, self.slots, self.number = "", [], 0
        self.add(parse(template))

    def add(self, tree, slot=None):
        for node in tree:
            if isinstance(node, tuple):
                self.add_group(*node, slot)
            elif node[0] == "{":
                self.number += 1
                values, _, name = node[1:-1].partition(":")
                self.add(self.value(values), (name or values, self.number))
            elif node[0] == "<":
                self.add(parse(self.intents["expansion_rules"][node[1:-1]]), slot)
            else:
                self.text += node
                self.slots += [slot] * len(node)

    def add_group(self, optional, mark, choices, slot):
        if optional and self.draw.random() < 0.5:
            return
        if mark == "|":
            self.add(self.draw.choice(choices), slot)
            return
        for choice in self.draw.sample(choices, len(choices)):
            self.add([" ", *choice, " "], slot)

    def value(self, name):
        """A tree: the value of a slot. name: of the list that it comes from."""
        listed = self.intents["lists"].get(name, {})
        if "range" in listed:
            least, most, step = (listed["range"].get(key, 1) for key in ("from", "to", "step"))
            return [str(self.draw.randrange(least, most + 1, step))]
        if "values" in listed:
            value = self.draw.choice(listed["values"])
            return parse(value["in"] if isinstance(value, dict) else value)
        values = NAMES[self.draw.choice(self.domains)] if name == "name" else VALUES[name]
        return [self.draw.choice(part(values, self.split))]

    def row(self):
        """{"words": list of str, "tags": a BIO label for each}. A word has the slot of its first character."""
        found = [(match[0], self.slots[match.start()]) for match in WORD.finditer(self.text)]
        before = [None, *(slot for _, slot in found)]
        tags = ["O" if slot is None else ("I-" if slot == last else "B-") + slot[0]
                for last, (_, slot) in zip(before, found)]
        return {"words": [word for word, _ in found], "tags": tags}


# ----------------------------------------------------------------------------------------------------------------------
# The data set

def generate(intents):
    """A list of rows, dicts with words, tags, intent and split; always the same. intents: a file of the package, read.

    Templates and values are held out. A sentence for validation or test is left out if it is in an earlier split, or
    differs from one there only in numbers.
    """
    rows = {"train": {}, "val": {}, "test": {}}  # of each split: {sentence: row}
    for intent, found in intents["intents"].items():
        templates = [(template, block) for block in found["data"] for template in block["sentences"]]
        wanted = max(EXPANSIONS, -(-OF_INTENT // len(templates)))
        for split, template, block in held_out(templates):
            draw = random.Random(f"{intent} {template}")
            domains = [name for name in block.get("requires_context", {}).get("domain", []) if name in NAMES]
            for _ in range(wanted):
                row = Expansion(template, intents, domains or list(NAMES), split, draw).row()
                rows[split].setdefault(" ".join(row["words"]).lower(), {**row, "intent": intent, "split": split})
    kept, earlier = [], set()
    for split in rows.values():
        without_numbers = {text: re.sub(r"\d+", "0", text) for text in split}
        kept += [row for text, row in split.items() if without_numbers[text] not in earlier]
        earlier |= set(without_numbers.values())
    return kept


def held_out(templates):
    """[(split, template, block)] of an intent, from [(template, block)], in the order of the templates' hashes.

    The first HELD_OUT of them are for validation, as many for test, at least one each. Of fewer than three, none is.
    """
    templates = sorted(templates, key=lambda pair: hashlib.sha256(pair[0].encode("utf-8")).digest())
    count = max(1, round(HELD_OUT * len(templates))) if len(templates) > 2 else 0
    splits = ["val"] * count + ["test"] * count + ["train"] * (len(templates) - 2 * count)
    return [(split, *pair) for split, pair in zip(splits, templates)]
