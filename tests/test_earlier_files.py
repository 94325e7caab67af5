"""Files that earlier versions wrote still load, and mean what they meant.

tests/files/VERSION holds a folder of each kind, written by `python tests/test_earlier_files.py
FOLDER` of that version: Hugging Face folders of three families, an adapter, weights of 4 bits, what
each answered, and a run that was stopped after 4 of its 6 steps, with the weights it ended with.
"""

import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from minilm.interop import bitsandbytes, huggingface, peft
from minilm.peft import add_lora, trainable_parameters
from minilm.quantize import quantize_model
from minilm.run import RunDirectory
from minilm.tensorfiles import read_tensors, write_tensors
from minilm.transformer import Config, Transformer

VERSIONS = sorted((Path(__file__).parent / "files").iterdir())
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
SHAPE = dict(vocab_size=32, context=16, layers=2, heads=2, width=16, hidden=32)
STOPPED, STEPS = 4, 6


def models():
    return {name: Transformer(getattr(Config, name)(**SHAPE), seed=1)
            for name in ("gpt2", "llama", "bert")}


def write(folder):
    """The files that today's version writes."""
    answers = {}
    for name, model in models().items():
        huggingface.save_model(model, folder / name)
        answers[name] = model(TOKENS).data
    adapted, rng = add_lora(models()["llama"], 2, 4, ("q", "down")), np.random.default_rng(2)
    for p in trainable_parameters(adapted):
        p.data[...] = rng.standard_normal(p.shape) / 8
    peft.save_adapter(adapted, folder / "adapter")
    answers["adapter"] = adapted(TOKENS).data
    few_bits = quantize_model(models()["llama"], "nf4")
    bitsandbytes.save_model(few_bits, folder / "nf4")
    answers["nf4"] = few_bits(TOKENS).data
    write_tensors(folder / "answers.safetensors", answers)
    write_run(folder / "run")


def write_run(folder):
    """A run of pretrain.py as it was when it was stopped, and the weights that it ended with."""
    import pretrain

    text = "".join(f"Object {i} is a class, and {i} times two is {2 * i}.\n\n" for i in range(40))
    folder.mkdir()
    (folder / "text.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pretrain.main(pretrain.Settings(
            corpus=("text.txt",), layers=1, heads=2, width=8, context=16, batch=4, steps=STEPS,
            save_every=STOPPED, eval_every=2, sample=3, warmup=1, workers=1, threads=True),
            Path())
    run = folder / "pretrain-1"
    shutil.move(run / "model/model.safetensors", folder / "end.safetensors")
    for name in ("model", "checkpoints/step-00000006"):
        shutil.rmtree(run / name)
    (run / "loss.png").unlink(missing_ok=True)


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def folder(request):
    return request.param


def same(model, folder, name):
    expected = read_tensors(folder / "answers.safetensors")[name]
    np.testing.assert_allclose(model.eval()(TOKENS).data, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_models(folder, name):
    same(huggingface.load_model(folder / name), folder, name)


def test_an_adapter(folder):
    same(peft.load_adapter(huggingface.load_model(folder / "llama"), folder / "adapter"), folder,
         "adapter")


def test_weights_in_4_bits(folder):
    same(bitsandbytes.load_model(folder / "nf4"), folder, "nf4")


def test_a_run_goes_on_to_its_end(folder, tmp_path, monkeypatch):
    import pretrain

    shutil.copytree(folder / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    assert RunDirectory(Path("pretrain-1")).records()[-1]["step"] == STEPS
    with warnings.catch_warnings():  # another machine's BLAS, or other threads: hence the tolerance
        warnings.filterwarnings("ignore", "pretrain-1 cannot go on bit for bit", UserWarning)
        pretrain.main(resume=Path("pretrain-1"))
    ended = read_tensors(Path("pretrain-1/model/model.safetensors"))
    for name, expected in read_tensors(Path("end.safetensors")).items():
        np.testing.assert_allclose(ended[name], expected, atol=1e-5, rtol=0)
    steps = [r["step"] for r in RunDirectory(Path("pretrain-1")).records()]
    assert steps == list(range(1, STEPS + 1))


def test_todays_version_writes_such_a_folder(tmp_path):
    write(tmp_path)
    kept = {p.relative_to(VERSIONS[-1]) for p in VERSIONS[-1].rglob("*") if p.is_file()}
    assert {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()} == kept


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1] / "scripts"))
    write(Path(sys.argv[1]))
