"""Planted trouble, and the two experiments about what text a model learns from."""

from collections import Counter

import cleaner_text
import numpy as np
import pytest
import simple_text
from hypothesis import given
from hypothesis import strategies as st

from minilm import data
from minilm.data.cleaning.duplicates import NEAR as LEAST
from minilm.data.cleaning.duplicates import jaccard, shingles
from minilm.data.cleaning.planted import (
    COPY,
    FOREIGN,
    GOOD,
    NEAR,
    NOISE,
    SITE,
    Page,
    changed,
    planted,
)
from minilm.data.stories import make_stories

WORDS = sorted({word for text in make_stories(30_000, 0) for word in text.split()})


def document(i, words=150):
    """Words in an order of its own, two lines."""
    drawn = np.random.default_rng([i, 7]).choice(WORDS, words)
    return " ".join(drawn[: words // 2]) + "\n" + " ".join(drawn[words // 2 :])


DOCUMENTS = [document(i) for i in range(24)]


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.2, 0.3]), st.sampled_from([0.0, 0.1, 0.3]),
       st.sampled_from([(2,), (3, 5), (8,)]))
def test_it_is_known_what_was_planted(seed, copies, trouble, times):
    pages = planted(DOCUMENTS, np.random.default_rng(seed), copies, trouble, times)
    kinds, letters = Counter(page.kind for page in pages), Counter()
    for page in pages:
        letters[page.kind] += len(page.text)
    assert sorted(page.text for page in pages if page.kind == GOOD) == sorted(DOCUMENTS)
    size = sum(map(len, DOCUMENTS)) / (1 - copies - trouble)
    longest = max(map(len, DOCUMENTS)) * 1.1
    most = copies * size + longest * sum(count - 1 for count in times)
    assert copies * size * 0.97 <= letters[COPY] + letters[NEAR] <= most * 1.03
    for kind in (SITE, FOREIGN, NOISE):
        assert trouble * size / 3 <= letters[kind] <= trouble * size / 3 + 2 * longest
    stands = Counter(page.source for page in pages if page.source >= 0)
    assert set(stands) == set(range(24)) and {*stands.values()} <= {1, *times}
    for page in pages:
        assert page.source >= 0 or page.kind in (SITE, FOREIGN, NOISE)
        if page.kind in (GOOD, COPY):
            assert page.text == DOCUMENTS[page.source]
        if page.kind == NEAR:
            assert LEAST <= jaccard(shingles(page.text), shingles(DOCUMENTS[page.source]))
    assert kinds[NEAR] in range(kinds[COPY] - 24, kinds[COPY] + 1)
    assert planted(DOCUMENTS, np.random.default_rng(seed), copies, trouble, times) == pages


@given(st.integers(0, 2**32), st.integers(1, 500))
def test_a_near_copy_has_some_other_words_and_the_same_lines(seed, words):
    text = document(1, words)
    other = changed(text, ["+new+"], np.random.default_rng(seed))
    pairs = list(zip(text.split("\n"), other.split("\n"), strict=True))
    differ = [b for x, y in pairs for a, b in zip(x.split(" "), y.split(" "), strict=True)
              if a != b]
    assert {*differ} == {"+new+"} and len(differ) <= max(1, round(0.005 * (words + 1)))


@pytest.mark.parametrize("settings, complaint", [
    ({"copies": 0.6, "trouble": 0.4}, "leave room for documents, got 0.6 and 0.4"),
    ({"copies": -0.1}, "leave room"), ({"times": ()}, "twice or more, got times="),
    ({"times": (1, 4)}, "twice or more"), ({"times": (2,)}, "24 documents are too few"),
])
def test_what_cannot_be_planted(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        planted(DOCUMENTS, np.random.default_rng(0), **{"copies": 0.6, "times": (2,)} | settings)
    with pytest.raises(ValueError, match="beside 0 documents"):
        planted([], np.random.default_rng(0))


@pytest.fixture(scope="module")
def heaps():
    return cleaner_text.heaps(0, True)


def test_the_stages_find_the_trouble_and_the_copies(heaps):
    held, of = heaps
    kinds = {name: Counter(page.kind for page in pages) for name, pages in of.items()}
    assert kinds["raw"][GOOD] == 20 and min(kinds["raw"][k] for k in (SITE, FOREIGN, NOISE)) > 3
    assert not {SITE, FOREIGN, NOISE} & {*kinds["filtered"]} and kinds["filtered"][GOOD] > 12
    for name in ("deduplicated", "both"):
        sources = Counter(page.source for page in of[name] if page.source >= 0)
        assert {*sources.values()} == {1}
        whole = {page.source for page in of["raw" if name == "deduplicated" else "filtered"]}
        assert {*sources} == whole - {-1}
    assert len(held) == 2 and not {*held} & {page.text for page in of["raw"]}


def test_passages_are_of_documents_that_stand_so_often():
    text = "".join(map(chr, range(32, 127))) * 4  # 380 bytes: three passages of 96
    pages = [Page(text, GOOD, 0), Page("b" * 200, GOOD, 1), Page(text, COPY, 0),
             Page("c", NOISE, -1)]
    twice, once = cleaner_text.passages(pages, 2), cleaner_text.passages(pages, 1)
    assert bytes(twice.astype(np.uint8)) == text.encode()[: 3 * 96]
    assert once.shape == (2, 96) and (once == ord("b")).all()
    assert len(cleaner_text.passages(pages, 2, most=2)) == 2


def test_a_passage_is_memorised_if_every_byte_of_its_rest_is_right(monkeypatch):
    rows = np.random.default_rng(0).integers(0, 256, (8, 96)).astype(np.int32)

    def generate(model, tokens, count, temperature, eos):
        assert (tokens == rows[:, :64]).all() and (count, temperature, eos) == (32, 0, ())
        said = rows.copy()
        said[:5, 95] ^= 1  # the last byte of five is wrong
        return said

    monkeypatch.setattr(cleaner_text, "generate", generate)
    assert cleaner_text.memorised(None, rows) == 37.5


def test_the_larger_models_gain():
    bits = {"raw": 3.0, "deduplicated": 2.5, "raw, large model": 2.8,
            "deduplicated, large model": 2.0}
    rows = [{"arm": arm, "seed": 0, cleaner_text.TEXT: x} for arm, x in bits.items()]
    assert cleaner_text.gains(rows) == pytest.approx([0.3])


def test_what_a_model_has_written_is_judged():
    tale = "Once upon a time there was a girl named Lily. She had a friend named Tom."
    texts = [f"{tale} Tom ran.", f"{tale} Tom run. Tom slept.", "Tom flurbed. He ra"]
    found = simple_text.judged(texts, [f"{tale} Tom slept."], ["Tom ran. Run!"])
    assert found[simple_text.RIGHT] == pytest.approx(100 * 6 / 8)
    assert found[simple_text.WHOLE] == pytest.approx(100 / 3)
    assert found[simple_text.NEW] == 50  # of the two that begin no story only "Tom ran."
    words = 18 + 20 + 4
    assert found[simple_text.WORDS] == pytest.approx(100 * (words - 3) / words)  # flurbed he? ra
    assert set(simple_text.judged([""], ["a"], ["b"]).values()) == {0.0}


def test_texts_end_where_the_model_ends_them(monkeypatch):
    tokenizer = data.ByteTokenizer()
    rows = [[tokenizer.end, *b"ab", tokenizer.end, 7], [tokenizer.end, *b"abcd"]]
    monkeypatch.setattr(simple_text, "generate", lambda *given, **settings: np.array(rows))
    assert simple_text.written(None, tokenizer, 2, 4, 0) == ["ab", "abcd"]
