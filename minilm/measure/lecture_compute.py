"""The lectures' arithmetic of computing: operations, GPU hours, and how large a model should be.

`python scripts/plan_memory.py --lectures` prints it, with the slide's numbers beside it. Each table
is rows of text; `why` says what the difference is. SLIDE_... hold what the slides say.
"""

from minilm.measure.scaling import BESIROGLU, HOFFMANN, ROUNDED, operations, per_second, power

A100 = 312e12  # operations a second in 16 bits, by its data sheet
REACHED = 0.6  # of that, more than what published training runs have reached
GOPHER = 5.76e23  # the operations of Gopher, lecture 004's unit

# name, N, D, GPU hours: lecture 004, "Pre-training: Examples"
SLIDE_HOURS = (("StarCoder", 15.5e9, 1e12, 86_016), ("Llama-2 70B", 70e9, 2e12, 1_720_320))
# name, N, tokens that are best, tokens that it has seen: lecture 004, "Chinchilla"
SLIDE_MODELS = (
    ("Chinchilla", 70e9, 1.4e12, 1.4e12), ("LLaMA-65B", 65e9, 1.3e12, 1.4e12),
    ("GPT-3", 175e9, 3.5e12, 300e9), ("OPT-175B", 175e9, 3.5e12, 180e9),
    ("BLOOM", 176e9, 3.5e12, 350e9))
# N, operations, these in Gophers, tokens: lecture 004, "Table 3"
SLIDE_SIZES = (
    (400e6, 1.92e19, 1 / 29_968, 8.0e9), (1e9, 1.21e20, 1 / 4_761, 20.2e9),
    (10e9, 1.23e22, 1 / 46, 205.1e9), (67e9, 5.76e23, 1, 1.5e12), (175e9, 3.85e24, 6.7, 3.7e12),
    (280e9, 9.90e24, 17.2, 5.9e12), (520e9, 3.43e25, 59.5, 11.0e12),
    (1e12, 1.27e26, 221.3, 21.2e12), (10e12, 1.30e28, 22_515.9, 216.2e12))
# of papers: year, name, N, D. BERT: 10^6 steps of 128,000 tokens
HISTORY = ((2018, "BERT large", 340e6, 128e9), (2020, "GPT-3", 175e9, 300e9),
           (2021, "Gopher", 280e9, 300e9), (2022, "Chinchilla", 70e9, 1.4e12),
           (2023, "Llama-2 70B", 70e9, 2e12))
USED = 0.35  # of what cards can, assumed
GPT4_CARDS, GPT4_DAYS, GPT4_DOLLARS = 25_000, (90, 100), 100e6  # lecture 001, "Fun Fact"


def large(n: float, digits: int = 4) -> str:
    """A number of parameters or tokens, a million or more.

    >>> large(400e6), large(70e9), large(1.4e12)
    ('400M', '70B', '1.4T')
    """
    letter, unit = next(pair for pair in (("T", 1e12), ("B", 1e9), ("M", 1e6)) if n >= pair[1])
    return f"{n / unit:.{digits}g}{letter}"


def hours() -> list[list[str]]:
    """What each card did in a second, if the GPU hours of the slide are right."""
    rows = [["GPU hours", "N", "D", "6 N D", "slide", "TFLOP/s a card", "of an A100's", "why"]]
    for name, N, D, spent in SLIDE_HOURS:
        rate = per_second(N, D, spent)
        why = "" if rate < REACHED * A100 else (
            f"not credible: at {usual():.0%}, as Llama-2, it takes "
            f"{operations(N, D) / (usual() * A100) / 3600:,.0f} hours")
        rows.append([name, large(N), large(D), f"{operations(N, D):.2e}", f"{spent:,}",
                     f"{rate / 1e12:.0f}", f"{rate / A100:.0%}", why])
    return rows


def usual() -> float:
    """The share of an A100's operations that Llama-2 70B reached."""
    _, N, D, spent = SLIDE_HOURS[-1]
    return per_second(N, D, spent) / A100


def gpt4() -> list[list[str]]:
    """GPT-4's cost as the slide has it: dollars an hour, and operations if the cards reach USED of
    what they can."""
    spent = [GPT4_CARDS * days * 24 for days in GPT4_DAYS]
    return [["GPT-4", "GPU hours", "$ an hour", f"operations at {USED:.0%}", "slide"],
            *[[f"{days} days", f"{h / 1e6:.0f}M", f"{GPT4_DOLLARS / h:.2f}",
               f"{h * 3600 * USED * A100:.1e}", "25,000 A100, $100 million"]
              for days, h in zip(GPT4_DAYS, spent)]]


def growth() -> list[list[str]]:
    """How many operations models took, year by year; the slide: "100x in a few years"."""
    rows = [["year", "model", "N", "D", "6 N D", "times BERT", "times GPT-3", "slide", "why"]]
    bert, gpt3 = (operations(N, D) for _, _, N, D in HISTORY[:2])
    spent = [(str(year), name, large(N), large(D), operations(N, D))
             for year, name, N, D in HISTORY]
    last = sum(GPT4_DAYS) / len(GPT4_DAYS) * 24 * 3600 * GPT4_CARDS * USED * A100
    for *cells, C in [*spent, ("2023", "GPT-4, as above", "", "", last)]:
        rows.append([*cells, f"{C:.1e}", f"{C / bert:,.0f}", f"{C / gpt3:.3g}", "", ""])
    rows[2][-2:] = "100 x", f"in a few years: {gpt3 / bert:,.0f} x in two"
    rows[-1][-2:] = "100 x", f"{last / gpt3:.0f} x in three"
    return rows


def chinchilla() -> list[list[str]]:
    """20 tokens a parameter against the tokens that models saw, and what the same operations could
    have made by the law: N that is best, and how much lower the loss is."""
    rows = [["20 x", "N", "20 N", "slide", "D", "D / N", "best N", "its D", "loss lower by", "so"]]
    for name, N, told, D in SLIDE_MODELS:
        best, tokens = BESIROGLU.optimum(operations(N, D))
        gain = BESIROGLU.loss(N, D) - BESIROGLU.loss(best, tokens)
        so = "" if 0.5 < N / best < 2 else f"{N / best:.1f} x over-parametrised, as under-trained"
        rows.append([name, large(N), large(20 * N), large(told), large(D), f"{D / N:.1f}",
                     large(best, 3), large(tokens, 3), f"{gain:.3f}", so])
    return rows


def constants() -> list[list[str]]:
    """The best model at Gopher's operations by each set of published constants; the slide: 20."""
    rows = [["L = E + A/N^alpha + ..", "alpha", "beta", "a", "best N", "D", "D / N", "slide"]]
    for name, law in (("Hoffmann, as printed", ROUNDED), ("Hoffmann, unrounded", HOFFMANN),
                      ("Besiroglu's refit", BESIROGLU)):
        N, D = law.optimum(GOPHER)
        rows.append([name, f"{law.alpha:g}", f"{law.beta:g}", f"{law.a:.2f}", large(N, 3),
                     large(D, 3),
                     f"{D / N:.0f}", "20"])
    return rows


def sizes() -> list[list[str]]:
    """Operations and tokens that are best for a size, by approach 1: the slide's table, recomputed
    from its N and D."""
    rows = [["best for N", "D, slide", "6 N D", "slide", "off", "in Gophers", "slide", "why"]]
    for N, C, unit, D in SLIDE_SIZES:
        off = operations(N, D) / C - 1
        why = "" if abs(off) < 0.015 else f"D is rounded: {C:.2e} / 6 N are {large(C / 6 / N)}"
        if abs(C / GOPHER / unit - 1) > 0.01:
            why = f"1/{GOPHER / C:.1f}, rounded down"
        rows.append([large(N), large(D), f"{operations(N, D):.2e}", f"{C:.2e}", f"{off:+.1%}",
                     gophers(C / GOPHER), gophers(unit), why])
    N, C, _, D = map(list, zip(*SLIDE_SIZES))
    rows.append(["N ~ C^a, D ~ C^b", f"b = {power(C, D).a:.3f}", f"a = {power(C, N).a:.3f}",
                 *[""] * 5])
    return rows


def gophers(x: float) -> str:
    """Operations as a multiple of Gopher's, or as one part of so many."""
    return f"{x:,.1f}" if x >= 1 else f"1/{1 / x:,.0f}"
