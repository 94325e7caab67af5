"""The metrics of texts: beside the programs that others score with, by hand, and by their laws."""

import itertools
import math
import string
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minilm import data
from minilm.data.tasks import SENTENCES
from minilm.measure.losses import loss_of
from minilm.measure.text import agreement, bleu, cider, meteor, nist, perplexity, rouge
from minilm.measure.text.bootstrap import interval
from minilm.measure.text.porter import stem
from minilm.measure.text.scores import SHARED, metrics, number, overlap, scores
from minilm.measure.text.tokens import checked, mean, punctuated, words
from minilm.transformer import Config, Transformer

WORDS = "the cat cats sat sitting on a mat".split()
text = st.lists(st.sampled_from(WORDS), max_size=9)
full = st.lists(st.sampled_from(WORDS), min_size=4, max_size=9)
example = st.tuples(text, st.lists(text, min_size=1, max_size=3))
corpora = st.lists(example, min_size=1, max_size=4)
METRICS = {
    "bleu": (bleu.bleu, 1), "nist": (nist.nist, math.inf), "meteor": (meteor.meteor, 1),
    "rouge-1": (lambda a, r: rouge.rouge_n(a, r, 1), 1),
    "rouge-2": (lambda a, r: rouge.rouge_n(a, r, 2), 1), "rouge-l": (rouge.rouge_l, 1),
    "coco": (rouge.coco_rouge_l, 1), "cider": (cider.cider, 10)}
each = pytest.mark.parametrize("metric, top", METRICS.values(), ids=METRICS)


def sides(corpus):
    """(answers, references)."""
    return [answer for answer, _ in corpus], [right for _, right in corpus]


def joined(texts):
    return [" ".join(tokens) for tokens in texts]


# Beside other programs


@pytest.mark.peers
@given(corpora)
def test_bleu_is_sacrebleus(corpus):
    sacrebleu = pytest.importorskip("sacrebleu")
    answers, references = sides(corpus)
    streams = [[" ".join(right[k]) if k < len(right) else None for right in references]
               for k in range(3)]
    theirs = sacrebleu.metrics.BLEU(tokenize="none", smooth_method="none", force=True)
    theirs = theirs.corpus_score(joined(answers), streams[: max(map(len, references))])
    assert 100 * bleu.bleu(answers, references) == pytest.approx(theirs.score, abs=1e-9)


LETTERS = st.text(string.printable + "äß–“", max_size=30)


@pytest.mark.peers
@given(st.lists(LETTERS, min_size=1, max_size=3))
def test_tokens_are_mtevals_and_rouge_scores(lines):
    tokenizer = pytest.importorskip("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    theirs = pytest.importorskip("rouge_score.tokenize").tokenize
    for line in lines:
        assert punctuated(line) == tokenizer(line).split()
        ascii = line.encode("ascii", "ignore").decode()
        assert words(ascii) == theirs(ascii, None)


@pytest.mark.peers
@given(st.lists(st.tuples(text, st.lists(full, min_size=1, max_size=1)), min_size=1, max_size=4))
def test_nist_is_nltks(corpus):
    """With one reference each; nltk divides by 0 if no answer has five tokens."""
    theirs = pytest.importorskip("nltk.translate.nist_score").corpus_nist
    answers, references = sides([(["a", "mat"] * 3, [["a", "mat"] * 3]), *corpus])
    assert nist.nist(answers, references) == pytest.approx(theirs(references, answers), abs=1e-12)


class NoSynonyms:
    """In the place of WordNet, which is a download."""

    @staticmethod
    def synsets(word):
        return []


@pytest.mark.peers
@given(st.permutations([*WORDS, "running", "runs", "happy", "happily", "relational"]),
       st.permutations([*WORDS, "run", "happiness", "relation", "relate"]), st.integers(0, 9),
       st.integers(1, 9))
def test_meteor_is_nltks_without_synonyms(h, r, size, other):
    """If no word and no stem is repeated, there is one alignment."""
    module = pytest.importorskip("nltk.translate.meteor_score")
    stemmer = pytest.importorskip("nltk.stem.porter").PorterStemmer("MARTIN_EXTENSIONS")
    h, r = ([*{stem(word): word for word in side}.values()][:most]
            for side, most in ((h, size), (r, other)))
    theirs = module.meteor_score([r, r[::-1]], h, stemmer=stemmer, wordnet=NoSynonyms)
    assert meteor.meteor([h], [[r, r[::-1]]]) == pytest.approx(theirs, abs=1e-12)


SUFFIXES = ("sses ies s eed ed ing at bl iz y ational tional izer alli bli logi ization iveness "
            "icate ative ness ement ment ent ion sion tion ive ize e ll").split()


@pytest.mark.peers
@given(st.lists(st.builds(str.__add__, st.text("aeioytlszbcmw", max_size=6),
                          st.sampled_from(["", *SUFFIXES])), min_size=1, max_size=20))
def test_stems_are_porters(drawn):
    theirs = pytest.importorskip("nltk.stem.porter").PorterStemmer("MARTIN_EXTENSIONS")
    assert [*map(stem, drawn)] == [*map(theirs.stem, drawn)]


@pytest.mark.peers
def test_stems_of_a_whole_text_are_porters():
    theirs = pytest.importorskip("nltk.stem.porter").PorterStemmer("MARTIN_EXTENSIONS")
    found = {word for document in data.load_corpus("python-reference").documents[:40]
             for word in words(document) if word.isascii()}
    assert len(found) > 2000
    assert {word: stem(word) for word in found} == {word: theirs.stem(word) for word in found}


@pytest.mark.peers
@given(corpora)
def test_rouge_is_rouge_scores(corpus):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(
        ["rouge1", "rouge2", "rougeL"])
    answers, references = sides(corpus)
    theirs = [scorer.score_multi(joined(right), " ".join(answer))
              for answer, right in zip(answers, references)]
    for name, ours in (("rouge1", rouge.rouge_n(answers, references, 1)),
                       ("rouge2", rouge.rouge_n(answers, references, 2)),
                       ("rougeL", rouge.rouge_l(answers, references))):
        assert ours == pytest.approx(np.mean([one[name].fmeasure for one in theirs]), abs=1e-12)


labels = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1,
                  max_size=30)
whole = st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=30)


@pytest.mark.peers
@given(labels)
def test_agreement_is_sklearns(pairs):
    theirs = pytest.importorskip("sklearn.metrics")
    answers, right = zip(*pairs)
    assume(len({*answers, *right}) > 1)  # or sklearn warns, and says 0
    assert agreement.accuracy(answers, right) == theirs.accuracy_score(right, answers)
    assert agreement.matthews(answers, right) == pytest.approx(
        theirs.matthews_corrcoef(right, answers), abs=1e-12)


@given(whole, st.sampled_from([1e-300, 1e-3, 1.0, 1e307]), st.sampled_from([0.0, 7.0, 1e6]))
def test_pearson_is_numpys(pairs, scale, shift):
    x, y = np.array(pairs, float).T
    found = agreement.pearson(x * scale, y + shift)
    if len({*x}) == 1 or len({*y}) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9 if shift > 9 else 1e-12)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30))
def test_matthews_of_two_classes_is_pearsons(pairs):
    x, y = zip(*pairs)
    r = agreement.pearson(x, y)
    assert agreement.matthews(x, y) == pytest.approx(0 if math.isnan(r) else r, abs=1e-12)


# What the programs of COCO and E2E print: pycocoevalcap at ad63453, e2e-metrics at 1b9c4d8

ANSWERS = [line.split() for line in (
    "dune serves cheap thai food in the harbour", "fig is a fair greek place in town town",
    "for soup go to the old mill")]
REFERENCES = [[line.split() for line in right] for right in (
    ["dune offers cheap thai food in the harbour", "for cheap thai food in the harbour go to dune"],
    ["fig is a fair greek restaurant in the old town"],
    ["for cheap soup go to the mill", "the mill serves cheap soup", "go to the old mill for soup"])]


def test_cider_is_cocos():
    found = cider.per_example(ANSWERS, REFERENCES)[:, 0]
    np.testing.assert_allclose(found, [6.51795915, 4.8043386, 4.69341494], atol=5e-9)
    assert cider.cider(ANSWERS, REFERENCES) == pytest.approx(5.3385708961709595, abs=1e-14)


def test_rouge_l_is_cocos():
    np.testing.assert_allclose(rouge.per_example_coco(ANSWERS, REFERENCES)[:, 0],
                               [0.875, 0.7299145299145299, 0.8571428571428571], rtol=1e-14)


def test_nist_and_bleu_are_e2es():
    assert nist.nist(ANSWERS, REFERENCES) == pytest.approx(4.502828264206566, abs=1e-14)
    assert bleu.bleu(ANSWERS, REFERENCES) == pytest.approx(0.6443979170262318, abs=1e-14)


# By hand


def test_cider_by_hand():
    """Two examples: a is in both, so only b and c tell, ln 2 each, and so do the bigrams."""
    references = [[["a", "b"]], [["a", "c"]]]
    assert cider.cider([["a", "b"], ["a", "c"]], references) == pytest.approx(10 * 2 / 4)
    # b b: the vector is (b: 2 ln 2), cut to ln 2, over 2 ln 2; the bigram bb is in no reference
    (found, _), _ = cider.per_example([["b", "b"], ["a"]], references)
    assert found == pytest.approx(10 * (1 / 2) / 4)
    # a b x x: unigrams b, x x: ln 2 (1, 2); bigrams ab, bx, xx; two tokens too long
    (found, _), _ = cider.per_example([["a", "b", "x", "x"], ["a"]], references)
    assert found == pytest.approx(10 * math.exp(-4 / 72) * (1 / 5**0.5 + 1 / 3**0.5) / 4)


def test_bleu_by_hand():
    """The paper's example: seven times "the" may match twice; and what is too short."""
    answer, right = ["the"] * 7, "the cat is on the mat".split()
    assert bleu.per_example([answer], [[right]])[0].tolist() == [2, 0, 0, 0, 7, 6, 5, 4, 7, 6]
    answers, references = [right[:5], right], [[right], [right]]
    assert bleu.bleu(answers, references) == pytest.approx(math.exp(1 - 12 / 11))
    assert bleu.bleu([right[:3]], [[right]]) == 0  # no 4-gram, and nothing is smoothed
    twice = [["a", "b"], ["a", "c"]]  # a is once in each, so it may match once
    assert bleu.per_example([["a", "a"]], [twice])[0, 0] == 1
    near = [["x"] * 3, ["x"] * 7, ["x"] * 20]  # 5 is as far from 3 as from 7: the shorter
    assert bleu.per_example([["x"] * 5], [near])[0, -1] == 3


def test_nist_by_hand():
    """Of 4 words a comes twice, so it has 1 bit, b and c have 2; after a, b has 1 bit."""
    references = [[["a", "b"]], [["a", "c"]]]
    info = nist.information(references)
    assert info == {("a",): 1, ("b",): 2, ("c",): 2, ("a", "b"): 1, ("a", "c"): 1}
    assert nist.nist([["a", "b"], ["a", "c"]], references) == (1 + 2 + 1 + 2) / 4 + (1 + 1) / 2
    pooled = [[right[0] for right in references]]  # a is once in each of two: 1 bit, once
    assert nist.per_example([["a", "a"]], pooled)[0, 0] == 1
    two_thirds = [["a", "b"]], [[["a", "b", "c"]]]
    info = nist.information(two_thirds[1])
    told = (info["a",] + info["b",]) / 2 + info["a", "b"]
    assert nist.nist(*two_thirds) == pytest.approx(told / 2)  # beta is made for this
    longer = [["a", "b", "x"]], [[["a", "b"]]]
    assert nist.nist(*longer) == pytest.approx((1 + 1) / 3)  # no factor, but more n-grams


def test_the_highest_nist_is_not_the_references():
    right = ["a"] * 6 + ["b"]
    assert nist.nist([right[1:]], [[right]]) > nist.nist([right], [[right]])


def test_meteor_by_hand():
    """Lavie & Agarwal's formula: P = 1, R = 2 / 6, one chunk of two."""
    h, r = "the cat".split(), "the cat sat on the mat".split()
    assert meteor.matched(h, r) == (2, 1)
    assert meteor.meteor([h], [[r]]) == pytest.approx(
        (1 / 3) / (0.9 + 0.1 / 3) * (1 - 0.5 * (1 / 2) ** 3))
    assert meteor.matched("cats on mats".split(), "on a cat mat".split()) == (3, 3)
    assert meteor.matched("a cat cats".split(), "a cats cat".split()) == (3, 3)  # equal words first
    assert meteor.matched("a b".split(), "b a".split()) == (2, 2)
    assert meteor.matching("ab", "aab") == [(0, 1), (1, 2)]  # not the first a, which is alone
    assert meteor.matching("aa", "aba") == [(0, 0), (1, 2)]  # each a has one of its own
    assert meteor.meteor([h], [[["dog"]]]) == 0 and meteor.meteor([[]], [[[]]]) == 0


def test_meteor_of_a_corpus_is_the_mean_with_the_best_references():
    answers, references = [["a"], ["b", "c"]], [[["a", "d", "e"]], [["d"], ["b", "c"]]]
    assert meteor.meteor(answers, references) == pytest.approx(
        (meteor.score(1, 1, 1, 3) + meteor.score(2, 1, 2, 2)) / 2)


def test_perplexity_by_hand_and_of_a_model_that_knows_nothing():
    model, tokenizer = Transformer(Config.gpt2(258, 32, 1, 2, 8), seed=0), data.ByteTokenizer()
    model.head.weight.data[:] = 0
    records = [data.Record("Say", "", "abc"), data.Record("Say", "x", "a" * 9, ("b",))]
    assert perplexity.perplexity(model, records, tokenizer) == pytest.approx(258, rel=1e-5)
    rows = perplexity.per_example(model, records, tokenizer)
    assert rows[:, 1].tolist() == [4, 10]  # and the end
    assert perplexity.of_sums(np.array([math.log(8) * 3, 3])) == pytest.approx(8)
    assert perplexity.of_sums(np.array([1e9, 1])) == math.inf


def test_perplexity_is_exp_of_the_loss():
    model, tokenizer = Transformer(Config.gpt2(258, 64, 1, 2, 8), seed=0), data.ByteTokenizer()
    rng = np.random.default_rng(0)
    for _, tensor in model.named_tensors():
        tensor.data += rng.normal(0, 0.3, tensor.shape).astype(np.float32)
    records = [data.Record("Say", "", "ab" * int(n)) for n in rng.integers(1, 25, 40)]
    rows = perplexity.per_example(model, records, tokenizer, batch=7)
    loss = loss_of(model, *data.encode(records, tokenizer))
    assert perplexity.of_sums(rows.sum(0)) == pytest.approx(math.exp(loss), rel=1e-5)
    for i in (0, 17):
        alone = loss_of(model, *data.encode([records[i]], tokenizer))
        assert rows[i, 0] / rows[i, 1] == pytest.approx(alone, rel=1e-5)


# Laws


@given(labels, st.permutations("abc"), st.randoms())
def test_agreement_lies_in_its_range_and_knows_no_names_and_no_order(pairs, names, random):
    for metric, low in ((agreement.accuracy, 0), (agreement.matthews, -1)):
        answers, right = zip(*pairs)
        found = metric(answers, right)
        assert low <= found <= 1 and metric(right, right) in (1, 0 if low else 1)
        called = dict(zip("abc", names))
        mixed = [(called[a], called[r]) for a, r in pairs]
        random.shuffle(mixed)
        assert metric(*zip(*mixed)) == pytest.approx(found, abs=1e-12)


@given(st.lists(st.integers(-99, 99), min_size=2, unique=True), st.floats(0.1, 9),
       st.floats(-9, 9))
def test_pearson_is_1_of_any_rising_line(x, slope, shift):
    assert agreement.pearson(x, [slope * v + shift for v in x]) == pytest.approx(1, abs=1e-9)
    assert agreement.pearson(x, [-slope * v + shift for v in x]) == pytest.approx(-1, abs=1e-9)


@each
@given(corpora)
def test_a_score_lies_between_0_and_its_top(metric, top, corpus):
    assert 0 <= metric(*sides(corpus)) <= top + 1e-12


@each
@given(corpora, st.randoms())
def test_the_order_of_records_and_of_references_does_not_matter(metric, top, corpus, random):
    mixed = [(answer, random.sample(right, len(right))) for answer, right in corpus]
    random.shuffle(mixed)
    assert metric(*sides(mixed)) == pytest.approx(metric(*sides(corpus)), abs=1e-12)


@each
@given(corpora)
def test_names_of_words_do_not_matter_but_for_stems(metric, top, corpus):
    def renamed(name):
        return sides([([name(w) for w in a], [[name(w) for w in t] for t in r]) for a, r in corpus])
    capitals = renamed(str.upper)  # which have no stems
    assert metric(*renamed(lambda w: str(WORDS.index(w)))) == pytest.approx(
        metric(*capitals), abs=1e-12)


@given(st.lists(st.lists(full, min_size=1, max_size=3), min_size=1, max_size=4))
def test_who_repeats_a_reference_has_the_top(references):
    answers = [right[0] for right in references]
    for name in ("bleu", "rouge-1", "rouge-2", "rouge-l", "coco"):
        metric, top = METRICS[name]
        assert metric(answers, references) == pytest.approx(top), name
    best = [1 - 0.5 / len(answer) ** 3 for answer in answers]
    assert meteor.meteor(answers, references) == pytest.approx(np.mean(best))


@given(st.permutations([chr(c) for c in range(ord("a"), ord("a") + 16)]))
def test_cider_has_its_top_if_all_that_is_said_is_peculiar(names):
    """One reference each, and no word in two of them."""
    answers = [names[i : i + 4] for i in range(0, 16, 4)]
    assert cider.cider(answers, [[answer] for answer in answers]) == pytest.approx(10)
    assert cider.cider(answers[:1], [[answers[0]]]) == 0  # one example: nothing is peculiar
    assert cider.cider(answers, [answers] * 4) == 0  # and if all have the same references


@given(example, text)
def test_more_references_are_no_harm(one, more):
    """To BLEU's matches, METEOR and ROUGE. To CIDEr and to lengths they are."""
    answer, right = one
    with_more = [answer], [[*right, more]]
    N = bleu.N
    assert (bleu.per_example(*with_more)[0, :N] >= bleu.per_example([answer], [right])[0, :N]).all()
    for name in ("meteor", "rouge-1", "rouge-2", "rouge-l", "coco"):
        metric, _ = METRICS[name]
        assert metric(*with_more) >= metric([answer], [right]) - 1e-15, name


@given(example)
def test_who_shares_no_word_has_0(one):
    _, right = one
    for name, (metric, _) in METRICS.items():
        assert metric([["dog", "dog", "eats", "fish", "dog"]], [right]) == 0, name


def test_bleu_of_a_corpus_is_not_the_mean():
    answers = ["a b c d e".split(), "a b c x y".split()]
    references = [["a b c d e".split()], ["a b c d e".split()]]
    alone = [bleu.bleu([a], [r]) for a, r in zip(answers, references)]
    assert alone == [1, 0] and 0.5 < bleu.bleu(answers, references) < 0.8


@pytest.mark.parametrize("module", [bleu, nist, meteor, cider])
@given(corpora)
def test_each_example_adds_its_row(module, corpus):
    """Of sums of the rows of a part, no others are needed, but what weighs n-grams."""
    rows = module.per_example(*sides(corpus))
    assert rows.shape[0] == len(corpus)
    twice = module.per_example(*sides(corpus * 2))
    if module is not cider:  # where an n-gram of each second example is less rare than before
        np.testing.assert_allclose(module.of_sums(twice.sum(0)), module.of_sums(rows.sum(0)),
                                   atol=1e-12)
    np.testing.assert_allclose(module.of_sums(2 * rows.sum(0)), module.of_sums(rows.sum(0)),
                               atol=1e-12)


def crossings(pairs):
    return sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in itertools.combinations(pairs, 2))


def chunks(pairs):
    return sum((i - 1, j - 1) not in pairs for i, j in pairs)


def every_matching(h, r):
    """All largest matchings of equal words, by trying everything."""
    if not h:
        return [()]
    rest = [[(i + 1, j) for i, j in pairs] for pairs in every_matching(h[1:], r)]
    found = [tuple(pairs) for pairs in rest]
    for j, word in enumerate(r):
        found += [((0, j), *pairs) for pairs in rest
                  if word == h[0] and j not in {k for _, k in pairs}]
    return found


@given(st.lists(st.sampled_from("abc"), max_size=5), st.lists(st.sampled_from("abc"), max_size=5))
def test_the_matching_is_the_best_of_all(h, r):
    found = meteor.matching(h, r)
    everything = every_matching(h, r)
    most = max(map(len, everything))
    assert most == len(found) == (Counter(h) & Counter(r)).total()
    assert (crossings(found), chunks(found)) == min(
        (crossings(pairs), chunks(pairs)) for pairs in everything if len(pairs) == most)
    assert all(h[i] == r[j] for i, j in found) and found == sorted(found)
    assert len({j for _, j in found}) == most


@given(text, text)
def test_the_subsequence_is_the_longest(a, b):
    def parts(tokens):
        return {tuple(itertools.compress(tokens, keep))
                for keep in itertools.product((0, 1), repeat=len(tokens))}
    assert rouge.subsequence(a, b) == max(map(len, parts(a[:7]) & parts(b[:7]))) or (
        len(a) > 7 or len(b) > 7)
    assert rouge.subsequence(a, b) == rouge.subsequence(b, a) == rouge.subsequence(
        a[::-1], b[::-1])


# Intervals


def test_the_interval_is_the_one_of_theory():
    """Of a mean of 400 hits: the normal one, to the noise of a thousand draws."""
    rows = np.array([(1, 1)] * 240 + [(0, 1)] * 160)
    low, high = interval(rows, mean, seed=1)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 400)
    assert low == pytest.approx(0.6 - half, abs=0.006)
    assert high == pytest.approx(0.6 + half, abs=0.006)


def test_the_interval_covers():
    """In about 95 of 100 samples the truth lies inside."""
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        values = rng.exponential(size=60)
        low, high = interval(np.stack([values, np.ones(60)], 1), mean, seed, draws=200)
        inside += low <= 1 <= high
    assert 178 <= inside <= 197


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=9), st.integers(0, 99))
def test_an_interval_repeats_with_its_seed_and_stays_in_range(values, seed):
    rows = np.array([(value, 1) for value in values], float)
    low, high = found = interval(rows, mean, seed, draws=50)
    assert found == interval(rows, mean, seed, draws=50)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_draws_without_a_score_do_not_count():
    rows = agreement.moments([1, 2, 3], [1, 2, 4])
    low, high = interval(rows, agreement.pearson_of_sums)
    assert 0.9 < low <= high <= 1
    assert np.isnan(interval(agreement.moments([1, 1], [1, 2]), agreement.pearson_of_sums)).all()
    with pytest.raises(ValueError, match="no example to draw"):
        interval(np.zeros((0, 2)), mean)
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        interval(rows, mean, draws=0)


# What fits, and what is refused

ROW = {"name": "Dune", "food": "Thai", "price": "cheap", "area": "harbour"}
SAID = [sentence.format(**ROW) for sentence in SENTENCES]


def test_all_metrics_of_sentences():
    answers, references = [SAID[0], SAID[1]], [SAID[:2], ["Fig is a fair Greek restaurant."]]
    found, why = scores(answers, references, draws=20)
    assert not why and [*found] == ["exact match, %", *SHARED]
    assert found["exact match, %"].value == 50
    assert found["BLEU, %"].value == pytest.approx(100 * bleu.bleu(
        [*map(punctuated, answers)], [[*map(punctuated, right)] for right in references]))
    values = overlap(answers, references)
    for name, (value, low, high) in found.items():
        assert low <= value <= high, name
        assert name not in values or values[name] == value


@pytest.mark.parametrize("answers, right, fit, why", [
    (["yes", "no", "no", "so"], ["yes", "no", "yes", "no"], ["Matthews"], {}),
    (["yes", "no", "no"], ["yes", "no", "yes"], [], {}),  # a class that comes once
    (["1", "2.5", "4"], ["1", "2", "3"], ["Pearson"], {}),
    (["1", "x", "4"], ["1", "2", "3"], [], {"Pearson": "1 of 3 answers are no numbers"}),
    (["1", "1", "1"], ["1", "2", "3"], [], {"Pearson": "all answers are the same"}),
    (["1", "2", "4"], ["3", "3", "3"], [], {"Pearson": "all that is right is"}),
    (["1", "2", "2"], ["3", "3", "3"], [], {"Pearson": "all that is right is"}),
])
def test_what_fits_short_answers(answers, right, fit, why):
    found, left_out = metrics(answers, [[one] for one in right])
    assert [*found] == ["exact match, %", *fit]
    assert left_out == {"BLEU, ..., CIDEr-D": "no reference has four tokens"} | why
    assert [*metrics(answers, [[one, "x"] for one in right])[0]] == ["exact match, %"]


def test_where_what_fits_ends():
    """BLEU needs four tokens of one reference; twenty names are classes, one more is none."""
    assert "BLEU, %" in metrics(["a"], [["a b c d"]])[0]
    assert "BLEU, %" not in metrics(["a"], [["a b c"]])[0]
    for classes in (20, 21):
        names = [f"c{i}" for i in range(classes)] * 2
        assert ("Matthews" in metrics(names, [[name] for name in names])[0]) == (classes == 20)


def test_the_correlation_of_a_part_needs_no_other_rows():
    x, y = np.array([1.0, 2, 4, 9, 3]), np.array([3.0, 1, 4, 9, 2])
    sums = agreement.moments(x, y)[[0, 1, 1, 3]].sum(0)
    assert agreement.pearson_of_sums(sums) == pytest.approx(
        np.corrcoef(x[[0, 1, 1, 3]], y[[0, 1, 1, 3]])[0, 1])


def test_an_unknown_answer_is_a_class_of_its_own():
    found, _ = scores(["yes", "no", "no", "so"], [["yes"], ["no"], ["yes"], ["no"]], draws=9)
    assert found["Matthews"].value == agreement.matthews([1, 0, 0, 2], [1, 0, 1, 0])


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_read_as_it_is_written(x):
    assert number(repr(x)) == x
    assert number("nan") is number("inf") is number("") is number("1 2") is None


@each
@pytest.mark.parametrize("answers, references, error, said", [
    ([], [], ValueError, "no answer to judge"),
    ([["a"]], [], ValueError, "1 answers, but references for 0"),
    ([["a"], ["b"]], [[["a"]], []], ValueError, r"example 1 has no reference: \['b'\]"),
    (["a b"], [[["a"]]], TypeError, "example 0: expected an answer of tokens .* got 'a b'"),
    ([["a"]], [["a b"]], TypeError, "example 0: expected"),
    ([["a"]], ["ab"], TypeError, "example 0: expected"),
])
def test_what_cannot_be_judged_is_refused(metric, top, answers, references, error, said):
    with pytest.raises(error, match=said):
        metric(answers, references)


def test_what_cannot_agree_is_refused():
    for call in (agreement.accuracy, agreement.matthews, agreement.pearson):
        with pytest.raises(ValueError, match="no answer to judge"):
            call([], [])
        with pytest.raises(ValueError, match="2 answers, but 1 that are right"):
            call([1, 2], [1])
    with pytest.raises(ValueError, match="numbers must be finite"):
        agreement.pearson([1, math.nan], [1, 2])
    assert checked([["a"]], [[["a"]]]) == [(["a"], [["a"]])]
