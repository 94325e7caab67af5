"""Which language a text is in, by the library py3langid (Lui & Baldwin 2012, langid.py).

CCNet (Wenzek et al. 2020, arXiv:1911.00359, section 3) keeps a text if its language has a
probability of 0.5 or more. A few words are too few to tell.
"""

from functools import cache

from minilm.extras import install

LEAST = 20  # letters
READ = 2000  # characters of a text that are looked at


def language(text: str) -> tuple[str, float]:
    """(the likeliest language's code, as en or de; its probability). ("", 0.0) for too few letters.
    """
    head = text[:READ]
    if sum(map(str.isalpha, head)) < LEAST:
        return "", 0.0
    code, p = identifier().classify(head)
    return code, float(p)


def check_language(code: str):
    """ValueError if no text can be found to be in it."""
    if code not in (known := identifier().labels):
        raise ValueError(f"language {code!r} is not one of {', '.join(sorted(known))}")


@cache
def identifier():
    """The library's model. ImportError, with what to install, if it is missing."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ImportError("the stage language, which can be left out, needs the py3langid "
                          f"library: {install('clean')}") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
