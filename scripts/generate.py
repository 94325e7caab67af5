"""Let a trained model write.

    python scripts/generate.py                      # with the newest model under runs/
    python scripts/generate.py --model runs/pretrain-1/model --prompt "The " --temperature 0.5
    python scripts/generate.py --model runs/pretrain-1/model \\
        --adapter runs/finetune-lora-1/adapter --temperature 0 --prompt $'Reverse\\nminilm\\n-> '
    python scripts/generate.py --model my-chat-model --chat
    python scripts/generate.py --model my-4-bit-model --dequantized 500

Prints the prompt and what the model writes after it, as it is sampled, then the speed. The model is
the Hugging Face folder of a causal model, with its tokenizer.json. It stops at the ends that the
folder names (eos_token_id), or else at the tokenizer's.

With --chat it is a conversation: a line is a message, which the model answers. Its messages are
written as the chat template of the folder says, or that of the adapter's. Ctrl-C stops an answer.
At the prompt Ctrl-C or Ctrl-D ends the conversation. Needs the extra `chat`.

A model of 4 or 8 bits makes its weights again for each token. --dequantized keeps as many of them
as floats as fit into so many MB, which changes the speed and no token.
"""

import sys
import time
from collections.abc import Collection, Iterable
from contextlib import contextmanager
from itertools import islice, takewhile
from pathlib import Path

from minilm.backend import tune_allocator, use_huge_pages
from minilm.command import Given, command, many, utf8
from minilm.data import (
    Chat,
    Tokenizer,
    load_chat,
    load_tokenizer,
    printable,
    read_templates,
)
from minilm.dialogue import Dialogue
from minilm.generate import stream
from minilm.loop import refuse_unused
from minilm.quantize import dequantized as kept_as_floats
from minilm.ranges import AT_LEAST_0, check
from minilm.trained import load_trained
from minilm.transformer import Transformer

QUESTION = [{"role": "user", "content": "Hello"}]


def main(model: Path | None = None, prompt: str = "The ", tokens: int = 300,
         temperature: float = 0.8, top_k: int | None = 40, top_p: float | None = 0.95,
         seed: int = 0, adapter: Path | None = None, dequantized: float | None = None,
         chat: bool = False, system: str = "", given: Given = frozenset()):
    """Let a trained model write.

    Args:
        model: Hugging Face folder with a tokenizer.json; by default the one that the adapter names,
            or without an adapter the newest runs/*/model.
        prompt: the text to go on from; an empty one starts a new document.
        tokens: how many to sample, or for an answer; fewer if the model ends the document.
        temperature: 1 samples as the model was trained, less gives likelier text, 0 the likeliest.
        top_k: sample among the k likeliest tokens.
        top_p: sample among the fewest tokens whose probabilities reach p.
        seed: of the samples.
        adapter: folder of an adapter for the model: PEFT's, or one that finetune.py left.
        dequantized: MB of a few-bit model's weights to keep as floats; no adapter is merged then.
        chat: hold a conversation.
        system: its system message, which says how the model shall answer.
        given: names of the options on the command line.
    """
    refuse_unused(given, ["prompt"] if chat else ["system"],
                  f"this is {'a' if chat else 'no'} conversation")
    if tokens < 0:
        raise ValueError(f"tokens must not be negative, got {tokens}")
    if temperature == 0:
        refuse_unused(given, ("top_k", "top_p", "seed"), "temperature 0 takes the likeliest token")
    prompt = utf8("prompt", prompt)
    tune_allocator()
    folder, transformer = load_trained(model, adapter, merge=dequantized is None)
    use_huge_pages(tensor.data for _, tensor in transformer.named_tensors())
    tokenizer, V = load_tokenizer(folder / "tokenizer.json"), transformer.config.vocab_size
    bos, eos, _ = transformer.ends
    first = tokenizer.end if bos is None or bos >= V else bos
    ends = [id for id in eos if id < V] or [tokenizer.end]
    with keeping(transformer, dequantized):
        if chat:
            template = chat_of(folder, adapter, tokenizer)
            dialogue = Dialogue(transformer, temperature, top_k, top_p, seed)
            ends = {*ends, *template.closing()}
            return converse(dialogue, template, ends, tokens, utf8("system", system))
        before = tokenizer.prompt(prompt).tolist() or [first]
        drawn = stream(transformer, [before], temperature, top_k, top_p, seed)
        ids = takewhile(lambda id: id not in ends, (int(row[0]) for row in islice(drawn, tokens)))
        print(prompt, end="", flush=True)
        start = time.perf_counter()
        count = write(ids, tokenizer, before)
        speed = count / (time.perf_counter() - start)
    print(f"{many(count, 'token')}, {speed:,.0f} tokens/s", file=sys.stderr)


@contextmanager
def keeping(model: Transformer, megabytes: float | None):
    """Keep weights of few bits as floats inside the `with`, see quantize.dequantized."""
    if megabytes is None:
        yield
        return
    check({"dequantized": AT_LEAST_0}, dequantized=megabytes)
    with kept_as_floats(model, int(megabytes * 1e6)) as kept:
        use_huge_pages(kept.values())
        size = sum(floats.nbytes for floats in kept.values()) / 1e6
        print(f"{many(len(kept), 'weight')} kept as floats, {size:.2f} MB", file=sys.stderr)
        yield


def chat_of(folder: Path, adapter: Path | None, tokenizer: Tokenizer) -> Chat:
    """The adapter's chat template, or else the model's. ValueError if there is none."""
    templates = (adapter and read_templates(adapter)) or read_templates(folder)
    if not templates:
        raise ValueError(f"{adapter or folder} has no chat template, so nothing says how a "
                         "conversation was written in its training: teach it with finetune.py, or "
                         "put the template that it was taught with there as chat_template.jinja")
    return load_chat(folder, tokenizer, templates)


def converse(dialogue: Dialogue, chat: Chat, ends: Collection[int], most: int, system: str):
    """Read messages and answer them until the input ends. An answer has at most `most` tokens."""
    rules = [{"role": "system", "content": system}] if system else []
    messages, context = rules, dialogue.model.room
    if system:
        chat.text(messages + QUESTION)  # a template that takes no such message says so now
    while (message := ask()) is not None:
        if not message.strip():
            continue
        asked = [{"role": "user", "content": message}]
        try:
            before = chat.prompt(messages + asked)
            if len(before) > context and messages != rules:
                say(f"the context of {context} tokens is full: the conversation begins anew")
                messages, before = rules, chat.prompt(rules + asked)
            if len(before) > context:
                raise ValueError(f"the message takes {len(before)} tokens, but the model's context "
                                 f"is {context}")
            said = answer(dialogue, before, chat.tokenizer, ends, most)
        except KeyboardInterrupt:  # before the answer began
            print()
        except ValueError as error:
            say(error)
        else:
            messages = [*messages, *asked, {"role": "assistant", "content": said}]


def ask() -> str | None:
    """The next message; None at the end of the input, and after Ctrl-C."""
    try:
        return utf8("the message", input("> "))
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def say(words):
    """Tell what is not the model's."""
    print(words, file=sys.stderr)


def answer(dialogue: Dialogue, before, tokenizer: Tokenizer, ends: Collection[int],
           most: int) -> str:
    """Print the answer as it is made; returns it, or what there is of it after Ctrl-C."""
    said, why = [], f"stopped after {many(most, 'token')}, see --tokens"

    def drawn():
        nonlocal why
        for id in islice(dialogue.answer(before), most):
            if id in ends:
                why = ""
                return
            said.append(id)
            yield id
        if len(said) < most:
            why = f"the context of {dialogue.model.room} tokens is full"

    try:
        write(drawn(), tokenizer, before.tolist())
        if why:
            say(why)
    except KeyboardInterrupt:
        print()
    return tokenizer.decode(said)


def write(ids: Iterable[int], tokenizer: Tokenizer, before: list[int]) -> int:
    """Print the text of ids, which follow `before`, as they come; returns how many came.

    If the bytes of a character span tokens, it is printed with the last of them.
    """
    new, count = [], 0

    def text():  # of the new ids; a token's text may depend on the token before it
        return tokenizer.decode(before + new)[len(tokenizer.decode(before)) :]

    for id in ids:
        new.append(id)
        count += 1
        piece = text()
        if piece and not piece.endswith("\ufffd"):  # what an incomplete character decodes to
            print(printable(piece), end="", flush=True)
            before, new = new, []
    print(printable(text()))
    return count


if __name__ == "__main__":
    command(main)
