"""Search over sub-networks whose layers differ."""

import random

import pytest
from helpers import elastic_of, random_subnetworks
from hypothesis import given, settings
from hypothesis import strategies as st

from flextron_trainer.conversion.search import candidate_of, fill, random_candidate, search
from modeling_flextron import FlextronForCausalLM, SubNetwork, count_parameters
from modeling_flextron.subnetwork import Cost, parameters_of


def test_choices_are_subnetworks(elastic):
    config = elastic.config
    for sub in random_subnetworks(elastic, 20):
        choices = candidate_of(config, sub)
        assert choices.subnetwork(config) == sub
        for up in (True, False):
            for step in choices.steps(config, up):
                other = choices.after(step).subnetwork(config)
                assert config.resolve(other.to_dict()) == other != sub
                larger, smaller = (other, sub) if up else (sub, other)
                assert larger.contains(smaller)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), share=st.floats(0.1, 1.2))
def test_filled_choices_keep_the_budget_and_use_it(seed, share):
    config = elastic_config()
    cost, generator = parameters_of(config, embeddings=False), random.Random(seed)
    limit = share * config.parent_size()
    smallest = SubNetwork(32, config.kept_layers(2), (24, 24), (4, 4))
    if cost(smallest) > limit:
        with pytest.raises(ValueError, match="smallest sub-network costs"):
            fill(config, random_candidate(config, generator), cost, limit, generator)
        return
    filled = fill(config, random_candidate(config, generator), cost, limit, generator)
    assert cost(filled.subnetwork(config)) <= limit
    assert all(cost(filled.after(step).subnetwork(config)) > limit for step in filled.steps(config, up=True))


def elastic_config():
    if not hasattr(elastic_config, "made"):
        elastic_config.made = elastic_of("gqa-wide-heads").config
    return elastic_config.made


@pytest.mark.parametrize("share", [0.75, 0.5])
def test_the_search_finds_what_the_loss_rewards(share):
    """A loss for which late layers should be wide; the best uniform network is far from it."""
    config = elastic_of("gqa-wide-heads", hidden=[1], depth=[1]).config
    limit = share * config.parent_size()

    def loss(sub):
        return -sum(layer * size for layer, size in zip(sub.layers, sub.mlp, strict=True)) - 0.001 * sum(sub.heads)

    asked = []

    def counted(sub):
        asked.append(sub)
        return loss(sub)

    best, value = search(config, counted, limit, evaluations=120, seed=1)
    assert value == loss(best) == min(map(loss, asked))
    assert len(asked) == len(set(asked)) <= 120
    assert all(count_parameters(config, sub, embeddings=False) <= limit for sub in asked)
    assert list(best.mlp) == sorted(best.mlp) and not best.uniform
    assert value < min(loss(sub) for sub in asked if sub.uniform)
    assert search(config, loss, limit, evaluations=120, seed=1) == (best, value)


def test_any_cost_that_grows_with_the_sizes():
    config = elastic_config()
    best, _ = search(
        config,
        lambda sub: -sum(sub.mlp),
        300,
        cost=Cost(lambda hidden: 0, lambda hidden, mlp, heads: mlp),
        evaluations=60,
    )
    assert sum(best.mlp) > 280


def test_the_part_that_was_loaded(tmp_path):
    model = elastic_of("gqa-wide-heads")
    model.save_pretrained(tmp_path)
    part = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget={"mlp": [96, 48, 72, 24], "heads": 4})
    limit = 0.6 * count_parameters(part.config, part.built, embeddings=False)
    best, _ = search(part.config, lambda sub: -sum(sub.mlp), limit, evaluations=40)
    assert part.built.contains(best) and part.resolve_budget(best.to_dict()) == best


def test_bad_input():
    config = elastic_config()
    with pytest.raises(ValueError, match=r"`flextron_budget`=10 .*smallest sub-network costs"):
        search(config, len, 10)
    with pytest.raises(ValueError, match="`evaluations`=0"):
        search(config, len, 1e9, evaluations=0)
