"""Checks the stages of cleaning: each finds what was planted, and leaves what was not.

MinHash is compared with datasketch's, copies with all pairs, repeated passages with a dictionary of
windows.
"""

import hashlib
import itertools
import math
import random
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilm import data
from minilm.data.cleaning.duplicates import (
    MinHash,
    bands,
    chance,
    digest,
    groups,
    jaccard,
    normal,
    shingles,
)
from minilm.data.cleaning.funnel import Dropped, Funnel, Passed
from minilm.data.cleaning.language import identifier
from minilm.data.cleaning.private import hidden
from minilm.data.cleaning.quality import C4, GOPHER, REPETITION, Page, broken, c4_lines, top_letters
from minilm.data.cleaning.stages import by_language, make_stages
from minilm.data.cleaning.substrings import names, without_repeats

PROSE = [paragraph for text in data.load_corpus("python-reference").documents
         for paragraph in text.split("\n\n") if 300 < len(paragraph) < 1500]
WORDS = " ".join(PROSE[:4])  # good by every rule


# Rules


PLANTED = {
    "words": ("Too short a page.", GOPHER),
    "letters in a word": ("a b c d e of the " * 20, GOPHER),
    "# to a word": (WORDS.replace(" ", " #", 60), GOPHER),
    "ellipses to a word": (WORDS.replace(" ", " ... ", 60), GOPHER),
    "lines with a bullet": ("\n".join(f"- {line}" for line in WORDS.splitlines()), GOPHER),
    "lines that end in an ellipsis":
        ("\n".join(f"{i} the words of {i * i} and more words to read, on and on ..."
                   for i in range(20)), GOPHER),
    "words with a letter": (WORDS + " 1234" * 200, GOPHER),
    "kinds of the, be, to, of, and, that, have, with": ("Katze Hund Maus laufen " * 20, GOPHER),
    "repeated lines": ("the same line again\n" * 3 + WORDS.replace("\n", " "), REPETITION),
    "letters in the top 2 words in a row":
        (" ".join(f"buy now {word}" for word in sorted(set(WORDS.split()))[:40]), REPETITION),
    "sentences": ("One sentence stands here alone.", C4),
    "lorem ipsum": ("Lorem ipsum dolor. It is so. It was so.", C4),
    "curly brackets": ("f() { }. It is so. It was so.", C4),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_rule_finds_what_was_planted(name):
    text, rules = PLANTED[name]
    assert broken(text, rules).partition(":")[0] == name


def test_good_pages_break_no_rule():
    pages = [" ".join(PROSE[i : i + 4]) for i in range(0, 80, 4)]
    assert [broken(page, GOPHER) for page in pages].count(None) >= 19
    assert broken(WORDS, GOPHER | REPETITION) is None


def test_a_broken_rule_says_what_was_found_and_what_was_expected():
    assert broken("It was so.", GOPHER) == "words: 3, expected 50 to 100,000"
    assert broken("It was so.", C4) == "sentences: 1, expected at least 3"


@pytest.mark.parametrize("text, n, share", [
    ("aa bb aa bb cc", 2, 8 / 10), ("aa bb cc", 2, 0), ("aa", 2, 0), ("", 2, 0),
    ("aa bb cc aa bb cc", 3, 1),
])
def test_letters_of_the_top_words_in_a_row(text, n, share):
    assert top_letters(n, Page(text)) == pytest.approx(share)


def test_a_word_in_several_repeated_rows_counts_once():
    """a b c d e f twice: both rows of 5 come again, and all letters are in them."""
    measure = REPETITION["letters in any 5 words in a row that come again"].measure
    assert measure(Page("a b c d e f x a b c d e f")) == pytest.approx(12 / 13)
    assert measure(Page("a b c d e f g h i j")) == 0


def test_the_most_letters_that_come_again_are_gophers():
    """In percent, of table A1 of arXiv:2112.11446."""
    found = [round(100 * rule.high) for name, rule in REPETITION.items()]
    assert found == [30, 30, 20, 20, 20, 18, 16, 15, 14, 13, 12, 11, 10]


LINES = st.lists(st.sampled_from(["It is a good day for us.", "Home | About", "Enable Javascript "
                                  "to see all of this.", "See our privacy policy for more on it.",
                                  "Read on ...", "", "  It has five words here! "])
                 | st.text(max_size=30)).map("\n".join)


@given(LINES)
def test_lines_are_cut_once_and_for_all(text):
    once = c4_lines(text)
    assert c4_lines(once) == once
    assert {*once.splitlines()} <= {line.strip() for line in text.splitlines()}


def test_lines_that_stay():
    assert c4_lines("Menu\nIt is a good day for us.\nEnable Javascript to see all of this.\n"
                    "We wait ...\nSee our privacy policy for more on it.\nThese are four words."
                    ) == "It is a good day for us."


# Private data


PRIVATE = {
    "EMAIL": ["jo.doe+x@mail.example.org", "a@b.co"],
    "PHONE": ["+44 20 7946 0958", "(212) 555-0199", "+49 (0) 30 123456", "212-555-0199"],
    "IP": ["192.0.2.17", "2001:db8::1", "fe80::1ff:fe23:4567:890a"],
    "IBAN": ["GB82 WEST 1234 5698 7654 32", "DE89370400440532013000"],
    "CARD": ["4111 1111 1111 1111", "378282246310005", "5555-5555-5555-4444",
             "3782 822463 10005"],
}
PUBLIC = ["version 3.11.7", "a[1::2]", "12:30:45", "2026-11-27", "4111 1111 1111 1112", "1,234,567",
          "GB83 WEST 1234 5698 7654 32", "std::vector", "127.0.0.1", "x@y", "999.1.1.1", "3.14159",
          "978-3-16-148410-0", "1234567890123456", "::", "+0.1234567", "0x1234567890", "1.2.3.4.5"]


@pytest.mark.parametrize("kind, text", [(k, t) for k, texts in PRIVATE.items() for t in texts])
def test_private_data_are_hidden(kind, text):
    assert hidden(f"See {text}, please.") == (f"See <{kind}>, please.", {kind: 1})


@pytest.mark.parametrize("text", PUBLIC)
def test_other_numbers_stay(text):
    assert hidden(f"See {text}, please.") == (f"See {text}, please.", {})


@given(st.lists(st.sampled_from([*itertools.chain(*PRIVATE.values()), *PUBLIC, "<", "@", "."])
                | st.text(max_size=8)).map(" ".join))
@example("4111 1111 1111 1111 192.0.2.17")  # which begin like a number of 19 digits
def test_hiding_twice_is_hiding_once(text):
    once, _ = hidden(text)
    assert hidden(once) == (once, {})


@given(st.integers(0, 10**15 - 1))
def test_one_wrong_digit_is_no_card(number):
    """Of the ten last digits exactly one makes a card (but for 0 alone)."""
    found = [hidden(f"{number:015}{digit}")[1] for digit in range(10)]
    assert sum("CARD" in kinds for kinds in found) == (number > 0)


# Copies


@pytest.mark.peers
def test_signatures_are_those_of_datasketch():
    """It mixes the 32 bits once more before it permutes them; the hash undoes that."""
    datasketch = pytest.importorskip("datasketch")

    def unmixed(text):
        h = int.from_bytes(hashlib.sha1(text).digest()[:4], "little")
        for shift, factor in ((16, 0x7ED1B41D), (13, 0xA5CB9243), (16, 1)):  # fmix32 backwards
            h ^= h >> shift ^ (h >> 2 * shift if shift < 16 else 0)
            h = h * factor % 2**32
        return h

    theirs = datasketch.MinHash(num_perm=64, seed=5, hashfunc=unmixed)
    members = shingles(PROSE[0])
    for member in members:
        theirs.update(member.encode())
    np.testing.assert_array_equal(MinHash(64, seed=5)(members), theirs.hashvalues)


def test_shingles_are_words_in_a_row():
    assert shingles("a b c d", 3) == {"a b c", "b c d"}
    assert shingles("a b", 3) == {"a b"}


@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.integers(1, 60), st.integers(0, 60))
def test_equal_minima_estimate_the_likeness(seed, left, both, right):
    """Within 4 standard deviations of k coins: eq. (1)."""
    a = {f"l{i}" for i in range(left)} | {f"b{i}" for i in range(both)}
    b = {f"r{i}" for i in range(right)} | {f"b{i}" for i in range(both)}
    sign, J = MinHash(256, seed), jaccard(a, b)
    found = np.mean(sign(a) == sign(b))
    assert abs(found - J) <= 4 * math.sqrt(J * (1 - J) / 256) + 0.03


def test_candidates_come_as_often_as_the_formula_says():
    """Eq. (2), by 400 random signatures of sets that share two thirds."""
    J, found = 1 / 2, 0
    a = {str(i) for i in range(30)}
    b = {str(i) for i in range(10, 40)}
    assert jaccard(a, b) == J
    for seed in range(400):
        sign = MinHash(16, seed)
        found += (bands(sign(a), 4) == bands(sign(b), 4)).any()
    expected = chance(J, 16, 4)
    assert abs(found / 400 - expected) < 4 * math.sqrt(expected * (1 - expected) / 400)


def near_copies(rng: random.Random) -> list[str]:
    """30 pages, 10 of which are copies of others with one word changed, in a random order."""
    pages = [" ".join(PROSE[3 * i : 3 * i + 3]) for i in range(20)]
    copies = []
    for page in pages[:10]:
        words = page.split(" ")
        words[rng.randrange(len(words))] = "changed"
        copies.append(" ".join(words))
    return rng.sample(pages + copies, 30)


@pytest.mark.parametrize("seed", range(3))
def test_near_copies_are_found_and_nothing_else(seed):
    pages = near_copies(random.Random(seed))
    sets, sign = [shingles(page) for page in pages], MinHash()
    first = groups(np.array([bands(sign(members)) for members in sets]), sets.__getitem__)
    for i, j in itertools.combinations(range(30), 2):
        assert (first[i] == first[j]) == (jaccard(sets[i], sets[j]) >= 0.8)
    assert (first != np.arange(30)).sum() == 10
    assert (first <= np.arange(30)).all()


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), max_size=8))
def test_groups_are_linked_candidates(found):
    """With sets that are all alike, those that share a band with one, and with its friends."""
    hashes = np.array(found, np.uint64).reshape(-1, 2)
    first = groups(hashes, lambda i: {"one"})
    linked = [{i} for i in range(len(found))]
    for i, j in itertools.combinations(range(len(found)), 2):
        if any(a == b for a, b in zip(found[i], found[j])):
            both = linked[i] | linked[j]
            for k in both:
                linked[k] = both
    assert first.tolist() == [min(group) for group in linked]


def test_candidates_that_are_not_alike_stay():
    sets = [{"a", "b", "c", "d"}, {"a", "b", "c", "d", "e"}, {"a", "x"}]
    assert groups(np.zeros((3, 2), np.uint64), sets.__getitem__).tolist() == [0, 0, 2]
    assert groups(np.zeros((3, 2), np.uint64), sets.__getitem__, 0.81).tolist() == [0, 1, 2]


def test_copies_differ_in_case_digits_and_accents_only():
    assert digest("Café No. 7!") == digest("cafe  NO 12")
    assert digest("cafe") != digest("cage")
    assert normal("Ünder\nthe 3 Trees.") == "under the trees"
    assert digest("1, 2, 3") != digest("4, 5, 6")  # numbers alone are not all one text
    assert jaccard(shingles("1, 2, 3"), shingles("4, 5, 6")) == 0


@pytest.mark.parametrize("signature, count", [(np.zeros(8, np.uint32), 3)])
def test_bands_are_of_one_size(signature, count):
    with pytest.raises(ValueError, match="8 minima cannot be cut into 3 bands"):
        bands(signature, count)


# Passages


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 9))
def test_windows_have_the_same_name_if_they_are_equal(text, L):
    windows = [tuple(text[i : i + L]) for i in range(len(text) - L + 1)]
    if windows:
        found = names(np.array(text), L)
        assert len(found) == len(windows)
        for (a, x), (b, y) in itertools.combinations(zip(windows, found), 2):
            assert (a == b) == (x == y)


def by_dictionary(documents, L):
    """without_repeats by its definition."""
    seen, left = set(), []
    for text in documents:
        gone = set()
        for i in range(len(text) - L + 1):
            window = text[i : i + L]
            if window in seen:
                gone |= {*range(i, i + L)}
            seen.add(window)
        left.append("".join(c for i, c in enumerate(text) if i not in gone))
    return left


@given(st.lists(st.text("ab😀", max_size=20), max_size=5), st.integers(1, 6))
def test_passages_that_stood_before_are_cut(documents, L):
    assert without_repeats(documents, L) == by_dictionary(documents, L)


def test_a_passage_must_have_a_length():
    with pytest.raises(ValueError, match="L must be at least 1, got 0"):
        without_repeats(["a"], 0)


# Languages, and the stages together


GERMAN = "Der Hund und die Katze liegen am Ofen, während draußen der Schnee auf die Dächer fällt."


def test_without_py3langid_the_stage_can_be_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ImportError, match=r"^the stage language, which can be left out, needs "):
        identifier.__wrapped__()


@pytest.mark.parametrize("least", [0, 1])
def test_the_least_probability_may_be_an_end(least):
    assert [*make_stages(["language"], least=least)] == ["language"]


def test_languages_are_told_apart():
    assert isinstance(by_language(GERMAN, "en", 0.5), Dropped)
    assert by_language(GERMAN, "de", 0.5) == GERMAN
    assert by_language(WORDS, "en", 0.5) == WORDS
    assert by_language("1 + 2", "en", 0.5).reason == "too few letters to tell a language"


@pytest.mark.parametrize("options, error", [
    ({"names": ["magic"]}, "there is no stage 'magic', only size, language"),
    ({"code": "xx"}, "language 'xx' is not one of ace, af,"),
    ({"least": 1.5}, "least probability of a language is 0 to 1, got 1.5"),
    ({"largest": 0}, "must have 1 byte or more, got 0"),
])
def test_stages_refuse(options, error):
    with pytest.raises(ValueError, match=error):
        make_stages(**options)


def test_a_stage_counts_documents_bytes_and_reasons():
    """And keeps examples of each kind, of one kind not too many."""
    passed = Passed()
    for before, after in [("ä", "ä"), ("abc", "ab"), *((text, Dropped(f"short: {text}"))
                                                       for text in ("x", "yz", "w"))]:
        passed.count("here", before, after, show=9)
    assert (passed.documents, passed.bytes, passed.kept, passed.kept_bytes) == (5, 9, 2, 4)
    assert passed.reasons == {"changed": 1, "short": 3}
    assert passed.examples == [["here", "changed", "abc -> ab"], ["here", "short: x", "x"],
                               ["here", "short: yz", "yz"]]


def test_each_stage_drops_what_was_planted_and_keeps_the_rest():
    """Recall and precision are 1 here: pages of the manual, and one page of trouble for each."""
    trouble = {"size": "", "language": " ".join([GERMAN] * 8),
               "repetition": "You should buy this very good house now. " * 60,
               "quality": "This is a short page of words about the house.",
               "lines": " ".join(PROSE[:4]).replace(".", ",") + ",",
               "words": WORDS + "\nIt is one line of it. It was forbidden. It ends here."}
    funnel = Funnel(make_stages(unwanted=["forbidden"]))
    good = [" ".join(PROSE[i : i + 4]) + "\nIt is one line of it. It was one of two. It ends here."
            for i in range(0, 40, 4)]
    good = [page for page in good if broken(page, GOPHER | REPETITION) is None and "{" not in page]
    assert len(good) >= 5
    for page in good:
        assert isinstance(funnel("good", page), str)
    for stage, page in trouble.items():
        gone = {name: p.documents - p.kept for name, p in funnel.passed.items()}
        assert isinstance(funnel("bad", page), Dropped), stage
        now = {name: p.documents - p.kept for name, p in funnel.passed.items()}
        assert now == gone | {stage: gone[stage] + 1}, stage
