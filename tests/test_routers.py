"""The surrogate and the static router, on made-up losses whose best networks are known."""

import copy
import random

import pytest
import torch
from helpers import elastic_of

from flextron_trainer.conversion.search import fill, random_candidate, search
from flextron_trainer.routers.surrogate import (
    ExpectedCost,
    Places,
    ScoreTable,
    Surrogate,
    SurrogateLearner,
    smallest_budget,
)
from modeling_flextron import FlextronConfig, FlextronForCausalLM
from modeling_flextron.static_router import CLOSE, Candidate, StaticRouter
from modeling_flextron.subnetwork import memory_of, parameters_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def fewer_updates(monkeypatch):
    """Of scores at the end of a run, which suffice for few layers."""
    monkeypatch.setattr("flextron_trainer.routers.surrogate.FINAL_UPDATES", 200)


@pytest.fixture(scope="module")
def config():
    """Of a model with wide choices in its MLPs, and all axes."""
    return elastic_of("gqa-wide-heads", mlp=[1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]).config


def drawn(config, count, seed=0, uniform=False):
    generator = random.Random(seed)
    return [random_candidate(config, generator, uniform) for _ in range(count)]


def late_layers(sub) -> float:
    """A loss that falls with the neurons of late layers, fast at first; hidden size and heads matter too."""
    mlp = sum((layer + 1) * (1 - 2.718 ** (-mlp / 48)) for layer, mlp in zip(sub.layers, sub.mlp, strict=True)) / 8
    return 3 - mlp - sub.hidden / 64 - sum(sub.heads) / 64


def learned(config, steps=60, loss=late_layers, finish=True, **options):
    cost = parameters_of(config, embeddings=False)
    learner = SurrogateLearner(
        config, cost, smallest_budget(config, cost), steps=steps, **{"latency_weight": 1.0, **options}
    )
    optimizer = torch.optim.Adam(learner.scores.parameters(), lr=0.1)
    for step in range(steps):
        take_step(learner, optimizer, step, loss)
    if finish:
        learner.finish()
    return learner


def take_step(learner, optimizer, step, loss):
    networks = learner.propose(step, 4)
    full = loss(learner.config.built)
    losses = torch.tensor([loss(one.subnetwork(learner.config)) - full for one in networks])
    learner.learn(step, networks, losses)
    objective = learner.objective(step)
    if objective is not None:
        optimizer.zero_grad()
        objective.backward(inputs=list(learner.scores.parameters()))
        optimizer.step()


def decoded(places: Places, flat) -> Candidate:
    """The candidate with the largest entries of `[C]`."""
    hidden, depth, *best = (s[int(part.argmax())] for s, part in zip(places.sizes, places.split(flat), strict=True))
    return Candidate(hidden, depth, tuple(best[: places.layers]), tuple(best[places.layers :]))


def test_choices_are_encoded(config):
    places = Places(config)
    for choices in drawn(config, 20):
        flat = places.encode(choices)
        assert flat.sum() == len(places.counts) and decoded(places, flat) == choices
        kept = places.keep(flat[None])[0]
        assert tuple(kept.nonzero().flatten().tolist()) == config.kept_layers(choices.depth)


@pytest.mark.parametrize("variant", ["mha-tied-biased", "gqa-wide-heads", "qwen2", "gpt2", "neox"])
def test_expected_costs_are_exact_for_real_networks_and_have_gradients(variant):
    config = elastic_of(variant).config
    places = Places(config)
    for cost in (parameters_of(config, embeddings=False), memory_of(config)):
        expected = ExpectedCost(places, cost)
        some = drawn(config, 20)
        flat = torch.stack([places.encode(choices) for choices in some]).requires_grad_()
        exact = torch.tensor([cost(choices.subnetwork(config)) / cost(config.built) for choices in some])
        torch.testing.assert_close(expected(flat), exact, rtol=1e-5, atol=1e-6)
        expected(flat).sum().backward()
        assert flat.grad.isfinite().all() and flat.grad.abs().sum() > 0


def test_the_surrogate_never_says_that_less_is_better(config):
    places, surrogate = Places(config), Surrogate(Places(config))
    torch.nn.init.normal_(surrogate.damage)
    for choices in drawn(config, 30):
        here = surrogate(places.encode(choices)[None])
        for step in choices.steps(config, up=True):
            assert surrogate(places.encode(choices.after(step))[None]) <= here


def test_what_dropped_layers_would_have_is_not_seen(config):
    places = Places(config)
    one = Candidate(64, 2, (96,) * 4, (8,) * 4)
    dropped = next(layer for layer in range(4) if layer not in config.kept_layers(2))
    other = Candidate(64, 2, tuple(24 if i == dropped else 96 for i in range(4)), (8,) * 4)
    assert torch.equal(*Surrogate(places).features(torch.stack([places.encode(one), places.encode(other)])))


def test_scores_change_gradually_and_survive_a_config(config):
    places = Places(config)
    table = ScoreTable(places, [0.2, 0.6, 1.0])
    torch.nn.init.normal_(table.table)
    low, high, middle = table(torch.tensor([0.2, 0.6, 0.4])).detach()
    torch.testing.assert_close(middle, (low + high) / 2)
    router = table.router()
    flat = torch.tensor([x for x in table(torch.tensor([0.35]))[0].tolist()])
    assert router.preferred(router.scores(0.35)) == decoded(places, flat)
    again = ScoreTable(places, [0.2, 0.6, 1.0])
    again.load(table.stored())
    torch.testing.assert_close(again.table, table.table, atol=1e-4, rtol=0)
    uniform = ScoreTable(places, [0.2, 1.0], uniform=True)
    torch.nn.init.normal_(uniform.table)
    assert uniform.table.shape[1] == sum(len(config.choices(axis)) for axis in ("hidden", "depth", "mlp", "heads"))
    assert uniform.router().uniform and not router.uniform


@pytest.mark.parametrize("everything", [False, True])
def test_a_learned_router_keeps_budgets_and_finds_what_search_finds(everything):
    """With the hidden size and the depth among the choices it may miss the best pair of them."""
    axes = {} if everything else {"hidden": [1], "depth": [1]}
    mlp = [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    config = elastic_of("gqa-wide-heads", mlp=mlp, budgets=[1, 0.6], **axes).config
    learner = learned(config, steps=40)
    assert learner.error < 0.5
    cost, whole, router = learner.cost, learner.whole, learner.scores.router()
    generator = random.Random(0)
    for budget in (0.75, 0.5, 0.3) if everything else (0.8, 0.65, 0.5):
        limit = budget * whole
        sub = router.choose(cost, limit)
        assert CLOSE * limit <= cost(sub) <= limit
        some = [fill(config, one, cost, limit, generator) for one in drawn(config, 30, seed=2)]
        chance = sorted(late_layers(one.subnetwork(config)) for one in some)
        best = search(config, late_layers, limit, evaluations=200)[1]
        assert late_layers(sub) < best + (0.95 if everything else 0.6) * (chance[15] - best)


def test_a_uniform_router_chooses_equal_layers(config):
    learner = learned(config, steps=20, uniform=True)
    for budget in (0.8, 0.5, 0.3):
        sub = learner.scores.router().choose(learner.cost, budget * learner.whole)
        assert sub.uniform and learner.cost(sub) <= budget * learner.whole


def test_a_uniform_router_on_layers_that_differ(tmp_path):
    """It chooses what all kept layers hold, more where it drops the smallest one."""
    model = elastic_of("gqa-wide-heads", mlp=[1, 0.75, 0.5, 0.25], hidden=[1])
    model.save_pretrained(tmp_path)
    thin = next(layer for layer in range(4) if layer not in model.config.kept_layers(2))
    sizes = {"mlp": [24 if layer == thin else 72 for layer in range(4)], "heads": [8, 8, 4, 8]}
    part = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget=sizes)
    config, table = part.config, ScoreTable(Places(part.config), [0.05, 1.0], uniform=True)
    torch.nn.init.normal_(table.table, generator=torch.Generator().manual_seed(0))
    config.static_router = table.stored()
    size, built = parameters_of(config, embeddings=False), config.built
    smallest, whole, seen = smallest_budget(config, size), size(built), set()
    for budget in (smallest + (1 - smallest) * i / 40 for i in range(41)):
        chosen = StaticRouter(config, config.static_router).choose(size, budget * whole + 0.5)
        assert built.contains(chosen) and chosen.uniform and size(chosen) <= budget * whole + 0.5
        part.set_budget(chosen)
        seen.add(chosen)
    assert max(s.mlp[0] for s in seen) > 24 and all(s.mlp[0] == 24 for s in seen if thin in s.layers)
    generator = random.Random(0)
    for choices in drawn(config, 10, uniform=True):
        filled = fill(config, choices, size, 0.6 * whole, generator, uniform=True).subnetwork(config)
        assert built.contains(filled) and filled.uniform


def test_a_surrogate_that_knows_nothing_does_not_move_the_scores(config):
    noise = random.Random(0)
    learner = learned(config, steps=15, loss=lambda sub: noise.random())
    assert learner.error > 0.7 and not learner.trusted
    assert (learner.scores.table == 0).all()


def test_learning_goes_on_as_if_it_had_not_stopped(config):
    learner, again = learned(config, 20, finish=False), learned(config, 20, finish=False)
    assert torch.equal(learner.scores.table, again.scores.table)
    state = {name: tensor.clone() for name, tensor in learner.state().items()}
    resumed = SurrogateLearner(config, learner.cost, learner.smallest, steps=20, latency_weight=1.0)
    resumed.load(copy.deepcopy(state))
    resumed.scores.table.data.copy_(learner.scores.table)
    for one in (learner, resumed):
        optimizer = torch.optim.Adam(one.scores.parameters(), lr=0.1)
        take_step(one, optimizer, 15, late_layers)
        take_step(one, optimizer, 16, late_layers)
    assert torch.equal(learner.scores.table, resumed.scores.table)
    assert learner.error == resumed.error


def test_budgets_between_rows_resolve_through_the_router(tmp_path):
    model = elastic_of("gqa-wide-heads", mlp=[1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    config = model.config
    learner = learned(config, steps=20)
    before = config.resolve(0.52)
    config.static_router = learner.scores.stored()
    size, whole = parameters_of(config, embeddings=False), config.parent_size()
    for budget in (0.9, 0.52, 0.31, 0.2):
        sub = config.resolve(budget)
        assert 0.97 * budget * whole <= size(sub) <= budget * whole
    assert size(config.resolve(0.52)) > size(before)
    total = parameters_of(config)
    assert 0.97 * 100_000 <= total(config.resolve(100_000)) <= 100_000
    memory = memory_of(config)
    assert memory(config.resolve("3MB")) <= 3e6
    assert config.resolve(1) == config.built
    with pytest.raises(ValueError, match="smallest row"):
        config.resolve(0.01)

    model.save_pretrained(tmp_path)
    part = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget=0.52)
    assert part.built == config.resolve(0.52).within(config.resolve(0.52))
    inside = part.resolve_budget(0.4)
    assert part.built.contains(inside) and 0.95 * 0.4 * whole <= size(inside) <= 0.4 * whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("mlp"), "It has the fields budgets"),
        (lambda r: r.update(budgets=[1.0, 0.2]), "ascend between 0 and 1"),
        (lambda r: r.update(budgets=[0.5]), "at least two numbers"),
        (lambda r: r["mlp"][0].pop(), "static_router\\['mlp'\\]"),
        (lambda r: r["hidden"][0].append(1.0), "static_router\\['hidden'\\]"),
        (lambda r: r["depth"][0].__setitem__(0, float("nan")), "static_router\\['depth'\\]"),
    ],
)
def test_broken_routers_are_refused(config, change, message):
    stored = ScoreTable(Places(config), [0.2, 1.0]).stored()
    change(stored)
    values = config.to_dict() | {"static_router": stored}
    with pytest.raises(ValueError, match=message):
        FlextronConfig(**values)
