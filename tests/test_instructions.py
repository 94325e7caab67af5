"""Checks instruction data: records and their files, rows and batches, the made-up tasks, scores.

Laws are drawn with hypothesis: rows decode to the records, an epoch has each record once, train and
test share no prompt. Files are mutated and may raise FormatError only.
"""

import os
import re
import sqlite3
import string
from collections import Counter
from itertools import chain, combinations, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.data import (
    IGNORED,
    TASKS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    InstructionBatches,
    Record,
    Words,
    encode,
    load_records,
    make_tasks,
    prompt,
    save_records,
    score,
    split_records,
)
from minilm.data.tasks import CITIES
from minilm.files import FormatError

BYTES = ByteTokenizer()
words = st.text(min_size=1, max_size=12)
records = st.builds(
    Record, words, st.text(max_size=12), words, st.lists(words, max_size=2).map(tuple), st.text()
)
seeds = st.integers(0, 2**63)


# Records and their files


def test_the_prompt_leaves_an_empty_context_out():
    assert prompt(Record("Reverse", "abc", "cba")) == "Reverse\nabc\n-> "
    assert prompt(Record("Say hello", "", "hello")) == "Say hello\n-> "


@pytest.mark.parametrize(
    "fields, kind, message",
    [
        ({"instruction": 1}, TypeError, "instruction: expected str, got int"),
        ({"output": b"a"}, TypeError, "output: expected str, got bytes"),
        ({"context": None}, TypeError, "context: expected str, got NoneType"),
        ({"task": 3}, TypeError, "task: expected str, got int"),
        ({"references": "ab"}, TypeError, "references: expected a tuple, got str"),
        ({"references": ("a", 1)}, TypeError, "references: expected str, got int"),
        ({"instruction": ""}, ValueError, "instruction: the text is empty"),
        ({"output": ""}, ValueError, "output: the text is empty"),
        ({"references": ("a", "")}, ValueError, "references: the text is empty"),
        ({"context": "\ud800"}, ValueError, "context: .*surrogates"),
    ],
)
def test_a_record_holds_text(fields, kind, message):
    with pytest.raises(kind, match=message):
        Record(**{"instruction": "i", "context": "c", "output": "o"} | fields)


def test_a_file_is_an_object_a_line(tmp_path):
    path = tmp_path / "records.jsonl"
    found = [
        Record("Café", "", "a\n\u2028b"),
        Record("i", "c", "o", ("p",), "t"),
    ]
    save_records(path, found)
    assert path.read_text(encoding="utf-8").split("\n") == [
        '{"instruction": "Café", "output": "a\\n\u2028b"}',
        '{"instruction": "i", "context": "c", "output": "o", "references": ["p"], "task": "t"}',
        "",
    ]
    assert load_records(path) == found
    path.write_bytes(b'{"output":"o","instruction":"i","context":"","references":[]}\r\n')
    assert load_records(path) == [Record("i", "", "o")]


@given(st.lists(records, min_size=1, max_size=4))
def test_what_is_saved_is_loaded(tmp_path_factory, found):
    path = tmp_path_factory.getbasetemp() / "saved.jsonl"
    save_records(path, found)
    assert load_records(path) == found


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_saved_and_loaded(tmp_path, name):
    train, test = make_tasks([name], 20, 5, seed=0)
    save_records(tmp_path / "r.jsonl", train + test)
    assert load_records(tmp_path / "r.jsonl") == train + test


def test_nothing_is_saved_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="no record"):
        save_records(tmp_path / "r.jsonl", [])
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        load_records(tmp_path / "r.jsonl")


GOOD = '{"instruction": "i", "output": "o"}'


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "not valid JSON: Expecting value, at column 1"),
        ("{", "Expecting property name"),
        (GOOD + GOOD, "Extra data"),
        (b"\xff", "can't decode"),
        (b"\xef\xbb\xbf" + GOOD.encode(), "BOM"),
        (GOOD.encode("utf-16"), "can't decode"),
        ("[" * 100_000, "(recursion|overflow)"),
        ("9" * 5000, "digits"),
        ("[]", "expected an object, got list"),
        ("null", "expected an object, got NoneType"),
        ('"i"', "expected an object, got str"),
        ("{}", "instruction: the field is missing"),
        ('{"instruction": "i"}', "output: the field is missing"),
        ('{"output": "o"}', "instruction: the field is missing"),
        ('{"instruction": "i", "output": "o", "input": ""}', "'input': the field is unknown"),
        ('{"instruction": "i", "output": "o", "output": "p"}', "'output': .* appears twice"),
        ('{"instruction": "i", "output": ""}', "output: the text is empty"),
        ('{"instruction": "i", "output": NaN}', "output: expected str, got float"),
        ('{"instruction": {"a": "b"}, "output": "o"}', "instruction: expected str"),
        ('{"instruction": "i", "output": "\\ud800"}', "output: .*surrogates"),
        ('{"instruction": "i", "output": "o", "context": null}', "context: expected str"),
        ('{"instruction": "i", "output": "o", "references": "ab"}', "references: expected a list"),
        ('{"instruction": "i", "output": "o", "references": {"a": "b"}}', "references: expected a"),
        ('{"instruction": "i", "output": "o", "references": [1]}', "references: expected str"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "records.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode())
    with pytest.raises(FormatError, match=rf"(?s)records\.jsonl: line 2: .*{message}"):
        load_records(path)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "r.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(FormatError, match=r"r\.jsonl: is a pointer of git-lfs"):
        load_records(tmp_path / "r.jsonl")


def test_a_file_has_a_record(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b"")
    with pytest.raises(FormatError, match=r"r\.jsonl: holds no record"):
        load_records(tmp_path / "r.jsonl")


@given(data=st.data())
def test_mutated_files_raise_format_errors_only(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.jsonl"
    save_records(path, make_tasks(["table", "sql"], 2, 0, seed=0)[0])
    content = path.read_bytes()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        cut = data.draw(st.sampled_from([0, 1, 2, 20]))
        patch = st.sampled_from([b"", b"null", b"-1", b"\n", b'"', b"[[", b"\\ud800"]) | st.binary()
        content = content[:at] + data.draw(patch) + content[at + cut :]
    path.write_bytes(content)
    try:
        found = load_records(path)
    except FormatError:
        return
    save_records(path, found)
    assert load_records(path) == found


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "dangling"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "r.jsonl"
    {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda p: os.symlink("/dev/zero", p),
     "dangling": lambda p: os.symlink("none", p)}[kind](path)
    with pytest.raises(FormatError, match=r"r\.jsonl: cannot be read"):
        load_records(path)


# What is held out


@given(
    asked=st.lists(st.integers(0, 12), min_size=2, max_size=30), held=st.integers(1, 29),
    random=st.randoms(),
)
def test_records_are_held_out_by_their_prompts(asked, held, random):
    found = [Record("I", f"{number}", f"{i}") for i, number in enumerate(asked)]
    copies = Counter(map(prompt, found))
    if held >= len(found) or min(copies.values()) > held:
        with pytest.raises(ValueError, match="held out"):
            split_records(found, held)
        return
    train, test = split_records(found, held)
    assert train and test and len(test) <= held
    assert Counter(train + test) == Counter(found)
    assert not set(map(prompt, train)) & set(map(prompt, test))
    assert all([r for r in found if r in part] == part for part in (train, test))
    # fewer only if no other prompt would fit
    assert all(copies[prompt(r)] > held - len(test) for r in train)
    random.shuffle(found)
    again = split_records(found, held)
    assert [set(part) for part in again] == [set(train), set(test)]


def test_a_sorted_file_gives_both_classes_to_both_parts():
    found = [Record("Good or bad?", f"{i}", "good" if i < 500 else "bad") for i in range(1000)]
    _, test = split_records(found, 100)
    counts = Counter(record.output for record in test)
    assert len(test) == 100 and min(counts["good"], counts["bad"]) >= 35  # 50 +- 3 deviations
    few, same = split_records(found, 100, train=100)
    counts = Counter(record.output for record in few)
    assert same == test and len(few) == 100 and min(counts["good"], counts["bad"]) >= 35
    more, _ = split_records(found, 100, train=500)
    assert few == [record for record in more if record in few]
    assert split_records(found, 100, train=10**6) == split_records(found, 100)
    with pytest.raises(ValueError, match="train must be at least 1, got 0"):
        split_records(found, 100, train=0)


# Rows and batches


def test_targets_are_the_output_and_the_end():
    tokens, targets = encode([Record("Up", "a", "AB"), Record("I", "", "o")], BYTES)
    no = IGNORED
    assert tokens.tolist() == [[*b"Up\na\n-> AB"], [*b"I\n-> o", 0, 0, 0, 0]]
    assert targets.tolist() == [[no] * 7 + [*b"AB", 256], [no] * 4 + [*b"o", 256] + [no] * 4]
    assert no == -100


@pytest.fixture(scope="module")
def bpe():
    pytest.importorskip("tokenizers")
    return BPETokenizer.train([prompt(record) for record in make_tasks(TASKS, 20, 0, 0)[0]], 400)


@given(found=st.lists(records, min_size=1, max_size=5), spare=st.integers(0, 9))
def test_rows_decode_to_their_records(found, spare):
    check_rows(found, BYTES, spare)
    check_rows(found, CharTokenizer.train([prompt(r) + r.output for r in found]), spare)


@given(seed=seeds, spare=st.integers(0, 9))
def test_rows_of_tasks_decode_to_their_records(bpe, seed, spare):
    check_rows(make_tasks(TASKS, 2, 1, seed)[0], bpe, spare)


def check_rows(found, tokenizer, spare):
    length = encode(found, tokenizer)[0].shape[1]  # what the longest takes
    tokens, targets = encode(found, tokenizer, length + spare)
    assert tokens.dtype == targets.dtype == np.int32
    assert tokens.shape == targets.shape == (len(found), length + spare)
    for record, row, wanted in zip(found, tokens, targets):
        (places,) = np.nonzero(wanted != IGNORED)
        first, last = places[0], places[-1]
        np.testing.assert_array_equal(places, np.arange(first, last + 1))
        assert tokenizer.decode(row[: first + 1]) == prompt(record)
        assert wanted[first:last].tolist() == tokenizer.encode(record.output).tolist()
        assert wanted[last] == tokenizer.end
        np.testing.assert_array_equal(wanted[first:last], row[first + 1 : last + 1])
        assert not row[last + 1 :].any()
    assert (targets[:, length - 1] != IGNORED).any() and (targets[:, length:] == IGNORED).all()


def test_a_record_that_does_not_fit_is_named():
    found = [Record("I", "", "ab"), Record("I", "", "abcd"), Record("I", "", "a")]
    assert encode(found, BYTES, 9)[0].shape == (3, 9)
    with pytest.raises(ValueError, match=r"record 1 takes 9 tokens, the length is 8: .*'abcd'"):
        encode(found, BYTES, 8)
    with pytest.raises(ValueError, match="record 1 takes 9 tokens, the length is 0"):
        InstructionBatches(found, BYTES, 2, 0, seed=0)
    with pytest.raises(ValueError, match=r"takes 9 tokens, .* context is 8: record 1, .*'abcd'"):
        encode(found, BYTES, context=8)
    with pytest.raises(ValueError, match=r"takes 9 tokens, .* context is 8: record 1, .*'abcd'"):
        InstructionBatches(found, BYTES, 2, None, seed=0, context=8)
    with pytest.raises(ValueError, match=r"record 0, .*'abcd'.*: character 'b' at position 1"):
        encode(found[1:], CharTokenizer("\n ->Iacd"))
    with pytest.raises(ValueError, match="no record"):
        encode([], BYTES)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        InstructionBatches(found, BYTES, 0, 9, seed=0)


def numbered(size):
    """Records whose output is their number, as a character; the number tells a row's record."""
    return [Record("I", "", chr(33 + number)) for number in range(size)]


def drawn(tokens):
    return (tokens[:, 5] - 33).tolist()


@given(size=st.integers(1, 30), batch=st.integers(1, 40), seed=seeds)
def test_an_epoch_has_each_record_once(size, batch, seed):
    batches = InstructionBatches(numbered(size), BYTES, batch, None, seed)
    steps = list(islice(batches, -(-3 * size // batch)))
    for tokens, targets in steps:
        assert tokens.shape == targets.shape == (batch, 6)
        assert drawn(tokens) == (targets[:, 4] - 33).tolist()
    order = list(chain.from_iterable(drawn(tokens) for tokens, _ in steps))
    for epoch in range(3):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))


def of_lengths(lengths):
    """Records of so many letters, numbered by their first one."""
    return [Record("I", "", chr(33 + i).ljust(n, "x")) for i, n in enumerate(lengths)]


@given(
    lengths=st.lists(st.integers(1, 6) | st.integers(1, 200), min_size=1, max_size=60),
    batch=st.integers(1, 9), seed=seeds,
)
def test_records_share_batches_with_their_like_in_every_epoch(lengths, batch, seed):
    batches, size = InstructionBatches(of_lengths(lengths), BYTES, batch, None, seed), len(lengths)
    taken = np.array(lengths) + 5  # b"I\n-> ", the output without its last letter, and the end
    groups = np.maximum(np.ceil(np.log2(taken / (2 * np.median(taken)))), 0)
    steps = list(islice(batches, -(-3 * size // batch)))
    order = list(chain.from_iterable(drawn(tokens) for tokens, _ in steps))
    for epoch in range(3):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))
    mixed = Counter()
    for step, (tokens, targets) in enumerate(steps):
        rows, row_groups = drawn(tokens), groups[drawn(tokens)]
        expected = encode([of_lengths(lengths)[i] for i in rows], BYTES, tokens.shape[1])
        np.testing.assert_array_equal((tokens, targets), expected)
        assert tokens.shape[1] == taken[groups == row_groups.max()].max()
        first, last = step * batch // size, (step * batch + batch - 1) // size
        if first == last:  # other batches end one epoch and begin the next
            mixed[first] += len(set(row_groups)) - 1
    assert max(mixed.values(), default=0) <= len(set(groups)) - 1  # where two groups meet


def test_one_long_record_costs_its_own_batch_only():
    batches = InstructionBatches(of_lengths([8] * 63 + [500]), BYTES, 8, None, seed=0)
    for epoch in range(5):
        widths = [batches[8 * epoch + step][0].shape[1] for step in range(8)]
        assert sorted(widths) == [13] * 7 + [505]


def test_batches_do_not_mix_when_epochs_begin_inside_one():
    batches, inside = InstructionBatches(of_lengths([8] * 70 + [60] * 31), BYTES, 8, None, 0), 0
    for step in range(101):  # eight epochs of 101 records
        long = [number >= 70 for number in drawn(batches[step][0])]
        if 8 * step // 101 == (8 * step + 7) // 101:
            inside += len(set(long)) > 1
    assert inside <= 8


def test_long_records_come_at_any_time_and_with_any_others():
    batches = InstructionBatches(of_lengths([8] * 56 + [500] * 8), BYTES, 4, None, seed=0)
    times, pairs = Counter(), set()
    for epoch in range(200):
        for step in range(16):
            tokens, _ = batches[16 * epoch + step]
            if tokens.shape[1] > 100:
                times[step] += 1
                pairs |= set(combinations(sorted(drawn(tokens)), 2))
    assert sum(times.values()) == 400 and len(pairs) == 28
    assert 10 <= min(times[step] for step in range(16)) and max(times.values()) <= 45  # 25 each


def test_rows_of_like_lengths_come_as_they_are_drawn():
    """Up to twice the median there is one group, and the draw is the plain permutation."""
    lengths = np.random.default_rng(0).integers(1, 16, 50)
    batches = InstructionBatches(of_lengths(lengths), BYTES, 10, None, seed=4)
    assert lengths.max() + 5 <= 2 * np.median(lengths + 5)
    for epoch in range(3):
        order = np.random.default_rng([4, epoch, 3]).permutation(50)
        found = [drawn(batches[5 * epoch + step][0]) for step in range(5)]
        np.testing.assert_array_equal(np.concatenate(found), order)
    assert {batches[step][0].shape[1] for step in range(15)} == {lengths.max() + 5}


def test_every_epoch_and_seed_has_an_order_of_its_own():
    batches = [InstructionBatches(numbered(20), BYTES, 20, None, seed) for seed in range(3)]
    orders = {tuple(drawn(each[epoch][0])) for each in batches for epoch in range(5)}
    assert len(orders) == 15
    first = np.array([drawn(batches[0][epoch][0]) for epoch in range(300)])
    counts = np.bincount(first[:, 0], minlength=20)  # who comes first: 15 times each on average
    assert counts.min() > 0 and counts.max() < 40


def test_a_step_depends_on_seed_and_step_only():
    found = make_tasks(["reverse", "sort"], 15, 0, seed=0)[0]
    forward = list(islice(InstructionBatches(found, BYTES, 7, 40, seed=3), 12))
    resumed = InstructionBatches(found, BYTES, 7, 40, seed=3)
    for step in (11, 4, 0, 10**6, 5):
        again = resumed[step]
        if step < 12:
            np.testing.assert_array_equal(again, forward[step])
    assert resumed[4][0].shape == (7, 40)


def test_the_draw_of_a_seed_never_changes():
    batches = InstructionBatches(numbered(5), BYTES, 4, None, seed=1)
    assert [drawn(batches[step][0]) for step in range(3)] == [
        [2, 0, 3, 4],
        [1, 1, 3, 4],
        [2, 0, 3, 2],
    ]


# Tasks


def letters(record):
    assert re.fullmatch("[a-z]{3,8}", record.context)
    return record.context


def sum_of(record):
    a, b = re.fullmatch(r"(\d{1,2})\+(\d{1,2})", record.context).groups()
    return str(int(a) + int(b))


def last_word(record):
    assert re.fullmatch("[a-z]{2,4}( [a-z]{2,4}){1,3}", record.context)
    return record.context.split(" ")[-1]


def area(record):
    base, height = re.fullmatch(r"Base: (\d+)cm; Height: (\d+)cm", record.context).groups()
    doubled = int(base) * int(height)
    return f"The area of the triangle is {doubled // 2}{'.5' * (doubled % 2)} cm^2"


ANSWERS = {
    "reverse": ("Reverse", lambda record: "".join(reversed(letters(record)))),
    "upper": ("Upper", lambda record: letters(record).swapcase()),
    "sort": ("Sort", lambda record: "".join(sorted(letters(record)))),
    "last": ("Last word", last_word),
    "add": ("Add", sum_of),
    "triangle": ("Calculate the area of the triangle", area),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_outputs_are_what_the_instruction_asks(name):
    instruction, answer = ANSWERS[name]
    for record in make_tasks([name], 300, 0, seed=0)[0]:
        assert record == Record(instruction, record.context, answer(record), task=name)
        if name != "triangle":
            assert len((prompt(record) + record.output).encode()) + 1 <= 40


def test_every_sentence_tells_the_whole_table():
    found = make_tasks(["table"], 300, 0, seed=0)[0]
    for record in found:
        cells = [cell.split(": ") for cell in record.context.split(" | ")]
        assert [name for name, _ in cells] == ["name", "food", "price", "area"]
        sentences = {record.output, *record.references}
        assert len(sentences) == 4 and len(record.references) == 3
        assert all(value in sentence for sentence in sentences for _, value in cells)
        assert all(score(record, sentence) for sentence in sentences)
    verbs = Counter(re.search("serves|is a|offers|go to", record.output)[0] for record in found)
    assert len(verbs) == 4 and min(verbs.values()) > 40  # of 300: each may be the output


def answer_of(question):
    """What a question about the cities asks for, found without SQL."""
    if match := re.fullmatch(r"Where is (\w+)\?", question):
        return [(country,) for name, country, _ in CITIES if name == match[1]]
    pattern = r"(Which|How many) cities(?: in (\w+))? have more than (\d+) people\?( Largest.*)?"
    asked, place, least, order = re.fullmatch(pattern, question).groups()
    found = [row for row in CITIES if row[2] > int(least) and place in (None, row[1])]
    assert found, "a question with an empty answer"
    if asked == "How many":
        return [(len(found),)]
    return [row[:1] for row in sorted(found, key=lambda row: -row[2] if order else 0)]


def test_queries_find_the_answer():
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE cities (name, country, population)")
    database.executemany("INSERT INTO cities VALUES (?, ?, ?)", CITIES)
    found = make_tasks(["sql"], 300, 0, seed=0)[0]
    for record in found:
        assert database.execute(record.output).fetchall() == answer_of(record.context)
    database.close()
    assert Counter(record.output.split(" FROM")[0] for record in found).keys() == {
        "SELECT name", "SELECT COUNT(*)", "SELECT country",
    }


@given(train=st.integers(0, 30), test=st.integers(0, 30), seed=seeds)
def test_no_test_prompt_is_trained_on(train, test, seed):
    parts = make_tasks(TASKS, train, test, seed)
    for part, count in zip(parts, (train, test)):
        assert [record.task for record in part] == [name for name in TASKS for _ in range(count)]
    prompts = [prompt(record) for part in parts for record in part]
    assert len(set(prompts)) == len(prompts)
    assert make_tasks(TASKS, train, test, seed) == parts


def test_records_of_a_task_depend_on_the_seed_only():
    both = make_tasks(["sort", "add"], 10, 5, seed=1)
    assert make_tasks(["add"], 10, 5, seed=1) == (both[0][10:], both[1][5:])
    assert make_tasks(["add", "add"], 10, 5, seed=1) == make_tasks(["add"], 10, 5, seed=1)
    contexts = {r.context for seed in range(5) for r in make_tasks(["reverse"], 10, 0, seed)[0]}
    assert len(contexts) == 50


def test_the_records_of_a_seed_never_change():
    train, test = make_tasks(["last", "add"], 2, 1, seed=1)
    assert [(r.context, r.output) for r in train + test] == [
        ("eask wuu", "wuu"),
        ("bv xbln", "xbln"),
        ("97+7", "104"),
        ("71+61", "132"),
        ("umzo lty lh", "lh"),
        ("24+62", "86"),
    ]


@given(bounds=st.tuples(st.integers(0, 25), st.integers(0, 25)).map(sorted),
       sizes=st.tuples(st.integers(5, 9), st.integers(5, 9)).map(sorted), seed=seeds)
def test_words_can_be_drawn_otherwise(bounds, sizes, seed):
    first, end = (string.ascii_lowercase[i] for i in bounds)
    least, most = sizes
    words = Words(first, end, least, most)
    count = 20 if first < end else 1  # one letter gives few distinct words
    names = ["reverse", "upper", "sort", "last"]
    for record in make_tasks(names, count, 0, seed, words)[0]:
        assert re.fullmatch(f"[{first}-{end}]{{{least},{most}}}( [a-z]+){{0,3}}", record.context)
        for word in record.context.split(" "):
            assert least <= len(word) <= most and first <= min(word) and max(word) <= end
        assert record.output == {
            "reverse": record.context[::-1], "upper": record.context.upper(),
            "sort": "".join(sorted(record.context)), "last": record.context.split(" ")[-1],
        }[record.task]
    assert make_tasks(names, 5, 5, seed, Words()) == make_tasks(names, 5, 5, seed)


def test_a_task_without_words_draws_no_other_ones():
    with pytest.raises(ValueError, match="task 'add' draws no words"):
        make_tasks(["sort", "add"], 1, 1, 0, Words(last="m"))
    assert make_tasks(["add"], 3, 1, 0, Words()) == make_tasks(["add"], 3, 1, 0)


@pytest.mark.parametrize(
    "names, train, test, message",
    [
        ([], 1, 1, "no task is named; there are reverse, upper"),
        (["add", "ad"], 1, 1, "'ad' is none of the tasks reverse, upper, sort, last, add, tri"),
        (["triangle"], 2500, 1, "task 'triangle' gave 2500 distinct records, not 2501"),
        (["add"], -1, 5, "must not be negative, got -1 and 5"),
        (["add"], 5, -1, "must not be negative, got 5 and -1"),
    ],
)
def test_tasks_that_cannot_be_made_are_refused(names, train, test, message):
    with pytest.raises(ValueError, match=message):
        make_tasks(names, train, test, seed=0)


def test_all_records_of_a_task_can_be_had():
    train, test = make_tasks(["triangle"], 2000, 500, seed=0)
    assert len({record.context for record in train + test}) == 2500


# Scores


@pytest.mark.parametrize("name", TASKS)
def test_only_the_right_answer_scores(name):
    found = make_tasks([name], 8 if name == "sql" else 60, 0, seed=2)[0]
    for record in found:
        assert score(record, record.output) is True
        for wrong in ("", record.output + "x", record.output[1:], "x" + record.output):
            assert score(record, wrong) is False
    others = [score(found[0], r.output) for r in found[1:] if r.output != found[0].output]
    assert not all(others) and (name == "sql" or not any(others))


def test_a_reference_is_right_too():
    record = Record("i", "", "a", ("b", "c d"))
    answers = ["a", "b", "c d", "c", "A", "a ", ""]
    assert [answer for answer in answers if score(record, answer)] == ["a", "b", "c d"]
