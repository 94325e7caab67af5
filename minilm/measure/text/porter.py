"""Stems of English words: Porter 1980, An algorithm for suffix stripping, as its author runs it.

A word is consonants c and vowels v; y is a vowel after a consonant. The measure m of a stem is how
often a vowel is followed by a consonant, the paper's [C](VC)^m[V]. Each step replaces the longest
suffix that it knows, if what is before it fulfils the step's condition.

Porter's own programs depart from his paper in three points (tartarus.org/martin/PorterStemmer), and
so does this one: words of one or two letters stay, "bli" becomes "ble", and "logi" becomes "log".
It is nltk's PorterStemmer(MARTIN_EXTENSIONS). nltk's default has further rules and exceptions.
"""

STEP_2 = dict(pair.split() for pair in (
    "ational ate", "tional tion", "enci ence", "anci ance", "izer ize", "bli ble", "alli al",
    "entli ent", "eli e", "ousli ous", "ization ize", "ation ate", "ator ate", "alism al",
    "iveness ive", "fulness ful", "ousness ous", "aliti al", "iviti ive", "biliti ble",
    "logi log"))
STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "",
          "ness": ""}
STEP_4 = dict.fromkeys("al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive "
                       "ize".split(), "")


def stem(word: str) -> str:
    """The stem of a word in lower case.

    >>> [stem(word) for word in "relational hopping happy skies generalizations".split()]
    ['relat', 'hop', 'happi', 'ski', 'gener']
    """
    if len(word) <= 2:
        return word
    word = replaced(word, {"sses": "ss", "ies": "i", "ss": "ss", "s": ""}, lambda _: True)  # 1a
    word = _past(word)  # 1b
    word = replaced(word, {"y": "i"}, has_vowel)  # 1c
    word = replaced(word, STEP_2, lambda stem: m(stem) > 0)
    word = replaced(word, STEP_3, lambda stem: m(stem) > 0)
    word = replaced(word, STEP_4, lambda stem: m(stem) > 1 and (
        stem.endswith(("s", "t")) or not word.endswith("ion")))
    word = replaced(word, {"e": ""},  # 5a
                    lambda stem: m(stem) > 1 or (m(stem) == 1 and not ends_cvc(stem)))
    return word[:-1] if word.endswith("ll") and m(word[:-1]) > 1 else word  # 5b


def letters(stem: str) -> str:
    """c or v for each letter.

    >>> letters("syzygy")
    'cvcvcv'
    """
    kinds = ""
    for letter in stem:
        kinds += "v" if letter in "aeiou" or (letter == "y" and kinds.endswith("c")) else "c"
    return kinds


def m(stem: str) -> int:
    """The measure.

    >>> [m(stem) for stem in ("tree", "trouble", "troubles")]
    [0, 1, 2]
    """
    return letters(stem).count("vc")


def has_vowel(stem: str) -> bool:
    """The paper's *v*."""
    return "v" in letters(stem)


def ends_cvc(stem: str) -> bool:
    """The paper's *o: the last three are consonant, vowel, consonant, and no w, x or y."""
    return letters(stem).endswith("cvc") and stem[-1] not in "wxy"


def replaced(word: str, rules: dict[str, str], holds) -> str:
    """The word with its longest suffix among the rules replaced, if holds(what is before it)."""
    for size in range(len(word), 0, -1):
        if (suffix := word[-size:]) in rules:
            return word[:-size] + rules[suffix] if holds(word[:-size]) else word
    return word


def _past(word: str) -> str:
    """Step 1b: eed, ed and ing, and what makes a word again of what is left."""
    if word.endswith("eed"):
        return word[:-1] if m(word[:-3]) > 0 else word
    without = replaced(word, {"ed": "", "ing": ""}, has_vowel)
    if without == word:
        return word
    if without.endswith(("at", "bl", "iz")):
        return without + "e"
    if letters(without).endswith("cc") and without[-1] == without[-2]:
        return without if without[-1] in "lsz" else without[:-1]
    return without + "e" if m(without) == 1 and ends_cvc(without) else without
