"""A Llama of 110 million weights beside transformers and PEFT: the row `llama` of benchmark.py.

12 layers, width 768, 12 heads, hidden 2048, vocabulary 32,000, as in small published models, with
random weights. Both sides are what a user calls: `generate`, greedy, and a training step of LoRA.
A generator gives the seconds of a job each time it is asked (see contenders.py).
"""

import contextlib
import subprocess
import sys

import numpy as np
from contenders import CORES, RANK, timed

LAYERS, HEADS, WIDTH, HIDDEN, V, CONTEXT = 12, 12, 768, 2048, 32000, 1024
NEW, PROMPT = 32, 8  # tokens that are generated, and those in front of them
BATCH, T = 4, 128  # of the LoRA step
JOBS = {  # job -> (title, texts, dtype)
    "float32": (f"{NEW} tokens, float32", 1, "float32"),
    "bfloat16": (f"{NEW} tokens, bfloat16", 1, "bfloat16"),
    "eight": (f"{NEW} tokens of 8 texts, float32", 8, "float32"),
    "busy": (f"{NEW} tokens, float32, beside {CORES} busy processes", 1, "float32"),
    "lora": (f"LoRA step, {BATCH} x {T} tokens", BATCH, "float32"),
}


def tokens(*shape):
    return np.random.default_rng(0).integers(0, V, shape)


@contextlib.contextmanager
def busy(count):
    """So many processes that compute without end."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def our_llama(job):
    """Answers of this project."""
    from minilm.backend import tune_allocator, use_huge_pages
    from minilm.generate import generate
    from minilm.optim import AdamW
    from minilm.peft import add_lora
    from minilm.train import Trainer
    from minilm.transformer import Config, Transformer

    _, B, dtype = JOBS[job]
    tune_allocator()
    model = Transformer(Config.llama(V, CONTEXT, LAYERS, HEADS, WIDTH, HIDDEN))
    if job != "lora":
        prompt = tokens(B, PROMPT)
        model.eval().freeze().astype(dtype)
        use_huge_pages(t.data for _, t in model.named_tensors())
        yield from _timed(job, lambda: generate(model, prompt, NEW, temperature=0))
    add_lora(model, RANK, 2 * RANK, ("q", "v"))
    x, y = tokens(2, BATCH, T)
    with Trainer(model, AdamW(model.parameters(), 1e-3), CORES, processes=True) as trainer:
        yield from timed(lambda: trainer.step(0, (x, y)))


def their_llama(job):
    """Answers of transformers and PEFT."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    _, B, dtype = JOBS[job]
    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=CONTEXT, attn_implementation="sdpa",
        bos_token_id=None, eos_token_id=None, pad_token_id=0))
    if job != "lora":
        model.eval().to(getattr(torch, dtype))
        prompt = torch.from_numpy(tokens(B, PROMPT))
        seen = torch.ones_like(prompt)
        yield from _timed(job, lambda: model.generate(
            prompt, attention_mask=seen, max_new_tokens=NEW, do_sample=False))
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK,
                                             target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3,
                                  fused=True)
    x, y = torch.from_numpy(tokens(2, BATCH, T))

    def step():
        optimizer.zero_grad(set_to_none=True)
        logits = model(x).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    yield from timed(step)


def _timed(job, run):
    """Seconds of a run; the job "busy" runs beside others, which stop between the turns."""
    if job != "busy":
        yield from timed(run)
    while True:
        with busy(CORES):
            seconds = next(timed(run))
        yield seconds
