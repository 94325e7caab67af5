"""A training step of each method that PEFT has too: the row `methods` of benchmark.py.

Both sides train the same layers with the same settings. The other side is PEFT on the GPT-2 of
contenders.py. Prompts and prefixes need what only a model of transformers has, so for these two it
is PEFT on transformers' GPT-2 of the same size, with scaled_dot_product_attention. The context is
longer by the rows in front, so that all methods see a text of the same length.

A step of AdaLoRA is one with its orthogonal loss, on both sides. After each step the budget takes
in the gradients, and after each tenth it chooses what is kept.
"""

from contenders import CORES, RANK, timed

IN_FRONT = ("prompt", "prefix")
METHODS = ("dora", "adalora", "ia3", *IN_FRONT)
ROWS = 16  # in front of the text
BUDGET = dict(steps=10_000, warmup=0, final=0, every=10)
LEFT = 5  # of RANK, on average, when the budget is at its end
VECTORS = ("k", "v", "down")  # IA3's layers


def our_step(method, shape, threads):
    """Seconds of a step in this project."""
    from minilm.optim import AdamW
    from minilm.peft import Budget, Orthogonal
    from minilm.train import LabelLoss, Trainer

    model = our_model(method, shape)
    optimizer = AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.0)
    budget = Budget(model, optimizer, LEFT, **BUDGET) if method == "adalora" else None
    loss = Orthogonal(LabelLoss()) if budget else LabelLoss()
    with Trainer(model, optimizer, CORES, processes=not threads, loss=loss) as trainer:
        def step():
            trainer.step(0, shape.tokens())
            if budget:
                budget.step(optimizer.steps)
        yield from timed(step)


def our_model(method, shape):
    """A GPT-2 with the method on it."""
    from minilm import peft
    from minilm.transformer import Config, Transformer

    s, front = shape, ROWS * (method in IN_FRONT)
    model = Transformer(Config.gpt2(s.vocab, s.context + front, s.layers, s.heads, s.width))
    return {
        "dora": lambda: peft.add_dora(model, RANK, 2 * RANK, ("q", "v")),
        "adalora": lambda: peft.add_adalora(model, RANK, 2 * RANK, ("q", "v")),
        "ia3": lambda: peft.add_ia3(model, VECTORS),
        "prompt": lambda: peft.add_prompt(model, ROWS),
        "prefix": lambda: peft.add_prefix(model, ROWS),
    }[method]()


def their_step(method, shape):
    """Seconds of a step in PEFT."""
    import torch

    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    model = their_model(method, shape)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0, fused=True)
    tokens, targets = map(torch.from_numpy, shape.tokens())
    steps = 0

    def step():
        nonlocal steps
        steps += 1
        optimizer.zero_grad(set_to_none=True)
        if method in IN_FRONT:
            logits = model(tokens).logits[:, -shape.context:]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        else:
            loss = model(tokens, targets).loss  # PEFT adds AdaLoRA's orthogonal loss to it
        loss.backward()
        optimizer.step()
        if method == "adalora":
            model.base_model.update_and_allocate(steps)
        return loss.item()

    yield from timed(step)


def their_model(method, shape):
    """The same in PEFT."""
    from peft import get_peft_model

    base = transformers_gpt2(shape) if method in IN_FRONT else with_loss(shape)
    return get_peft_model(base, settings(method))


def settings(method):
    """PEFT's configuration of a method."""
    import peft

    low_rank = dict(lora_alpha=2 * RANK, target_modules=["q", "v"])
    front = dict(task_type="CAUSAL_LM", num_virtual_tokens=ROWS)
    return {
        "dora": lambda: peft.LoraConfig(r=RANK, use_dora=True, **low_rank),
        "adalora": lambda: peft.AdaLoraConfig(
            init_r=RANK, target_r=LEFT, total_step=BUDGET["steps"], tinit=BUDGET["warmup"],
            tfinal=BUDGET["final"], deltaT=BUDGET["every"], orth_reg_weight=0.1, **low_rank),
        "ia3": lambda: peft.IA3Config(target_modules=list(VECTORS), feedforward_modules=["down"]),
        "prompt": lambda: peft.PromptTuningConfig(**front),
        "prefix": lambda: peft.PrefixTuningConfig(**front),
    }[method]()


def with_loss(shape):
    """The GPT-2 of contenders.py with an answer that has a loss, which PEFT's AdaLoRA looks for."""
    from types import SimpleNamespace

    import torch
    from contenders import torch_gpt

    class WithLoss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gpt = torch_gpt(shape, fused=False)

        def forward(self, tokens, targets):
            logits = self.gpt(tokens).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
            return SimpleNamespace(loss=loss)

    return WithLoss()


def transformers_gpt2(shape):
    """transformers' GPT-2 of the same size, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        vocab_size=shape.vocab, n_positions=shape.context + ROWS, n_embd=shape.width,
        n_layer=shape.layers, n_head=shape.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        attn_implementation="sdpa", use_cache=False))
