"""Which sub-networks a step trains."""

import random
from collections import Counter

import pytest
from helpers import elastic_of, run_python

from flextron_trainer.training.sampling import SAMPLERS, draw, spread


@pytest.fixture(scope="module")
def config():
    return elastic_of("gqa-wide-heads").config


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_step_alone_decides(config, sampler):
    weights = [1.0, 1.0, 1.0, 1.0] if sampler == "weighted" else None

    def sequence(seed):
        return [draw(config, sampler, 3, seed=seed, step=step, weights=weights) for step in range(20)]

    assert sequence(1) == sequence(1)
    assert sequence(1) != sequence(2)
    assert len({tuple(draws) for draws in sequence(1)}) > 1
    for draws in sequence(1):
        assert len(draws) == 3
        assert all(config.built.contains(drawn.subnetwork) for drawn in draws)


def test_another_process_draws_the_same(config, tmp_path):
    config.save_pretrained(tmp_path)
    code = """
from modeling_flextron import FlextronConfig
from flextron_trainer.training.sampling import draw
config = FlextronConfig.from_pretrained(sys.argv[1])
print([draw(config, "random", 2, seed=5, step=step) for step in range(5)])
"""
    assert run_python(code, tmp_path).stdout.strip() == str(
        [draw(config, "random", 2, seed=5, step=step) for step in range(5)]
    )


def test_sandwich_has_both_ends(config):
    names = [row["name"] for row in config.frontier]
    between = set()
    for step in range(50):
        draws = draw(config, "sandwich", 4, seed=0, step=step)
        assert (draws[0].name, draws[-1].name) == (names[0], names[-1])
        between |= {drawn.name for drawn in draws[1:-1]}
    assert between == set(names[1:-1])


@pytest.mark.parametrize("sampler", ["sandwich", "uniform", "weighted"])
def test_no_row_comes_twice_where_there_are_others(config, sampler):
    weights = [1.0] * 4 if sampler == "weighted" else None
    for count in (2, 3, 4):
        for step in range(20):
            drawn = draw(config, sampler, count, seed=0, step=step, weights=weights)
            assert len({one.name for one in drawn}) == len(drawn) == count
    more = Counter(one.name for one in draw(config, sampler, 6, seed=0, step=0, weights=weights))
    assert sorted(more.values()) == [1, 1, 2, 2]


def test_shares_are_kept_and_pairs_are_free():
    generator, rows = random.Random(0), ["a", "b", "c", "d"]
    pairs = Counter(tuple(sorted(spread(rows, [1.0] * 4, 2, generator))) for _ in range(3000))
    assert len(pairs) == 6 and all(abs(count / 3000 - 1 / 6) < 0.03 for count in pairs.values())
    drawn = [Counter(spread(rows, [0.7, 0.1, 0.2, 0.0], 3, generator)) for _ in range(3000)]
    assert all(one["a"] in (2, 3) and one["b"] <= 1 and one["c"] <= 1 for one in drawn)
    shares = sum(drawn, Counter())
    for row, share in zip(rows, [0.7, 0.1, 0.2, 0.0], strict=True):
        assert abs(shares[row] / 9000 - share) < 0.01


def test_a_sandwich_without_rows_between_takes_random_sizes():
    few = elastic_of("gqa-wide-heads", budgets=[1, 0.15]).config
    for step in range(20):
        drawn = draw(few, "sandwich", 4, seed=0, step=step)
        assert [one.name for one in drawn] == ["1", "random", "random", "0.15"] and len(set(drawn)) == 4
    single = elastic_of("gqa-wide-heads", budgets=[1]).config
    assert [one.name for one in draw(single, "sandwich", 3, seed=0, step=0)] == ["1", "random", "random"]


def test_weights_are_probabilities(config):
    names = [row["name"] for row in config.frontier]
    weights = [0.5, 0.3, 0.2, 0.0]
    count = Counter(draw(config, "weighted", 1, seed=0, step=step, weights=weights)[0].name for step in range(2000))
    for name, weight in zip(names, weights, strict=True):
        assert abs(count[name] / 2000 - weight) < 0.05
    uniform = Counter(draw(config, "uniform", 1, seed=0, step=step)[0].name for step in range(2000))
    assert all(abs(uniform[name] / 2000 - 0.25) < 0.05 for name in names)


def test_random_is_heterogeneous_and_covers_every_choice(config):
    drawn = [draw(config, "random", 1, seed=0, step=step)[0].subnetwork for step in range(300)]
    assert any(len(set(sub.mlp)) > 1 for sub in drawn)
    for axis, sizes in {
        "mlp": {size for sub in drawn for size in sub.mlp},
        "heads": {size for sub in drawn for size in sub.heads},
        "hidden": {sub.hidden for sub in drawn},
        "depth": {len(sub.layers) for sub in drawn},
    }.items():
        assert sizes == set(config.choices(axis))
