"""Small tasks made from a seed: they teach a model instructions, and its answers can be scored.

    reverse, upper, sort    a word: "Reverse", "abc" -> "cba"
    last                    some words: the last of them
    add                     a sum of two numbers below 100
    triangle                the area, as a sentence
    table                   a table of a restaurant: a sentence, one of four that are right
    sql                     a question about CITIES: the query that finds the answer
    similarity              two words: how many of their letters are the same, from 0.0 to 5.0

The first five and the last take at most 40 bytes, prompt and end included, if `Words` do not make
words longer. Queries can be written in many ways, so sql is scored by running them, see queries.py.
"""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import numpy as np

from minilm.data.instructions import Record, prompt
from minilm.data.persona import PERSONAS, has_style, is_right
from minilm.data.queries import same_rows
from minilm.data.text_to_text import written

CITIES = (  # cities(name, country, population)
    ("Berlin", "Germany", 3_700_000),
    ("Hamburg", "Germany", 1_900_000),
    ("Munich", "Germany", 1_500_000),
    ("Paris", "France", 2_100_000),
    ("Marseille", "France", 900_000),
    ("Lyon", "France", 500_000),
    ("Rome", "Italy", 2_800_000),
    ("Milan", "Italy", 1_400_000),
)

NAMES = (
    "Aromi", "Blue Door", "Corner House", "Dune", "Elm Tree", "Fig", "Gusto", "Harvest",
    "Inn", "Juniper", "Kiosk", "Laurel", "Mill", "North Star", "Olive", "Pepper",
)
FOODS = ("Chinese", "French", "Greek", "Indian", "Italian", "Japanese", "Mexican", "Thai")
PRICES = ("cheap", "fair", "high-priced")
AREAS = ("city centre", "harbour", "old town", "riverside")
SENTENCES = (
    "{name} serves {price} {food} food in the {area}.",
    "{name} is a {price} {food} restaurant in the {area}.",
    "In the {area}, {name} offers {price} {food} food.",
    "For {price} {food} food in the {area}, go to {name}.",
)


class Words(NamedTuple):
    """Which words the tasks on words draw."""

    first: str = "a"  # of their letters
    last: str = "z"
    least: int | None = None  # letters in a word; None: as each task has it
    most: int | None = None

    def draw(self, rng: np.random.Generator, least: int, most: int) -> str:
        """A word, by default of `least` to `most` letters."""
        least, most = self.least or least, self.most or most
        size = rng.integers(least, most + 1)
        return rng.integers(ord(self.first), ord(self.last) + 1, size, np.uint8).tobytes().decode()


ALL = Words()


def make_tasks(
    names: Iterable[str], train: int, test: int, seed: int, words: Words = ALL
) -> tuple[list[Record], list[Record]]:
    """(train, test) records of each named task, task after task; no two with the same prompt.

    words: what the tasks on words draw. A task's records do not depend on the other names.
    ValueError for no name or one that is not in TASKS, for words that are to be different in a task
    without words, and if a task cannot give as many records.
    """
    if train < 0 or test < 0:
        raise ValueError(f"train and test must not be negative, got {train} and {test}")
    if not (names := tuple(dict.fromkeys(names))):
        raise ValueError(f"no task is named; there are {', '.join(TASKS)}")
    made = [_distinct(name, train + test, seed, words) for name in names]
    return (
        [record for records in made for record in records[:train]],
        [record for records in made for record in records[train:]],
    )


def score(record: Record, answer: str) -> bool:
    """Is the answer the record's output or one of its references, to the letter?

    For task "sql": does the answer find the rows that the output finds in CITIES, and in the same
    order if the output has ORDER BY? The answer must be a single SELECT without another inside; all
    else is wrong, whatever it would do. (A wrong query may happen to find the right rows.) It takes
    about 30 ms. ValueError if the output is no such query.

    For a task that is named like a persona (persona.py): does the answer say the output's fact, and
    has it the persona's style?
    """
    if record.task in PERSONAS:
        return has_style(record.task, answer) and is_right(record, answer)
    if record.task != "sql":
        return answer in (record.output, *record.references)
    right = same_rows("cities (name, country, population)", CITIES, record.output, answer)
    if right is None:
        raise ValueError(f"the output must be a query on cities, got {record.output!r:.200}")
    return right


def reverse(rng: np.random.Generator, words: Words = ALL) -> Record:
    word = words.draw(rng, 3, 6)
    return Record("Reverse", word, word[::-1], task="reverse")


def upper(rng: np.random.Generator, words: Words = ALL) -> Record:
    word = words.draw(rng, 3, 6)
    return Record("Upper", word, word.upper(), task="upper")


def sort(rng: np.random.Generator, words: Words = ALL) -> Record:
    word = words.draw(rng, 3, 6)
    return Record("Sort", word, "".join(sorted(word)), task="sort")


def last(rng: np.random.Generator, words: Words = ALL) -> Record:
    drawn = [words.draw(rng, 2, 4) for _ in range(rng.integers(2, 5))]
    return Record("Last word", " ".join(drawn), drawn[-1], task="last")


def similarity(rng: np.random.Generator, words: Words = ALL) -> Record:
    """Two words of as many letters. The score is 5 times the share of places with the same letter,
    as text; each number of such places has the same chance."""
    word, first = words.draw(rng, 3, 6), ord(words.first)
    size, letters = len(word), ord(words.last) - first + 1
    same = int(rng.integers(size + 1)) if letters > 1 else size
    other = np.array([*word.encode()]) - first
    moved = rng.permutation(size)[same:]
    if same < size:
        other[moved] = (other[moved] + rng.integers(1, letters, size - same)) % letters
    other = bytes((other + first).tolist()).decode()
    return Record("Similarity", f"{word} {other}", written(5 * same / size), task="similarity")


def add(rng: np.random.Generator) -> Record:
    a, b = rng.integers(100, size=2)
    return Record("Add", f"{a}+{b}", f"{a + b}", task="add")


def triangle(rng: np.random.Generator) -> Record:
    """The area is half the product of base and height, which are 1 to 50 cm each."""
    base, height = rng.integers(1, 51, size=2)
    return Record(
        "Calculate the area of the triangle",
        f"Base: {base}cm; Height: {height}cm",
        f"The area of the triangle is {base * height / 2:g} cm^2",
        task="triangle",
    )


def table(rng: np.random.Generator) -> Record:
    """One of SENTENCES; the others are its references."""
    columns = {"name": NAMES, "food": FOODS, "price": PRICES, "area": AREAS}
    row = {column: values[rng.integers(len(values))] for column, values in columns.items()}
    sentences = [sentence.format(**row) for sentence in rng.permutation(SENTENCES)]
    context = " | ".join(f"{column}: {value}" for column, value in row.items())
    return Record("Describe", context, sentences[0], tuple(sentences[1:]), task="table")


def sql(rng: np.random.Generator) -> Record:
    """A question about one of CITIES. A question about a size always finds at least that city."""
    name, country, population = CITIES[rng.integers(len(CITIES))]
    least = 10_000 * rng.integers(1, population // 10_000)
    place, also = [("", ""), (f" in {country}", f" AND country = '{country}'")][rng.integers(2)]
    found = f"FROM cities WHERE population > {least}{also}"
    more = f"cities{place} have more than {least} people?"
    questions = [
        (f"Which {more}", f"SELECT name {found}"),
        (f"Which {more} Largest first.", f"SELECT name {found} ORDER BY population DESC"),
        (f"How many {more}", f"SELECT COUNT(*) {found}"),
        (f"Where is {name}?", f"SELECT country FROM cities WHERE name = '{name}'"),
    ]
    question, query = questions[rng.integers(len(questions))]
    return Record("SQL", question, query, task="sql")


ON_WORDS = {task.__name__: task for task in (reverse, upper, sort, last, similarity)}
TASKS = {task.__name__: task for task in (
    reverse, upper, sort, last, add, triangle, table, sql, similarity)}


def _distinct(name, count, seed, words):
    """`count` records of a task, no two with the same prompt."""
    if name not in TASKS:
        raise ValueError(f"{name!r} is none of the tasks {', '.join(TASKS)}")
    if words != ALL and name not in ON_WORDS:
        raise ValueError(f"task {name!r} draws no words, got {words}")
    make = partial(ON_WORDS[name], words=words) if name in ON_WORDS else TASKS[name]
    rng, found, misses = np.random.default_rng([seed, *name.encode()]), {}, 0
    while len(found) < count:
        record = make(rng)
        misses = misses + 1 if prompt(record) in found else 0
        if misses > 1000 + 10 * len(found):  # if one were left, the chance was e^-10
            raise ValueError(f"task {name!r} gave {len(found)} distinct records, not {count}")
        found.setdefault(prompt(record), record)
    return list(found.values())
