"""Let a trained model write.

    python scripts/generate.py                      # with the newest model under runs/
    python scripts/generate.py --model runs/pretrain-1/model --prompt "The " --temperature 0.5
    python scripts/generate.py --model runs/pretrain-1/model \\
        --adapter runs/finetune-lora-1/adapter --temperature 0 --prompt $'Reverse\\nminilm\\n-> '

Prints the prompt and what the model writes after it, as it is sampled, then the speed. The model is
the Hugging Face folder of a causal model, with its tokenizer.json. It stops at the ends that the
folder names (eos_token_id), or else at the tokenizer's.
"""

import sys
import time
from collections.abc import Iterable
from itertools import islice, takewhile
from pathlib import Path

from minilm.backend import tune_allocator
from minilm.command import Given, command, utf8
from minilm.data import Tokenizer, load_tokenizer, printable
from minilm.generate import stream
from minilm.interop import huggingface, peft
from minilm.loop import refuse_unused
from minilm.peft import merge_lora, unload_lora
from minilm.run import newest_model


def main(model: Path | None = None, prompt: str = "The ", tokens: int = 300,
         temperature: float = 0.8, top_k: int | None = 40, top_p: float | None = 0.95,
         seed: int = 0, adapter: Path | None = None, given: Given = frozenset()):
    """Let a trained model write.

    Args:
        model: Hugging Face folder with a tokenizer.json; by default the one that the adapter names,
            or without an adapter the newest runs/*/model.
        prompt: the text to go on from; an empty one starts a new document.
        tokens: how many to sample; fewer if the model ends the document.
        temperature: 1 samples as the model was trained, less gives likelier text, 0 the likeliest.
        top_k: sample among the k likeliest tokens.
        top_p: sample among the fewest tokens whose probabilities reach p.
        seed: of the samples.
        adapter: PEFT folder of an adapter for the model.
        given: names of the options on the command line.
    """
    if tokens < 0:
        raise ValueError(f"tokens must not be negative, got {tokens}")
    if temperature == 0:
        refuse_unused(given, ("top_k", "top_p", "seed"), "temperature 0 takes the likeliest token")
    prompt = utf8("prompt", prompt)
    tune_allocator()
    folder = model or (base_folder(adapter) if adapter else newest_model(Path("runs")))
    if not model:
        print(f"{folder}:", file=sys.stderr)
    elif adapter and Path(peft.base_of(adapter) or model).absolute() != model.absolute():
        print(f"{adapter} was made for {peft.base_of(adapter)}", file=sys.stderr)
    transformer = huggingface.load_model(folder).eval()
    if not transformer.config.causal:
        raise ValueError(f"{folder} fills in masked tokens; only a causal model writes on")
    if adapter:
        unload_lora(merge_lora(peft.load_adapter(transformer, adapter)))
    tokenizer, V = load_tokenizer(folder / "tokenizer.json"), transformer.config.vocab_size
    bos, eos, _ = transformer.ends
    first = tokenizer.end if bos is None or bos >= V else bos
    ends = [id for id in eos if id < V] or [tokenizer.end]
    before = tokenizer.prompt(prompt).tolist() or [first]
    drawn = stream(transformer, [before], temperature, top_k, top_p, seed)
    ids = takewhile(lambda id: id not in ends, (int(row[0]) for row in islice(drawn, tokens)))
    print(prompt, end="", flush=True)
    start = time.perf_counter()
    count = write(ids, tokenizer, before)
    speed = count / (time.perf_counter() - start)
    print(f"{count} tokens, {speed:,.0f} tokens/s", file=sys.stderr)


def base_folder(adapter: Path) -> Path:
    """The folder of the model that the adapter is for."""
    base = peft.base_of(adapter)
    if not base or not Path(base).is_dir():
        named = f"names {base!r}, which is no folder here" if base else "does not name its model"
        raise ValueError(f"{adapter} {named}: give --model")
    return Path(base)


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
