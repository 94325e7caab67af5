"""generate.py --chat and conversations in finetune.py, as their user meets them."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import finetune
import generate as script
import numpy as np
import pytest
from chat_templates import CHATML, GEMMA, byte_level, write_folder

from minilm.data import load_chat, plain, read_names, read_templates, write_templates
from minilm.dialogue import Dialogue
from minilm.generate import stream
from minilm.interop import huggingface
from minilm.run import RunDirectory
from minilm.transformer import Config, Ends, Transformer

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

ROOT, WORDS = Path(__file__).parents[1], byte_level()
END = WORDS.special["<|im_end|>"]
SHORT = {"tokens": 12, "temperature": 0.0, "chat": True}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def folder(tmp_path):
    """A model that never ends by itself, and knows ChatML."""
    model = Transformer(Config.llama(WORDS.vocab_size, 120, 2, 2, 16, 24), seed=3)
    model.head.weight.data[[*WORDS.special.values()]] = 0
    model.ends = Ends(eos=(WORDS.end,))
    huggingface.save_model(model, tmp_path / "model")
    return write_folder(tmp_path / "model", WORDS, CHATML)


@pytest.fixture
def types(monkeypatch):
    """Give the lines that a user types. An exception is a key, such as Ctrl-C, at the prompt."""
    def typed(*lines):
        left = iter([*lines, EOFError])

        def line(prompt):
            assert prompt == "> "
            if isinstance(said := next(left), str):
                return said
            raise said

        monkeypatch.setattr("builtins.input", line)
        return left
    return typed


def spoken(folder, *messages, count=12):
    """The answer to messages, without anything kept."""
    model = huggingface.load_model(folder).eval()
    chat = load_chat(folder, WORDS, read_templates(folder))
    roles = ["user", "assistant"] * 9
    if messages[0].startswith("system:"):
        roles = ["system", *roles]
    asked = chat.prompt([{"role": role, "content": text.removeprefix("system:")}
                         for role, text in zip(roles, messages)])
    return WORDS.decode([int(id[0]) for id in islice(stream(model, [asked], 0), count)])


def test_a_conversation(folder, types, capsys):
    types("Who sat?", "", "  ", "So?")
    script.main(folder, **SHORT)
    out, err = capsys.readouterr()
    first = spoken(folder, "Who sat?")
    second = spoken(folder, "Who sat?", first, "So?")
    assert out == f"{script.printable(first)}\n{script.printable(second)}\n\n"
    assert err == "stopped after 12 tokens, see --tokens\n" * 2


def test_only_new_tokens_are_run(folder, types, monkeypatch):
    kept, answer = [], Dialogue.answer

    def noted(dialogue, tokens):
        kept.append((dialogue, len(tokens), dialogue.ran))
        return answer(dialogue, tokens)

    monkeypatch.setattr(Dialogue, "answer", noted)
    types("the cat", "the mat", "the dog")
    said = []
    decode = WORDS.decode
    monkeypatch.setattr(script, "load_tokenizer", lambda path: WORDS)
    monkeypatch.setattr(WORDS, "decode", lambda ids: said.append(list(ids)) or decode(ids))
    script.main(folder, **SHORT)
    (dialogue, first, _), (_, second, after), (_, third, later) = kept
    assert after == first + 11 and dialogue.ran < first + second + third
    assert later - after <= second - first + 12 and dialogue.ran - later <= third - second + 12


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|eot_id|>", "<|im_end|>", None])
def test_it_stops_at_every_end(folder, types, capsys, monkeypatch, end):
    """Those of the folder, of which there may be several, and the template's own."""
    model = huggingface.load_model(folder)
    model.ends = Ends(eos=(WORDS.end, WORDS.special["<|eot_id|>"]))
    huggingface.save_model(model, folder)
    stop, (a, b) = WORDS.special[end or "</s>"], WORDS.encode("th")
    monkeypatch.setattr(Dialogue, "answer", lambda *args: iter([a, stop, b]))
    types("Who sat?")
    script.main(folder, **SHORT)
    out, err = capsys.readouterr()
    assert (out, err == "") == ("t\n\n" if end else "th\n\n", end is not None)


def test_ctrl_c_stops_the_answer_and_then_the_conversation(folder, types, capsys, monkeypatch):
    answer, turns = Dialogue.answer, []

    def interrupted(dialogue, tokens):
        turns.append(WORDS.decode(tokens))
        for i, id in enumerate(answer(dialogue, tokens)):
            if i == 5 and len(turns) == 1:
                raise KeyboardInterrupt
            yield id

    monkeypatch.setattr(Dialogue, "answer", interrupted)
    left = types("Who sat?", "So?", KeyboardInterrupt, "never")
    script.main(folder, **SHORT)
    assert next(left) == "never" and len(turns) == 2
    assert spoken(folder, "Who sat?", count=5).strip() in turns[1]
    assert "stopped after 12 tokens" in capsys.readouterr().err


def test_a_full_context_is_told(folder, types, capsys):
    types("Who sat?", "the cat " * 30, "So?", "x" * 500, "And?")
    script.main(folder, tokens=1000, temperature=0.0, chat=True)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "the context of 120 tokens is full"
    assert said[1] == "the context of 120 tokens is full: the conversation begins anew"
    assert any(line.startswith("the message takes ") and line.endswith("context is 120")
               for line in said)


def test_the_systems_message(folder, types, capsys):
    types("Who sat?")
    script.main(folder, system="Be brief.", **SHORT)
    out = capsys.readouterr().out
    assert out == script.printable(spoken(folder, "system:Be brief.", "Who sat?")) + "\n\n"
    write_folder(folder, WORDS, GEMMA)
    with pytest.raises(ValueError, match="the chat template fails: no system here"):
        script.main(folder, system="Be brief.", **SHORT)


def test_what_a_template_refuses_is_told_and_forgotten(folder, types, capsys):
    write_folder(folder, WORDS, CHATML + "{% if messages[-1].content == 'x' %}"
                 "{{ raise_exception('no x') }}{% endif %}")
    types("x", "Who sat?")
    script.main(folder, **SHORT)
    out, err = capsys.readouterr()
    assert err.startswith("the chat template fails: no x\n")
    assert out == script.printable(spoken(folder, "Who sat?")) + "\n\n"


def test_without_a_template_it_says_what_to_do(folder, types):
    write_folder(folder, WORDS)
    with pytest.raises(ValueError, match=r"model has no chat template, .*finetune\.py, or put .* "
                                         r"chat_template\.jinja"):
        script.main(folder, **SHORT)


@pytest.mark.parametrize("adapter, words", [
    ("nowhere", "there is no such folder"), ("model", "holds a model, not an adapter"),
    ("file", "is no folder; an adapter is a folder with adapter_config.json"),
])
def test_what_is_no_adapter_is_named(tmp_path, adapter, words):
    huggingface.save_model(Transformer(Config.gpt2(258, 40, 1, 1, 4)), tmp_path / "model")
    (tmp_path / "file").touch()
    for model in (tmp_path / "model", None):
        with pytest.raises((OSError, ValueError), match=words):
            script.main(model, adapter=tmp_path / adapter)


@pytest.mark.parametrize("words", [["--chat", "--prompt", "x"], ["--system", "x"]])
def test_options_that_mean_nothing_are_refused(folder, words):
    done = subprocess.run([sys.executable, ROOT / "scripts" / "generate.py", "--model", folder,
                           *words], capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"{words[-2].strip('-')} is given, but this is " in done.stderr


def test_the_keys_of_a_terminal(tmp_path, ctrl_c):
    """SIGINT during an answer goes back to the prompt, a second one there ends it."""
    model = Transformer(Config.gpt2(WORDS.vocab_size, 30_000, 1, 1, 4), seed=3)
    model.ends = Ends(eos=(WORDS.end,))
    huggingface.save_model(model, tmp_path)
    write_folder(tmp_path, WORDS, CHATML)
    child = subprocess.Popen(
        [sys.executable, "-u", ROOT / "scripts" / "generate.py", "--model", tmp_path, "--chat",
         "--tokens", "1000000"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        child.stdin.write(b"Hello\n")
        child.stdin.flush()
        assert child.stdout.read(40).startswith(b"> ")  # it answers
        child.send_signal(signal.SIGINT)
        os.set_blocking(child.stdout.fileno(), False)
        out = b""
        for _ in range(400):
            out += child.stdout.read() or b""
            if out.endswith(b"\n> "):
                break
            time.sleep(0.05)
        assert out.endswith(b"\n> ")
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 0 and child.stderr.read() == b""
    finally:
        child.kill()
        child.communicate()


# Learning


def talks_file(path):
    talks = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "the cat"}] * 2
             for i in range(9)]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return str(path)


def lesson(folder, tmp_path, **changes):
    (tmp_path / "text.txt").write_text("A cat sat on a mat. " * 40)
    small = dict(model=str(folder), data=(talks_file(tmp_path / "talks.jsonl"),), test=2, r=2,
                 known=(str(tmp_path / "text.txt"),), batch=4, steps=3, warmup=1, workers=1)
    return finetune.Settings(**small | changes)


@pytest.mark.parametrize("method", ["full", "lora", "bottleneck", "prompt", "prefix"])
@pytest.mark.parametrize("source", [CHATML, None], ids=["own", "none"])
def test_conversations_are_learned_and_can_be_held(folder, tmp_path, types, capsys, method, source):
    write_folder(folder, WORDS, source)
    finetune.main(lesson(folder, tmp_path, method=method, lr=0.01, length=3), tmp_path / "runs")
    said = capsys.readouterr().out
    assert "7 conversations to train on, 2 held out" in said and "right" not in said
    run = tmp_path / "runs" / f"finetune-{method}-1"
    losses = [record["loss_held_out"] for record in RunDirectory(run).records()
              if "loss_held_out" in record]
    assert losses[-1] < losses[0]
    kept = run / ("model" if method == "full" else "adapter")
    assert read_templates(kept) == {"default": source or plain(WORDS)}
    if method == "full":  # <s> is named, though the model has no such id
        assert read_names(kept, WORDS).items() >= read_names(folder, WORDS).items()
    if method == "full":
        ends = (WORDS.end, END) if source else (WORDS.end, WORDS.special["</s>"])
        assert huggingface.load_model(kept).ends.eos == ends
    assert "generate.py --chat --model" in said
    types("0?")
    use = {"model": kept} if method == "full" else {"model": folder, "adapter": kept}
    script.main(**use, **SHORT)
    assert len(capsys.readouterr().out) > 2


def test_a_changed_template_is_not_resumed(folder, tmp_path):
    finetune.main(lesson(folder, tmp_path, steps=1), tmp_path)
    write_templates(folder, {"default": CHATML + "{# #}"})
    with pytest.raises(ValueError, match="not those"):
        finetune.main(resume=tmp_path / "finetune-lora-1")


def test_records_keep_the_template_too(folder, tmp_path):
    (tmp_path / "r.jsonl").write_text("".join(
        json.dumps({"instruction": f"Say {i}", "output": "b"}) + "\n" for i in range(5)))
    finetune.main(lesson(folder, tmp_path, data=(str(tmp_path / "r.jsonl"),), method="full",
                         steps=1), tmp_path)
    assert read_templates(tmp_path / "finetune-full-1" / "model") == {"default": CHATML}


def test_what_is_learned_is_the_loss_on_the_answers(folder, tmp_path):
    s = lesson(folder, tmp_path)
    train, test = finetune.load_data(s)
    chat = load_chat(folder, WORDS, read_templates(folder))
    model = huggingface.load_model(folder)
    batches = finetune.conversations(train, test, chat, model, 4, 0).batches
    for tokens, targets in islice(batches, 4):
        for row in targets:
            learned = row[row != -100]
            assert WORDS.decode(learned) == "the catthe cat"
            assert (learned == END).sum() == 2
        assert tokens.shape == targets.shape and np.issubdtype(tokens.dtype, np.int32)
