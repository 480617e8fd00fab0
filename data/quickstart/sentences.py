"""A small English: sentence patterns over word lists, drawn so that every word is used about equally often."""

import random
import re
from collections.abc import Iterator

#: ``{name}`` in a pattern stands for an item of this list; items may hold further names.
WORDS = {
    "person": "farmer teacher doctor driver sailor painter captain singer",
    "relative": "mother father brother sister uncle cousin",
    "name": "anna peter maria thomas helen martin",
    "animal": "horse rabbit monkey tiger elephant chicken",
    "animals": "horses rabbits monkeys tigers elephants chickens",
    "adjective": "old young clever friendly famous lonely",
    "quality": "heavy broken wooden golden empty beautiful",
    "colour": "yellow purple orange silver green black",
    "thing": "basket ladder candle blanket hammer mirror bottle guitar umbrella jacket",
    "did": "carried painted dropped borrowed discovered forgot delivered",
    "do": "find bring move hide remember",
    "went": "walked waited danced worked",
    "place": "{near} the {where}",
    "near": "near behind under beside",
    "where": "bridge garden kitchen market village river mountain hospital",
    "city": "london paris berlin madrid boston",
    "vehicle": "train bus ferry plane",
    "leaves": "leaves arrives returns",
    "hour": "three five six seven nine eleven",
    "daytime": "morning afternoon evening",
    "number": "three five six seven nine eleven twelve twenty",
    "day": "monday tuesday thursday friday sunday",
    "month": "january march august september october",
    "when": "today|tomorrow|every {day}|on {day} {daytime}|before {day}|after {hour} in the {daytime}|in {month}",
    "past": "yesterday|last {month}|last {day}|after midnight|before breakfast|all {daytime}|on {day} {daytime}",
    "weather": "cloudy sunny windy foggy stormy",
    "direction": "north south east west",
    "unit": "pounds|boxes|bottles",
    "food": "sugar butter coffee pepper honey chocolate lemon",
    "likes": "loves enjoys hates",
    "doing": "swimming reading cooking painting",
    "bigger": "bigger faster stronger",
    "activity": "stay at home|visit the {where}|play football|drink some {food}|watch the {animals}|travel to {city}",
    "very": "very|always|never",
}

PATTERNS = """
the {adjective} {person} {did} the {quality} {thing}
the {adjective} {person} {did} a {colour} {thing} {place}
a {quality} {thing} was {place} {past}
{name} {did} my {thing} {past}
please {do} the {colour} {thing} {place}
could you {do} the {quality} {thing} for my {relative}
it will be {weather} in the {direction} {when}
it was {weather} and {weather} in {city} {past}
the {vehicle} to {city} {leaves} at {hour} in the {daytime}
the next {vehicle} from {city} {leaves} {when}
we need {number} {unit} of {food} and some {food}
would you like {food} or {food} with your {food}
where did the {person} {do} the {thing}
why did {name} {do} a {colour} {thing} {past}
most {animals} are {bigger} than a {quality} {animal}
{name} never {likes} {doing} in {month}
my {relative} {likes} {doing} {place}
her {relative} is {very} {adjective} in the {daytime}
the {colour} {animal} is {bigger} than your {animal}
there were {number} {animals} {place}
i saw {number} {colour} {animals} and a {animal}
{name} and {name} {went} {place} {past}
the {person} and the {relative} {went} {past}
if it is {weather} {when} we will {activity}
they want to {activity} with {name}
our {relative} sold {number} {quality} things in {month}
nobody {did} the {person} from {city}
""".strip().splitlines()


class Deck:
    """Deals a list's items in random order, all of them before any comes again."""

    def __init__(self, items: list[str], random_numbers: random.Random):
        self._items = items
        self._random = random_numbers
        self._left: list[str] = []

    def deal(self) -> str:
        if not self._left:
            self._left = self._random.sample(self._items, len(self._items))
        return self._left.pop()


def sentences(seed: int) -> Iterator[str]:
    """Endlessly many sentences, no two of them equal."""
    random_numbers = random.Random(seed)
    decks = {name: Deck(_items(text), random_numbers) for name, text in WORDS.items()}
    patterns = Deck(PATTERNS, random_numbers)
    told = set()
    while True:
        sentence = patterns.deal()
        while "{" in sentence:
            sentence = re.sub(r"\{(\w+)\}", lambda match: decks[match[1]].deal(), sentence)
        sentence = re.sub(r"\ba (?=[aeiou])", "an ", sentence)
        if sentence not in told and not re.search(r"\b(\w+) (?:and|or|with your) (?:some )?\1\b", sentence):
            told.add(sentence)
            yield sentence


def _items(text: str) -> list[str]:
    """``a b c``, or ``a thing|another thing`` where items have several words."""
    flat = " ".join(text.split())
    return flat.split("|") if "|" in flat else [flat] if "{" in flat else flat.split(" ")
