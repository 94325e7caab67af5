"""Records the other way round: the laws of swapping, and what a file of them gives."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from minilm.data import ASKED, Record, make_tasks, prompt, question, score, swap, swapped
from minilm.data.reversal import parted

texts = st.text(st.sampled_from("ab \n?"), max_size=6) | st.text(max_size=6) | st.just(ASKED)
some = texts.filter(bool)
records = st.builds(Record, some, texts, some, task=st.sampled_from(["", "sql", "a, reversed"]))
lines = records.filter(lambda r: "\n" not in r.instruction
                       and not (r.instruction == ASKED and r.context))


@given(lines)
def test_swapping_twice_is_the_identity(record):
    there = swap(record)
    assert swap(there) == record and swap(swap(there)) == there
    assert (there.instruction, there.context) == (ASKED, record.output)
    assert there.output + "\n-> " == prompt(record)


@given(records.filter(lambda r: r.instruction != ASKED))
def test_whatever_the_lines_the_model_sees_the_same_prompt(record):
    again = swap(swap(record))
    assert prompt(again) == prompt(record)
    assert (again.output, again.task) == (record.output, record.task)


@given(texts)
def test_what_was_asked_comes_apart_and_together(asked):
    instruction, context = parted(asked)
    assert asked == instruction + (f"\n{context}" if context else "")
    assert instruction or not asked


def test_references_are_other_answers_and_no_other_questions():
    (record,), _ = make_tasks(["table"], 1, 0, 0)
    there = swap(record)
    assert len(record.references) == 3 and there.references == ()
    assert swap(there) == replace(record, references=())


def test_a_question_about_a_query_is_not_run():
    (record,), _ = make_tasks(["sql"], 1, 0, 0)
    there = swap(record)
    assert there.task == "sql, reversed"
    assert score(there, there.output) and not score(there, there.output + " ")


@given(record=lines, said=texts)
def test_a_round_trip_asks_what_was_said_and_wants_the_answer(record, said):
    asked = question(swap(record), said)
    if not said:
        assert asked is None
    else:
        assert prompt(asked) == f"{said}\n-> " and asked.output == record.output
        assert asked.task == record.task
    assert question(swap(record), swap(record).output) == record


words = st.text("ab", min_size=1, max_size=3)
sorts = st.lists(words.map(lambda w: Record("Sort", w, "".join(sorted(w)))), max_size=8)


@given(sorts, sorts)
def test_no_answer_that_is_asked_about_is_learned_from(train, test):
    learn, ask = swapped(train, test)
    assert ask == [swap(record) for record in test]
    outputs = {record.output for record in test}
    assert learn == [swap(record) for record in train if record.output not in outputs]
