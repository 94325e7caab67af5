"""Time and memory of loading a model's folder, beside transformers, in fresh processes by turns.

    python scripts/bench/loading.py                 # about two minutes; needs the extra `peers`
    python scripts/bench/loading.py --rounds 3

The folders are made at random: a Llama of 12 layers, width 768 and 32000 tokens. The time is that
of load_model or from_pretrained, after imports and with the file in the system's cache: by the
clock, and as the work of a core, which a busy machine lengthens less. The memory is what the
process takes at its highest moment beyond what it took before: its own (anonymous), and as a user
sees it (resident: with the pages of mapped files). Median (lowest - highest).
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from minilm.interop import bitsandbytes, huggingface
from minilm.quantize import quantize_model
from minilm.transformer import Config, Transformer

CASES = {  # title -> (folder, dtype)
    "float32": ("float32", "float32"), "bfloat16 kept": ("bfloat16", "bfloat16"),
    "bfloat16 as float32": ("bfloat16", "float32"), "4 bits, NF4": ("nf4", "float32"),
    "8 bits, LLM.int8()": ("llm.int8", "float32")}
SIZE = dict(vocab_size=32000, context=1024, layers=12, heads=12, width=768, hidden=2048)


def main(rounds: int = 7, layers: int = 12):
    """Time and memory of loading a model's folder, beside transformers.

    Args:
        rounds: how often each of the two loads each folder.
        layers: of the model.
    """
    with tempfile.TemporaryDirectory() as place:
        write_folders(Path(place), Config.llama(**SIZE | {"layers": layers}))
        print("| folder | | MiB | seconds | of a core | own memory, MiB | resident, MiB |\n"
              + 7 * "|---" + "|")
        for title, (folder, dtype) in CASES.items():
            path = Path(place) / folder
            found = {"minilm": [], "transformers": []}
            for _ in range(rounds):
                for side, results in found.items():
                    results.append(measured(side, path, dtype))
            size = (path / "model.safetensors").stat().st_size / 2**20
            for side, results in found.items():
                cells = map(spread, zip(*results), (2, 2, 0, 0))
                print(f"| {title} | {side} | {size:.0f} | {' | '.join(cells)} |", flush=True)


def write_folders(place: Path, config: Config):
    """A model at random in each form."""
    model = Transformer(config)
    huggingface.save_model(model, place / "float32")
    huggingface.save_model(huggingface.load_model(place / "float32", "bfloat16"),
                           place / "bfloat16")
    for kind in ("nf4", "llm.int8"):
        quantized = quantize_model(huggingface.load_model(place / "float32"), kind)
        bitsandbytes.save_model(quantized, place / kind)


def measured(side: str, path: Path, dtype: str) -> list[float]:
    """[seconds, those of a core, MiB of its own, resident MiB] of one load in a new process."""
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, side, path, dtype],
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def spread(values, digits: int) -> str:
    """Median (lowest - highest)."""
    return (f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - "
            f"{max(values):.{digits}f})")


def load(side: str, path: str, dtype: str):
    """The process: load, and print what it took."""
    import threading
    import time

    if side == "minilm":
        from minilm.interop import load_model
        loader = load_model
    else:
        import os

        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        import transformers
        from transformers.models.llama import modeling_llama

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        quantized = "quantization_config" in json.loads((Path(path) / "config.json").read_text())
        if quantized:
            import bitsandbytes  # noqa: F401  it takes seconds, which are not loading's
        place = {"device_map": "cpu"} if quantized else {}

        def loader(path, dtype):
            return modeling_llama.LlamaForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), **place)
    stop, highest, before = threading.Event(), [0, 0], status()

    def watch():
        while not stop.wait(0.002):
            highest[:] = map(max, highest, status())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, busy = time.perf_counter(), time.process_time()
    model = loader(path, dtype)
    seconds = time.perf_counter() - start, time.process_time() - busy
    stop.set()
    watcher.join()
    highest[:] = map(max, highest, status())
    print(json.dumps([*seconds, *((h - b) / 1024 for h, b in zip(highest, before))]))
    del model


def status() -> tuple[int, int]:
    """KiB of this process: its own, and all that is resident."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[name].split()[0]) for name in ("RssAnon", "VmRSS"))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("minilm", "transformers"):
        load(*sys.argv[1:])
    else:
        from minilm.command import command

        command(main)
