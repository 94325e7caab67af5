"""Distillation: a small student learns what a large teacher answers, not only what is right.

Hinton et al. 2015, arXiv:1503.02531. For logits v of the teacher and z of the student:

    p_i = exp(v_i / T) / sum_j exp(v_j / T), and q likewise from z          (1)
    dC/dz_i = (q_i - p_i) / T, for the cross-entropy C of q under p         (2)

A temperature T > 1 shows what the teacher thinks of the answers that it does not give. For large T,
logits with mean 0 and N classes the gradient is (z_i - v_i) / (N T^2) (4), so C is multiplied by
T^2. Here C is KL(p || q), which differs from the cross-entropy by p's entropy, a constant. The
reverse, KL(q || p), makes a student that would rather miss some of the teacher's answers than give
one that the teacher would not.

Sanh et al. 2019, arXiv:1910.01108 (DistilBERT), section 3: the student has every other layer of the
teacher and begins with their weights. It minimises a sum of three losses, with the weights of
DistilBERT's code:

    L = 5 L_ce + 2 L_mlm + 1 L_cos

    L_ce     soft     T^2 KL(p || q), mean over all tokens that are not padding
    L_mlm    hard     cross-entropy of the right tokens: masked ones, or the next ones
    L_cos    cosine   1 - cos between the last hidden states, over the same tokens as L_ce

Left out: a loss between attention maps or earlier layers.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from minilm import losses, ops
from minilm.arrays import by_rows, row_dot, row_sum, rows, wide
from minilm.backend import array_module
from minilm.graph import no_dropout
from minilm.nn import Linear
from minilm.ranges import AT_LEAST_0, POSITIVE, check, each, optional, whole
from minilm.tensor import Tensor, no_grad, op
from minilm.transformer import Transformer

IGNORED = -100
RANGES = {"temperature": POSITIVE, "weights": each(AT_LEAST_0)}


def distillation_loss(student_logits: Tensor, teacher_logits, targets, temperature: float = 2.0,
                      weights: tuple[float, float, float] = (5.0, 2.0, 1.0), hidden=None,
                      mask=None, masked_only: bool = False, reverse: bool = False,
                      totals=None) -> Tensor:
    """weights . (T^2 KL, cross-entropy, cosine loss): a scalar.

    student_logits: (B, T, V). teacher_logits: the same, as a Tensor or an array, or TopK of them;
    no gradient flows to the teacher. targets: integers (B, T), -100 where there is none. hidden:
    the student's and the teacher's last hidden states, (B, T, C) each; without them there is no
    cosine loss. mask (B, T): 0 for padding, which no loss counts. masked_only: take the KL only
    over tokens that have a target. reverse: KL(student || teacher). totals: (tokens, targets) of
    the whole batch, if this is a part of one. ValueError if shapes differ, the temperature is not
    positive, a weight is negative, or no loss has a weight; TypeError for what are no arrays.

    A student has nothing to learn from its own logits:

    >>> logits = Tensor([[[2.0, 0.0, 1.0]]], requires_grad=True)
    >>> loss = distillation_loss(logits, logits, np.array([[1]]), weights=(5, 0, 0))
    >>> loss.backward()
    >>> float(loss.data), logits.grad.tolist()
    (0.0, [[[0.0, 0.0, 0.0]]])
    """
    soft, hard, cosine = _checked(temperature, weights)
    if hidden is None and not soft + hard:
        raise ValueError(f"weights {tuple(weights)} leave only the cosine loss, and there are no "
                         "hidden states")
    for name, array in [("student_logits", student_logits), ("teacher_logits", teacher_logits),
                        ("targets", targets)]:
        if not hasattr(array, "shape") and not isinstance(array, TopK):
            raise TypeError(f"{name} must be an array, got {type(array).__name__}")
    if targets.shape != student_logits.shape[:-1]:
        raise ValueError(f"targets {targets.shape} do not go with logits {student_logits.shape}")
    targets = losses.of_text(targets, mask)
    tokens, labels = totals or (None, None)
    terms = []
    if soft:
        compared, total = (targets != IGNORED, labels) if masked_only else (mask, tokens)
        divergence = _soft_loss(student_logits, teacher_logits, temperature, compared, total,
                                reverse)
        terms.append(soft * temperature**2 * divergence)
    del teacher_logits  # frees them now, if the caller has let them go
    if hard:
        terms.append(hard * ops.cross_entropy(student_logits, targets, total=labels))
    if cosine and hidden is not None:
        ours, theirs = hidden
        terms.append(cosine * ops.cosine_embedding(ours, _constant(theirs), mask, tokens))
    return sum(terms[1:], terms[0])


def _soft_loss(student, teacher, temperature, mask, total, reverse) -> Tensor:
    """KL between the two distributions; the teacher's may be TopK."""
    if isinstance(teacher, TopK):
        if reverse:
            raise ValueError("the reverse KL needs all of the teacher's logits, not its top k")
        return top_k_divergence(student, *teacher, temperature=temperature, mask=mask, total=total)
    teacher = _constant(teacher)
    p, q = (student, teacher) if reverse else (teacher, student)
    return ops.kl_divergence(q, p, temperature=temperature, mask=mask, total=total)  # KL(p || q)


class TopK(NamedTuple):
    """A teacher's k likeliest tokens at one temperature: small enough to store."""

    ids: np.ndarray  # integers (..., k)
    log_p: np.ndarray  # (..., k), log softmax(logits / T)


def top_k(logits, k: int, temperature: float = 2.0) -> TopK:
    """TopK of logits (..., V), a Tensor or an array. ValueError if k is not 1 to V, or the
    temperature not positive.

    >>> ids, log_p = top_k(np.log([0.1, 0.2, 0.7]), k=1, temperature=1.0)
    >>> ids.tolist(), np.exp(log_p).round(6).tolist()
    ([2], [0.7])
    """
    logits = _constant(logits)
    xp, V = array_module(logits), logits.shape[-1]
    check({"k": whole(1, V), "temperature": POSITIVE}, k=k, temperature=temperature)

    def formula(z):
        log_p = ops.log_softmax(wide(z) / temperature).data  # eq. (1)
        ids = xp.argpartition(log_p, V - k, axis=-1)[..., V - k :]
        return ids.astype(np.int32), xp.take_along_axis(log_p, ids, -1)
    return TopK(*by_rows(formula, logits))


@op
def top_k_divergence(student, ids, log_p, temperature=1.0, mask=None, total=None):
    """KL(p || q) over k + 1 classes: the tokens in ids, and all others together as R.

        KL = sum_k p_k log(p_k / q_k) + p_R log(p_R / q_R)

    student: logits (..., V), q = softmax(student / T). ids, log_p: a TopK at the same T. mask,
    total: as in ops.kl_divergence. The value is at most kl_divergence's, and equals it at k = V.
    """
    if ids.shape != log_p.shape or ids.shape[:-1] != student.shape[:-1]:
        raise ValueError(f"top k ids {ids.shape} and log_p {log_p.shape} do not go with logits "
                         f"{student.shape}")
    share, V = losses.row_shares("top_k_divergence", student, mask, total), student.shape[-1]

    def formula(z, ids, log_p):
        xp, log_p = array_module(z), wide(log_p)
        p, at = xp.exp(log_p), (xp.arange(len(z))[:, None], ids)
        log_q = ops.log_softmax(wide(z) / temperature).data  # eq. (1)
        q = xp.exp(log_q)
        q_k, q[at] = q[at], 0  # q now holds the other tokens only
        tiny = np.finfo(q.dtype).tiny
        p_R = (1 - row_sum(p)).clip(0) * (ids.shape[-1] < V)
        q_R = row_sum(q).clip(tiny)
        kl = row_dot(p, log_p - log_q[at]) + p_R * xp.log(p_R.clip(tiny) / q_R)
        # dKL/dz_j = (q_j - p_j) / T, where p_j of the others is q_j p_R / q_R
        q -= q * (p_R / q_R)
        q[at] = q_k - p
        return kl[:, 0], q

    kl, gap = by_rows(formula, rows(student), rows(ids), rows(log_p))

    def dstudent(dy):
        gap[...] *= (share * (dy / temperature)).reshape(-1, 1)  # eq. (2)
        return gap.reshape(student.shape)
    return (kl * share.reshape(-1)).sum(), dstudent


class Distillation:
    """The loss of a student under its teacher, in the form that `Trainer` takes.

    A batch is tokens (B, T), targets (B, T), and perhaps a mask (B, T), 0 for padding. The soft and
    the cosine loss count every token that is not padding. Without a mask, a causal model's padding
    is what comes after the last target of a row, and a masked model has none. So text without
    targets, which the soft and the cosine loss can learn from, needs a mask.

    student, teacher: Transformers; the teacher may be adapted or quantized. It runs without dropout
    and without a graph. If their widths differ, the linear layer `project` takes the student's
    hidden states to the teacher's width; train its `parameters()` along with the student's.
    top_k: use only this many of the teacher's likeliest answers. Other arguments: as in
    distillation_loss. ValueError if the vocabularies differ, if only one of the two models sees the
    whole text (a causal student cannot learn what a masked teacher knows of what comes next), and
    for settings that make no loss.
    """

    def __init__(self, student: Transformer, teacher: Transformer, temperature: float = 2.0,
                 weights: tuple[float, float, float] = (5.0, 2.0, 1.0), masked_only: bool = False,
                 reverse: bool = False, top_k: int | None = None, seed: int = 0):
        _require_transformers(student, teacher)
        ours, theirs = student.config, teacher.config
        ours.require_language("the student")
        theirs.require_language("the teacher")
        if ours.vocab_size != theirs.vocab_size:
            raise ValueError(f"the student has a vocabulary of {ours.vocab_size} tokens, the "
                             f"teacher one of {theirs.vocab_size}")
        if ours.causal != theirs.causal:
            kinds = ["a causal model" if c.causal else "a masked model" for c in (ours, theirs)]
            raise ValueError(f"the student is {kinds[0]}, the teacher {kinds[1]}: they must see "
                             "the same of a text")
        check({"top_k": optional(whole(1, ours.vocab_size)), "seed": whole(0)}, top_k=top_k,
              seed=seed)
        _checked(temperature, weights)
        if top_k is not None and reverse:
            raise ValueError(f"the reverse KL needs all of the teacher's answers; got {top_k=}")
        self.teacher, self.temperature, self.weights = teacher, temperature, weights
        self.masked_only, self.reverse, self.top_k = masked_only, reverse, top_k
        self.project = None
        if ours.width != theirs.width and weights[2]:
            self.project = Linear(ours.width, theirs.width, np.random.default_rng(seed),
                                  bias=False, std=1 / math.sqrt(ours.width))

    def parameters(self) -> list[Tensor]:
        """The projection's, if there is one."""
        return self.project.parameters() if self.project else []

    def totals(self, tokens, targets, mask=None) -> tuple[int, int]:
        """(tokens that are not padding, targets that count). If no loss needs targets, the tokens
        stand for them."""
        counted = self._counted(targets, mask)
        n = targets.size if counted is None else int((counted != 0).sum())
        soft, hard, _ = self.weights
        labels = int((losses.of_text(targets, mask) != IGNORED).sum())
        return n, labels if hard or (soft and self.masked_only) else n

    def __call__(self, student, tokens, targets, mask=None, totals=None) -> Tensor:
        """distillation_loss on tokens (B, T): integers, as are the targets.

        totals: those of the whole batch, if this is a part of one.
        """
        with no_grad(), no_dropout():
            theirs = self.teacher.hidden(tokens, mask)
        ours, hidden, counted = student.hidden(tokens, mask), None, self._counted(targets, mask)
        if self.weights[2]:
            hidden = (self.project(ours) if self.project else ours), theirs
        # The logits get no names here, so that the loss can free them.
        return distillation_loss(student.logits(ours), self._answers(theirs),
                                 losses.of_text(targets, mask), self.temperature, self.weights,
                                 hidden, counted, self.masked_only, self.reverse, totals)

    def _counted(self, targets, mask):
        """The tokens that the soft and the cosine loss count: (B, T), or None for all."""
        if mask is not None or not self.teacher.config.causal:
            return mask
        # True from a row's first token to its last target
        return np.logical_or.accumulate((targets != IGNORED)[:, ::-1], axis=1)[:, ::-1]

    def _answers(self, hidden):
        with no_grad(), no_dropout():
            logits = self.teacher.logits(hidden)
        return top_k(logits, self.top_k, self.temperature) if self.top_k is not None else logits


def _require_transformers(*models):
    for model in models:
        if not isinstance(model, Transformer):
            raise TypeError("student and teacher must be Transformers; there is one "
                            f"{type(model).__name__}")


def student_from_teacher(teacher: Transformer, layers: Sequence[int] | None = None) -> Transformer:
    """A new model: copies of the teacher's blocks at `layers`, of its embeddings and of its head.

    layers: increasing numbers from 0; by default every other one. DistilBERT's are 0 2 4 7 9 11.
    If the teacher is adapted or quantized, the student gets plain weights that do the same. All of
    them train. ValueError if there are no layers, if they are not increasing or not the teacher's,
    and if an adapter acts that cannot be merged.

    >>> from minilm.transformer import Config
    >>> teacher = Transformer(Config.gpt2(vocab_size=50, context=16, layers=4, heads=2, width=8))
    >>> student = student_from_teacher(teacher, layers=[0, 3])
    >>> ours, theirs = student.blocks[1].mlp.up.weight.data, teacher.blocks[3].mlp.up.weight.data
    >>> bool((ours == theirs).all()), ours is theirs
    (True, False)
    """
    _require_transformers(teacher)
    depth = teacher.config.layers
    layers = list(range(0, depth, 2) if layers is None else layers)
    whole = all(isinstance(n, int | np.integer) and type(n) is not bool for n in layers)
    if not layers or not whole or layers != sorted({*layers} & {*range(depth)}):
        raise ValueError(f"layers must be increasing numbers from 0 to {depth - 1}, the teacher's; "
                         f"got {layers}")
    embedding, head = teacher.embed.plain().weight, teacher.head
    tied = teacher.config.tied
    if teacher.config.language:
        out = head.out if teacher.config.head == "masked" else head
        tied = out.plain().weight is embedding  # not if the head is adapted or quantized
    config = replace(teacher.config.of_layers(layers), tied=tied)
    student = Transformer(config).astype(embedding.dtype)
    student.ends, student.origin = teacher.ends, teacher.origin
    teacher.front.plain()  # ValueError for rows in front of the text
    theirs, state = dict(teacher.named_modules()), {}
    for path, _ in student.named_tensors():
        owner, _, name = path.rpartition(".")
        if owner.startswith("blocks."):
            _, block, rest = owner.split(".", 2)
            owner = f"blocks.{layers[int(block)]}.{rest}"
        state[path] = getattr(theirs[owner].plain(), name).data
    student.load_state_dict(state)
    return student.to(embedding.device)


def _constant(x):
    """The array of a Tensor or an array, so that no gradient flows back."""
    return x.data if isinstance(x, Tensor) else x


def _checked(temperature, weights) -> list[float]:
    """The weights; ValueError if they or the temperature make no loss."""
    check(RANGES, temperature=temperature, weights=weights)
    if len(weights) != 3 or not any(weights):
        raise ValueError("weights must be three numbers, not all 0: of KL, cross-entropy and "
                         f"cosine loss; got {weights}")
    return [float(w) for w in weights]
