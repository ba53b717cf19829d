"""The surrogate and the static router, on made-up losses whose best networks are known."""

import random

import pytest
import torch
from helpers import elastic_of

from flextron_trainer.routers import ExpectedCost, Places, StaticRouter, Surrogate, learn_router
from flextron_trainer.search import Choices, fill, non_embedding, random_choices, search
from modeling_flextron import kv_cache_bytes, weight_bytes


@pytest.fixture(scope="module")
def config():
    """Of a model with wide choices in its MLPs, and all axes."""
    return elastic_of("gqa-wide-heads", mlp=[1, 0.75, 0.5, 0.25]).config


def drawn(config, count, seed=0):
    generator = random.Random(seed)
    return [random_choices(config, generator) for _ in range(count)]


def late_layers(sub) -> float:
    """A loss that falls with the neurons of late layers, fast at first."""
    return 3 - sum((layer + 1) * (1 - 2.718 ** (-mlp / 48)) for layer, mlp in zip(sub.layers, sub.mlp, strict=True)) / 8


def test_choices_are_encoded_and_decoded(config):
    places = Places(config)
    for choices in drawn(config, 20):
        flat = places.encode(choices)
        assert flat.sum() == len(places.counts) and places.decode(flat) == choices
        kept = places.keep(flat[None])[0]
        assert tuple(kept.nonzero().flatten().tolist()) == config.kept_layers(choices.depth)


def test_what_dropped_layers_would_have_is_not_seen(config):
    places = Places(config)
    surrogate = Surrogate(places)
    one = Choices(64, 2, (96,) * 4, (8,) * 4)
    dropped = next(layer for layer in range(4) if layer not in config.kept_layers(2))
    other = Choices(64, 2, tuple(24 if i == dropped else 96 for i in range(4)), (8,) * 4)
    flat = torch.stack([places.encode(one), places.encode(other)])
    assert torch.equal(*surrogate.features(flat))


@pytest.mark.parametrize("variant", ["mha-tied-biased", "gqa-wide-heads", "gpt2", "neox"])
def test_expected_costs_are_exact_for_real_networks_and_have_gradients(variant):
    config = elastic_of(variant).config
    places = Places(config)

    def memory(sub):
        return weight_bytes(config, sub) + kv_cache_bytes(config, sub, 100)

    for cost in (non_embedding(config), memory):
        expected = ExpectedCost(places, cost)
        some = drawn(config, 20)
        flat = torch.stack([places.encode(choices) for choices in some]).requires_grad_()
        exact = torch.tensor([float(cost(choices.subnetwork(config))) for choices in some])
        torch.testing.assert_close(expected(flat), exact, rtol=1e-5, atol=1)
        expected(flat).sum().backward()
        assert flat.grad.isfinite().all() and flat.grad.abs().sum() > 0


def test_the_surrogate_learns_and_says_how_well(config):
    places, torch_noise = Places(config), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    some = drawn(config, 250)
    flat = torch.stack([places.encode(choices) for choices in some])
    losses = torch.tensor([late_layers(choices.subnetwork(config)) for choices in some])
    surrogate = Surrogate(places)
    error = surrogate.fit(flat, losses, generator=torch_noise)
    others = drawn(config, 100, seed=1)
    predicted = surrogate(torch.stack([places.encode(choices) for choices in others])).detach()
    actual = torch.tensor([late_layers(choices.subnetwork(config)) for choices in others])
    outside = (predicted - actual).square().mean().sqrt() / actual.std()
    assert error < 0.25 and outside < 0.3
    chance = Surrogate(places).fit(flat, losses[torch.randperm(250)], generator=torch_noise)
    assert chance > 0.6  # nothing to learn, and it says so


def test_router_scores_change_gradually_between_anchors(config):
    router = StaticRouter(Places(config), smallest=0.2, anchors=5)
    at = router(torch.tensor([0.2, 0.4, 0.3])).detach()
    assert at.shape == (3, sum(Places(config).counts))
    assert (at[2] - at[0]).abs().max() < (at[1] - at[0]).abs().max() + 1e-6
    assert not torch.equal(at[0], at[1])


@pytest.mark.slow
def test_a_learned_router_keeps_budgets_and_finds_what_search_finds(config):
    cost, whole = non_embedding(config), config.parent_size()
    learned = learn_router(config, late_layers, cost, smallest=0.2, evaluations=200, rounds=3, steps=150, seed=0)
    assert len(learned.asked) == 200 and len(learned.errors) == 3 and learned.errors[-1] < 0.5
    assert all(loss == late_layers(sub) for sub, loss in learned.asked.items())
    generator = random.Random(0)
    for budget in (0.75, 0.5, 0.3):
        limit = budget * whole
        choices = learned.router.choose(budget, cost, limit)
        sub = choices.subnetwork(config)
        assert cost(sub) <= limit
        assert all(cost(step.subnetwork(config)) > limit for step in choices.steps(config, up=True))
        some = [fill(config, one, cost, limit, generator) for one in drawn(config, 30, seed=2)]
        chance = sorted(late_layers(one.subnetwork(config)) for one in some)
        best = search(config, late_layers, limit, evaluations=200)[1]
        assert late_layers(sub) < chance[3]  # better than nine of ten random ones
        assert late_layers(sub) < best + 0.25 * (chance[15] - best)
    again = learn_router(config, late_layers, cost, smallest=0.2, evaluations=200, rounds=3, steps=150, seed=0)
    budgets = torch.linspace(0.2, 1, 7)
    assert torch.equal(learned.router(budgets), again.router(budgets))  # the same seed, the same router


def test_a_surrogate_that_knows_nothing_does_not_move_the_router(config):
    noise = random.Random(0)
    options = {"smallest": 0.2, "evaluations": 60, "rounds": 1, "steps": 5}
    blind = learn_router(config, lambda sub: noise.random(), non_embedding(config), error_threshold=0.2, **options)
    untrained = learn_router(config, late_layers, non_embedding(config), error_threshold=0.0, **options)
    assert blind.errors[0] > 0.2
    assert torch.equal(blind.router(torch.tensor([0.5])), untrained.router(torch.tensor([0.5])))
