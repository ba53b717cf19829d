"""The chunked loss: the numbers and gradients of the naive one, without its memory."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from flextron_trainer.losses import HeadLoss, Teacher, chunked_loss
from modeling_flextron.elastic import ElasticLinear


def naive(hidden, weight, targets, teacher_hidden, teacher_weight, kd_weight, ce_weight, temperature):
    student, loss = hidden @ weight.T, 0.0
    if teacher_hidden is None or ce_weight:
        loss = ce_weight * F.cross_entropy(student, targets)
    if teacher_hidden is not None:
        teacher = (teacher_hidden @ teacher_weight.T / temperature).log_softmax(-1)
        kl = F.kl_div((student / temperature).log_softmax(-1), teacher, log_target=True, reduction="batchmean")
        loss = loss + kd_weight * temperature**2 * kl
    return loss


def inputs(tokens=37, hidden=12, vocabulary=50, teacher=9):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return (
        draw(tokens, hidden).requires_grad_(),
        draw(vocabulary, hidden).requires_grad_(),
        torch.randint(0, vocabulary, (tokens,), generator=generator),
        draw(tokens, teacher),
        draw(vocabulary, teacher),
    )


@pytest.mark.parametrize("chunk_size", [1, 10, 37, 100])
@pytest.mark.parametrize(
    ("with_teacher", "kd_weight", "ce_weight", "temperature"),
    [(False, 1.0, 1.0, 1.0), (True, 1.0, 0.0, 1.0), (True, 0.7, 0.3, 1.0), (True, 1.0, 0.5, 2.5)],
)
def test_value_and_gradients(chunk_size, with_teacher, kd_weight, ce_weight, temperature):
    hidden, weight, targets, teacher_hidden, teacher_weight = inputs()
    teacher = Teacher(teacher_hidden, teacher_weight) if with_teacher else None
    states = (teacher_hidden, teacher_weight) if with_teacher else (None, None)
    expected = naive(hidden, weight, targets, *states, kd_weight, ce_weight, temperature)
    gradients = torch.autograd.grad(expected * 3, (hidden, weight))
    found = chunked_loss(
        hidden, weight, targets, teacher=teacher, kd_weight=kd_weight,
        ce_weight=ce_weight, temperature=temperature, chunk_size=chunk_size,
    )  # fmt: skip
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(found * 3, (hidden, weight)), gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tokens", [43, 57])
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_a_teacher_with_fewer_or_more_tokens(tokens, ce_weight):
    """The KL is that of the tokens that both have, renormalised; others get no gradient from it."""
    hidden, weight, targets, teacher_hidden, _ = inputs()
    teacher_weight = torch.randn(tokens, 9, dtype=torch.float64)
    common = min(50, tokens)
    expected = naive(
        hidden, weight[:common], targets, teacher_hidden, teacher_weight[:common], 1.0, 0.0, 2.0
    ) + ce_weight * F.cross_entropy(hidden @ weight.T, targets)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    found = chunked_loss(
        hidden, weight, targets, teacher=Teacher(teacher_hidden, teacher_weight), ce_weight=ce_weight,
        temperature=2.0, chunk_size=10,
    )  # fmt: skip
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(found, (hidden, weight)), gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_normalizer_and_missing_targets():
    hidden, weight, targets, *_ = inputs()
    one = chunked_loss(hidden, weight, targets, ce_weight=1.0)
    torch.testing.assert_close(chunked_loss(hidden, weight, targets, ce_weight=1.0, normalizer=74), one * 37 / 74)
    nothing = chunked_loss(hidden[:0], weight, targets[:0], ce_weight=1.0)
    nothing.backward()
    assert nothing.item() == 0 and not weight.grad.any()


def test_only_the_gradients_that_are_wanted():
    hidden, weight, targets, *_ = inputs()
    chunked_loss(hidden, weight.detach(), targets, ce_weight=1.0).backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not chunked_loss(hidden, weight, targets, ce_weight=1.0).requires_grad


def test_on_a_head_it_shifts_ignores_and_slices():
    head, labels = ElasticLinear(12, 50, bias=False).double(), torch.randint(0, 50, (2, 7))
    labels[0, 3:] = -100
    states = torch.randn(2, 7, 8, dtype=torch.float64)  # narrower than the head
    loss = HeadLoss(labels, ce_weight=1.0)
    logits = states @ head.weight[:, :8].T
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss(states, head).double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(loss.hidden_states, states)
    teacher = Teacher(torch.randn(2, 7, 5, dtype=torch.float64), torch.randn(50, 5, dtype=torch.float64))
    assert HeadLoss(labels, teacher)(states, head) > 0
    own = Teacher(states, head.weight.detach()[:, :8])
    assert abs(HeadLoss(labels, own)(states, head).item()) < 1e-12


def test_a_replaced_head_is_refused():
    with pytest.raises(ValueError, match="plain output layer"):
        HeadLoss(torch.ones(1, 2, dtype=torch.long))(torch.ones(1, 2, 3), torch.nn.Linear(3, 4))


@pytest.mark.parametrize("normalizer", [2_000, 131_072])
def test_float16_keeps_small_gradients(normalizer):
    """As a GradScaler uses it: the factor on the loss keeps what 1 / tokens would push below float16."""
    hidden, weight, targets, teacher_hidden, teacher_weight = inputs(vocabulary=2000)
    exact = naive(hidden, weight, targets, teacher_hidden, teacher_weight, 1.0, 0.0, 1.0)
    expected = torch.autograd.grad(exact * len(targets) / normalizer, [hidden, weight])
    half = [tensor.detach().half().requires_grad_() for tensor in (hidden, weight)]
    teacher = Teacher(teacher_hidden.half(), teacher_weight.half())
    loss = chunked_loss(*half, targets, normalizer=normalizer, teacher=teacher)
    found = torch.autograd.grad(loss * 2.0**14, half)
    for a, b in zip(found, expected, strict=True):
        assert (a.float() / 2.0**14 - b).norm() / b.norm() < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_half_precision(dtype):
    hidden, weight, targets, teacher_hidden, teacher_weight = inputs()
    hidden, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight))
    teacher = Teacher(teacher_hidden.to(dtype), teacher_weight.to(dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        loss = chunked_loss(hidden, weight, targets, teacher=teacher)
    loss.backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == dtype == weight.grad.dtype
    exact = naive(hidden.double(), weight.double(), targets, teacher_hidden, teacher_weight, 1.0, 0.0, 1.0)
    assert abs(loss.item() / exact.item() - 1) < 0.05


def test_peak_memory_is_at_most_four_tenths_of_the_naive_loss():
    """Vocabulary 32k, 256 tokens, as in the benchmark; gradients equal to 1e-5."""
    torch.manual_seed(0)
    values = torch.randn(256, 256), 0.05 * torch.randn(32_000, 256)
    teacher = Teacher(torch.randn(256, 256), 0.05 * torch.randn(32_000, 256))
    targets = torch.randint(0, 32_000, (256,))
    peaks, results = {}, {}
    for name in ("naive", "chunked"):
        hidden, weight = (tensor.clone().requires_grad_() for tensor in values)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            if name == "naive":
                loss = naive(hidden, weight, targets, teacher.hidden_states, teacher.weight, 1.0, 0.0, 1.0)
            else:
                loss = chunked_loss(hidden, weight, targets, chunk_size=64, teacher=teacher)
            loss.backward()
        peaks[name], results[name] = peak_bytes(profile), (loss, hidden.grad, weight.grad)
    assert weight.numel() * 4 < peaks["chunked"] <= 0.4 * peaks["naive"], peaks
    for a, b in zip(results["chunked"], results["naive"], strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def peak_bytes(profile) -> int:
    """The most bytes that were allocated at the same time while a profile was taken."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))
