"""Grammars and the stories made by one: what is made is accepted, what is broken is not."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minilm.data.grammar import Grammar
from minilm.data.stories import (
    NAMES,
    accepts,
    grammar,
    holds_together,
    make_stories,
    make_story,
    sentences_of,
    spelled,
    tokens_of,
)

seeds = st.integers(0, 2**32)
STORIES = make_stories(4000, 0)

# Any small grammar: C is words, B stands for rows of words and C, A of words, B and C.
rows_of_b = st.lists(st.sampled_from(["x", "y", "C"]), min_size=1, max_size=3)
rows_of_a = st.lists(st.sampled_from(["x", "z", "B", "C"]), min_size=1, max_size=3)
small = st.builds(
    lambda a, b, c: Grammar({"A": [*map(" ".join, a)], "B": [*map(" ".join, b)]}, {"C": c}),
    st.lists(rows_of_a, min_size=1, max_size=3), st.lists(rows_of_b, min_size=1, max_size=3),
    st.lists(st.sampled_from("xyz"), min_size=1, max_size=2))


def language(g, symbol):
    """All phrases of a symbol, by trying every choice."""
    if symbol in g.classes:
        return {(word,) for word in g.classes[symbol]}
    if symbol not in g.rules:
        return {(symbol,)}
    return {tuple(itertools.chain(*parts)) for choice in g.rules[symbol]
            for parts in itertools.product(*(language(g, part) for part in choice))}


@given(small, st.lists(st.sampled_from("xyzw"), max_size=6), st.integers(0, 2**32))
def test_a_phrase_is_accepted_iff_some_choice_makes_it(g, words, seed):
    made = language(g, "A")
    assert g.accepts(words, "A") == (tuple(words) in made)
    assert all(g.accepts(phrase, "A") for phrase in sorted(made)[:5])
    drawn = g.draw(np.random.default_rng(seed), "A")
    assert tuple(drawn) in made and {*drawn} <= g.words


def test_frequent_words_come_first():
    """The r-th with a chance in proportion to 1 / r: of three 6, 3 and 2 in 11."""
    g, rng = Grammar({"S": ["W"]}, {"W": ["a", "b", "c"]}), np.random.default_rng(0)
    drawn = [g.draw(rng, "S")[0] for _ in range(4400)]
    assert all(abs(drawn.count(word) - 400 * n) < 100 for word, n in zip("abc", (6, 3, 2)))


@pytest.mark.parametrize("rules, classes, complaint", [
    ({"S": ["a S"]}, {}, "'S' can stand inside itself"),
    ({"S": ["A b"], "A": ["S"]}, {}, "can stand inside itself"),
    ({"S": ["a", " "]}, {}, "'S' needs one alternative or more"),
    ({"S": []}, {}, "'S' needs one alternative or more"),
    ({"S": ["W"]}, {"W": "dog cat"}, "'W' needs one alternative or more"),
    ({"S": ["a"]}, {"S": ["b"]}, "'S' has alternatives, and is a class of words"),
])
def test_what_is_no_grammar(rules, classes, complaint):
    with pytest.raises(ValueError, match=complaint):
        Grammar(rules, classes)


@given(seeds)
def test_every_story_is_accepted(seed):
    story = make_story(np.random.default_rng(seed))
    sentences = sentences_of(story)
    assert all(map(accepts, sentences)) and holds_together(story)
    assert " ".join(sentences) == story
    assert [spelled(tokens_of(sentence)) for sentence in sentences] == sentences


@given(st.sampled_from(STORIES), st.data())
def test_a_broken_sentence_is_not_accepted(story, data):
    """A word that no sentence has, a word twice, or other spaces, capitals or ends."""
    sentence = data.draw(st.sampled_from(sentences_of(story)))
    words = sentence.split(" ")
    place = data.draw(st.integers(0, len(words) - 1))
    twice = words[: place + 1] + words[place:]
    assume(words[place] != "very")  # all else that stands twice is wrong
    for broken in (" ".join(twice), sentence[:-1], sentence + ".", sentence.replace(" ", "  ", 1),
                   " " + sentence, sentence.swapcase(), sentence.replace(" ", " blorb ", 1), ""):
        assert not accepts(broken), broken


AGREE = [
    ("A dog ran.", "An dog ran."), ("An owl slept.", "A owl slept."),
    ("An old cat ran.", "A old cat ran."), ("A big owl ran.", "An big owl ran."),
    ("The dog was happy.", "The dog were happy."), ("The dogs were sad.", "The dogs was sad."),
    ("They were sad.", "They was sad."), ("She was happy.", "She were happy."),
    ("Lily lost her ball.", "Lily lost their ball."), ("Tom lost his ball.", "Tom lost her ball."),
    ("The cat ate its cake.", "The cat ate his cake."),
    ("Tom and Mia took their toys.", "Tom and Mia took his toys."),
    ("She saw these dogs.", "She saw these dog."), ("She saw that dog.", "She saw that dogs."),
    ("She saw two dogs.", "She saw two dog."), ("He wanted to run.", "He wanted to ran."),
    ("He could not find the ball.", "He could not found the ball."),
    ("He ate the cake.", "He ate the ball."), ("He ran to the park.", "He ran to the happy."),
    ("Then, he ran.", "Then he ran."), ("He ran because she jumped.", "He ran because."),
    ("Once upon a time there was a boy named Tom.", "Once upon a time there was a boy named Lily."),
    ("She had a friend named Tom.", "She had a friend named Lily."),
    ("He lived near a girl named Amy.", "He lived near a girl named Tom."),
]


@pytest.mark.parametrize("right, wrong", AGREE)
def test_words_agree(right, wrong):
    assert accepts(right) and not accepts(wrong)


BEGIN = "Once upon a time there was a girl named Lily. She had a friend named Tom."


@pytest.mark.parametrize("story, whole", [
    (BEGIN, True), (f"{BEGIN} Lily ran. He was sad.", True), (f"{BEGIN} Tom and Lily ran.", True),
    (f"{BEGIN} Mia ran.", False), (f"{BEGIN} Lily was sad", False), (f"{BEGIN}  Tom ran.", False),
    (f"{BEGIN} He were sad.", False), (f"{BEGIN} {BEGIN}", False), ("Lily ran. Tom ran.", False),
    ("Once upon a time there was a girl named Lily. He had a friend named Mia.", False),
    ("Once upon a time there was a girl named Lily.", False), ("", False),
    ("Once upon a time there was a boy named Tom. He had a friend named Lily. He ran.", True),
])
def test_a_story_holds_together(story, whole):
    assert holds_together(story) is whole


def test_stories_are_of_about_1500_words_and_few_letters():
    assert 1400 < len(grammar().words) < 1600
    assert sum(map(len, STORIES[:-1])) < 4000 <= sum(map(len, STORIES))
    length = len(STORIES[0])
    assert [len(make_stories(size, 0)) for size in (length, length + 1)] == [1, 2]
    assert max(map(len, make_stories(40_000, 1))) < 400
    assert all(any(kind in grammar().classes[f"NAME.{kind}"] or name in
                   grammar().classes[f"NAME.{kind}"] for kind in ("she", "he")) for name in NAMES)


def test_the_same_seed_tells_the_same_stories():
    assert make_stories(4000, 0) == STORIES != make_stories(4000, 1)
