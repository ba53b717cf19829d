"""Distillation without the logits: forward KL and cross entropy, a chunk of tokens at a time.

The loss of one token with student logits s, teacher logits t, target y, and temperature T is

    kd_weight * T^2 * KL(softmax(t / T) || softmax(s / T))  -  ce_weight * log softmax(s)[y]

(forward KL on the logits alone: Minitron, arXiv 2407.14679, section 2.4; Nemotron Elastic, arXiv 2511.16664). Its
gradient in s is `kd_weight * T * (softmax(s / T) - softmax(t / T)) + ce_weight * (softmax(s) - onehot(y))`, so the
gradients in the hidden states and in the output weights are known as soon as a chunk's logits are, and neither
`[tokens, V]` logits nor their graph is kept. Where the teacher has more tokens or fewer, the softmaxes of the KL run
over those that both have, the first ones. N tokens, V vocabulary, D hidden.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from modeling_flextron.elastic import project
from modeling_flextron.errors import invalid

CHUNK_SIZE = 512  # tokens whose logits exist at the same time, unless somebody says otherwise
ROWS = 64  # of a chunk that are normalised at the same time

IGNORED = -100


def targets_of(labels: torch.Tensor) -> torch.Tensor:
    """Shift labels `[B, S]`: every position is to predict the label after it, and nothing at the end."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


@dataclass(frozen=True)
class Teacher:
    """The teacher's part of a batch: its last hidden states `[..., Dt]` and its output weights `[Vt, Dt]`."""

    hidden_states: torch.Tensor
    weight: torch.Tensor

    def at(self, chosen: Any) -> "Teacher":
        """The part of some tokens, which an index or a mask chooses."""
        return Teacher(self.hidden_states[chosen], self.weight)

    def prepared(self, vocab_size: int, dtype: torch.dtype) -> "Teacher":
        """For products in a dtype, of tokens that a student with so many has, too."""
        return Teacher(self.hidden_states, self.weight[:vocab_size].to(dtype))

    def foretold(self, part: slice, temperature: float) -> "Probabilities":
        """What the teacher predicts at some of the tokens."""
        log_probabilities = self.log_probabilities(part, temperature)
        probabilities = log_probabilities.exp()
        return Probabilities(probabilities, probabilities.flatten().dot(log_probabilities.flatten()))

    def log_probabilities(self, part: slice, temperature: float) -> torch.Tensor:
        """Of all tokens `[n, Vt]`, at some of the tokens of the text."""
        logits = F.linear(self.hidden_states[part].to(self.weight.dtype), self.weight).float()
        return _normalize(logits.div_(temperature))


@dataclass(frozen=True)
class Probabilities:
    """Probabilities of tokens `[n, V]`, and the sum of `p log p`."""

    values: torch.Tensor
    negative_entropy: torch.Tensor

    @property
    def vocab_size(self) -> int:
        """How many tokens they are of."""
        return self.values.shape[-1]

    def dot(self, log_probabilities: torch.Tensor) -> torch.Tensor:
        """The sum of `p log q`, of a student's `log q` `[n, V]`."""
        return self.values.flatten().dot(log_probabilities.flatten())

    def subtract_from(self, probabilities: torch.Tensor) -> torch.Tensor:
        """`q - p`, in place of `q`."""
        return probabilities.sub_(self.values)


@dataclass(frozen=True)
class SampledTeacher:
    """Tokens drawn from what a teacher predicts, which on average give its loss and the gradient of it.

    With the share that each token has of the draws in place of its probability, the KL divergence and its gradient in
    the student's logits are linear in what was drawn, so the expectation is exact (arXiv 2503.16870); the most likely
    tokens alone would make them seem more likely than they are. N tokens of text, U drawn at most at one of them.

    Args:
        ids: Drawn tokens `[..., U]`, each once.
        shares: Of the draws `[..., U]`, 0 for none.
        entropies: Of what was drawn from, in nats, `[...]`.
        vocab_size: Of what was drawn from.
    """

    ids: torch.Tensor
    shares: torch.Tensor
    entropies: torch.Tensor
    vocab_size: int

    def at(self, chosen: Any) -> "SampledTeacher":
        """The part of some tokens, which an index or a mask chooses."""
        return SampledTeacher(self.ids[chosen], self.shares[chosen], self.entropies[chosen], self.vocab_size)

    def prepared(self, vocab_size: int, dtype: torch.dtype) -> "SampledTeacher":
        """Itself: there are no products."""
        return self

    def foretold(self, part: slice, temperature: float) -> "SampledTeacher":
        """What was drawn at some of the tokens, at this temperature."""
        return self.at(part)

    @property
    def negative_entropy(self) -> torch.Tensor:
        """The sum of `p log p`."""
        return -self.entropies.sum()

    def dot(self, log_probabilities: torch.Tensor) -> torch.Tensor:
        """As `Probabilities.dot`."""
        return log_probabilities.gather(-1, self.ids).mul_(self.shares).sum()

    def subtract_from(self, probabilities: torch.Tensor) -> torch.Tensor:
        """As `Probabilities.subtract_from`."""
        return probabilities.scatter_add_(-1, self.ids, -self.shares)


@dataclass
class HeadLoss:
    """A loss on hidden states, for the `head_loss` argument of `FlextronForCausalLM.forward`.

    Args:
        labels: Ids `[B, S]`; position i is trained to predict `labels[:, i + 1]`, where that is not -100.
        teacher: Distil from it, `[B, S]` tokens; None for cross entropy alone.
        kd_weight: Weight of the KL divergence.
        ce_weight: Weight of the cross entropy.
        temperature: T above.
        chunk_size: Tokens whose logits exist at the same time.
        normalizer: What the sum over tokens is divided by; None for the number of target tokens.
    """

    labels: torch.Tensor
    teacher: Teacher | SampledTeacher | None = None
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 1.0
    chunk_size: int = CHUNK_SIZE
    normalizer: torch.Tensor | float | None = None
    hidden_states: torch.Tensor | None = field(default=None, init=False)  # of the last call, for in-place distillation

    @torch.compiler.disable  # tokens are picked by their labels, at which a graph would end, and begin again after
    def __call__(self, hidden_states: torch.Tensor, head: Any) -> torch.Tensor:
        """The loss of hidden states `[B, S, D]` under an output layer."""
        if not hasattr(head, "leading"):
            rule = "The chunked loss needs the plain output layer of the model, not a replacement."
            remedy = "Leave `lm_head` out of the adapters or the quantization."
            raise invalid("lm_head", type(head).__name__, rule, remedy)
        self.hidden_states = hidden_states.detach()
        if hasattr(head, "unshard"):  # FSDP gathers it in its forward pass or that of the last norm: a row has its own
            head.unshard()
        weight, _ = head.leading(hidden_states.shape[-1])
        targets = targets_of(self.labels).to(hidden_states.device)
        valid = targets != IGNORED
        return chunked_loss(
            hidden_states[valid],
            weight,
            targets[valid],
            teacher=None if self.teacher is None else self.teacher.at(valid),
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            temperature=self.temperature,
            chunk_size=self.chunk_size,
            normalizer=self.normalizer,
        )


@dataclass
class RowScores:
    """How well the rows of a batch are foretold, for the `head_loss` argument of `FlextronForCausalLM.forward`.

    Args:
        labels: Ids `[B, S]`, as in `HeadLoss`.
        chunk_size: Tokens whose logits exist at the same time.

    Attributes:
        rows: `[B, 3]` of the last call, for every row: the sum of its losses in nats, how many of its tokens the most
            likely guess was, and how many tokens count.
    """

    labels: torch.Tensor
    chunk_size: int = CHUNK_SIZE
    rows: torch.Tensor | None = field(default=None, init=False)

    @torch.compiler.disable  # as `HeadLoss`
    @torch.no_grad()
    def __call__(self, hidden_states: torch.Tensor, head: Any) -> torch.Tensor:
        """The mean loss of a token, of hidden states `[B, S, D]` under an output layer; NaN where no token counts."""
        targets = targets_of(self.labels).to(hidden_states.device)
        row, place = (targets != IGNORED).nonzero(as_tuple=True)
        self.rows = torch.zeros(len(targets), 3, device=hidden_states.device)
        for start in range(0, len(row), self.chunk_size):
            part = slice(start, start + self.chunk_size)
            logits = project(head, hidden_states[row[part], place[part]], None).float()
            wanted = targets[row[part], place[part]]
            nats = logits.logsumexp(-1) - logits.gather(-1, wanted[:, None])[:, 0]
            right = (logits.argmax(-1) == wanted).float()
            self.rows.index_add_(0, row[part], torch.stack([nats, right, torch.ones_like(nats)], dim=-1))
        nats, _, tokens = self.rows.sum(dim=0)
        return nats / tokens


def chunked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    teacher: Teacher | SampledTeacher | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
    normalizer: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """The loss above, summed over tokens and divided by `normalizer`; differentiable in `hidden` and `weight`.

    Args:
        hidden: `[N, D]`.
        weight: `[V, D]`.
        targets: `[N]` ids.
        teacher: Of N tokens; None for cross entropy alone.
        normalizer: None for N.
    """
    if len(targets) == 0:
        return hidden.sum() * 0.0 + weight.sum() * 0.0
    scale = torch.as_tensor(1.0 / len(targets) if normalizer is None else 1.0 / normalizer, device=hidden.device)
    return _ChunkedLoss.apply(hidden, weight, targets, teacher, kd_weight, ce_weight, temperature, chunk_size, scale)


class _ChunkedLoss(torch.autograd.Function):
    """Computes both gradients in the forward pass, where a chunk's logits are at hand."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, teacher, kd_weight, ce_weight, temperature, chunk, scale):
        compute = _compute_dtype(hidden)
        weight_c = weight.to(compute)
        teacher = None if teacher is None else teacher.prepared(len(weight), compute)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), chunk):
                part = slice(start, start + chunk)
                # Before the student's logits exist: two arrays of [chunk, V], never three.
                wanted = None if teacher is None else teacher.foretold(part, temperature)
                states = hidden[part].to(compute)
                logits = F.linear(states, weight_c).float()
                value, slope = _loss_and_slope(logits, targets[part], wanted, kd_weight, ce_weight, temperature)
                loss += value
                if not (wants_hidden or wants_weight):
                    continue
                del wanted, logits
                slope = slope.to(compute)  # not scaled yet: 1 / tokens of a slope is too small for float16
                if wants_hidden:
                    grad_hidden[part] = slope @ weight_c
                if wants_weight:
                    grad_weight = _add_product(grad_weight, slope, states)
                del slope  # before the logits of the next chunk
        ctx.save_for_backward(grad_hidden, grad_weight, scale)
        ctx.weight_dtype = weight.dtype
        return loss * scale

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight, scale = ctx.saved_tensors
        factor = grad_loss * scale
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * factor.float()).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(factor).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *(None,) * 7


def _add_product(total, slope, states):
    """`total + slope.T @ states` in float32, in place; None is a total of nothing."""
    if slope.dtype == torch.float32:
        return slope.T @ states if total is None else total.addmm_(slope.T, states)
    product = slope.T @ (states / len(states))  # a sum over a chunk may be too large for float16: take the mean
    return product.float().mul_(len(states)) if total is None else total.add_(product, alpha=len(states))


def _loss_and_slope(logits, targets, wanted, kd_weight, ce_weight, temperature):
    """Summed loss of a chunk and its gradient in the logits `[n, V]`, in place: the logits are used up."""
    if wanted is None:
        return _cross_entropy_and_slope(logits, targets, ce_weight)
    value, slope = 0.0, 0.0
    if ce_weight:
        value, slope = _cross_entropy_and_slope(logits.clone(), targets, ce_weight)
    logits[:, wanted.vocab_size :] = 0
    student = _normalize(logits[:, : wanted.vocab_size].div_(temperature))
    value += kd_weight * temperature**2 * (wanted.negative_entropy - wanted.dot(student))
    wanted.subtract_from(student.exp_()).mul_(kd_weight * temperature)
    return value, logits.add_(slope)


def _cross_entropy_and_slope(logits, targets, weight):
    rows = torch.arange(len(targets), device=targets.device)
    log_probabilities = _normalize(logits)
    value = -weight * log_probabilities[rows, targets].sum()
    slope = log_probabilities.exp_()
    slope[rows, targets] -= 1
    return value, slope.mul_(weight)


def _normalize(logits):
    """Logits to log-probabilities, in place, a few rows at a time: `logsumexp` makes a copy of what it reads."""
    for rows in logits.split(ROWS):
        rows.sub_(rows.logsumexp(dim=-1, keepdim=True))
    return logits


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of the products: that of autocast when it is on."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
