"""The algebra of reconstruction, on random numbers and on tiny models of every family."""

import importlib

import pytest
import torch
from helpers import difference, parent_of
from shapes import VARIANTS
from transformers import LlamaConfig

from flextron_trainer import convert
from flextron_trainer.conversion.corrections import put_corrections
from flextron_trainer.conversion.importance import measure
from flextron_trainer.conversion.moments import (
    Moments,
    _compacted,
    _inverted,
    allocate,
    least_squares,
    low_rank,
    norm_scale,
    regularised,
    removal_order,
)
from flextron_trainer.conversion.orders import RANKINGS, best_order, rankings
from flextron_trainer.conversion.plan import plan_conversion
from flextron_trainer.conversion.reconstruction import from_inputs, input_moments, reconstruct, within
from flextron_trainer.conversion.sizes import elastic_config, family_config
from flextron_trainer.conversion.weights import take
from modeling_flextron import SubNetwork, count_parameters
from modeling_flextron.corrections import owner_number
from modeling_flextron.subnetwork import smallest_subnetwork

DATA = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(2))
D, K = 6, 10


@pytest.fixture
def moments():
    torch.manual_seed(0)
    h = torch.randn(400, K, dtype=torch.double) @ torch.randn(K, K, dtype=torch.double) + 1
    y = h @ torch.randn(K, D, dtype=torch.double) + torch.randn(400, D, dtype=torch.double)
    found = Moments.zeros(K, D, dtype=torch.double)
    for part in range(0, 400, 100):
        found.add(h[part : part + 100], y[part : part + 100])
    return found, h, y


def test_the_row_optimum_is_that_of_a_solver(moments):
    found, h, y = moments
    weight = torch.randn(D, K, dtype=torch.double)
    expected = torch.linalg.lstsq(h, y).solution.T
    torch.testing.assert_close(weight + least_squares(found, weight, 1e-12), expected, rtol=1e-6, atol=1e-6)
    assert least_squares(found, weight, 1e9).abs().max() < 1e-6  # ridge pulls towards no change


def test_weights_of_tokens_count_them(moments):
    _, h, y = moments
    twice, weighted = Moments.zeros(K, D, dtype=torch.double), Moments.zeros(K, D, dtype=torch.double)
    for _ in range(2):
        twice.add(h, y)
    weighted.add(h, y, torch.full((400,), 2.0))
    torch.testing.assert_close(twice.inputs, weighted.inputs)
    torch.testing.assert_close(twice.cross, weighted.cross)
    assert (twice.tokens, twice.count) == (weighted.tokens, 2 * weighted.count)


def test_each_rank_takes_away_its_gain_and_no_other_does_better(moments):
    found, h, y = moments
    weight = torch.randn(D, K, dtype=torch.double)
    change = least_squares(found, weight, 1e-12)
    up, down, gains = low_rank(change, found.inputs, 1e-12)
    torch.testing.assert_close(up @ down, change)
    errors = [(y - h @ (weight + up[:, :r] @ down[:r]).T).square().sum().item() for r in range(D + 1)]
    for rank in range(D):
        assert errors[rank] - errors[rank + 1] == pytest.approx(gains[rank].item(), rel=1e-6)
    root = torch.linalg.cholesky(regularised(found.inputs, 1e-12))
    singular = torch.linalg.svdvals(change @ root).square()  # Eckart-Young: no change of a rank does better
    torch.testing.assert_close(gains, singular)


def test_ranks_go_where_they_take_away_most_for_their_cost():
    gains = {"a": torch.tensor([8.0, 4.0, 0.0]), "b": torch.tensor([9.0, 1.0])}
    assert allocate(gains, {"a": 1, "b": 3}, 4) == {"a": 2, "b": 0}  # 2 are left, and b costs 3
    assert allocate(gains, {"a": 1, "b": 3}, 5) == {"a": 2, "b": 1}
    assert allocate(gains, {"a": 1, "b": 3}, 100) == {"a": 2, "b": 2}  # nothing for no gain
    assert allocate(gains, {"a": 1, "b": 3}, 0) == {"a": 0, "b": 0}


def test_norms_are_scaled_to_the_parent():
    torch.manual_seed(0)
    reduced, true = torch.randn(50, 4), torch.tensor([2.0, 0.5, 1.0, -1.0])
    scale = norm_scale((reduced * true * reduced).sum(0), reduced.square().sum(0))
    torch.testing.assert_close(scale, true)
    assert norm_scale(torch.zeros(1), torch.zeros(1)) == 1


def brute_force(inputs, weight, units):
    """The same order, every candidate fitted anew at every step."""
    c, kept, gone = regularised(inputs), list(range(len(units))), []

    def loss(left):
        columns = units[left].flatten()
        fitted = weight.double() @ c[:, columns] @ torch.linalg.inv(c[columns][:, columns])
        rest = torch.zeros_like(weight.double())
        rest[:, columns] = fitted
        difference = weight.double() - rest
        return (difference @ c * difference).sum()

    while len(kept) > 1:
        worst = min(kept, key=lambda unit: loss([other for other in kept if other != unit]))
        kept.remove(worst)
        gone.append(worst)
    return [*kept, *reversed(gone)]


@pytest.mark.parametrize("size", [1, 2])
def test_units_are_removed_in_the_order_of_least_loss(moments, size):
    found, *_ = moments
    weight, units = torch.randn(D, K), torch.randperm(K).view(-1, size)
    assert removal_order(found.inputs, weight, units).tolist() == brute_force(found.inputs, weight, units)
    if size == 1:
        assert sorted(removal_order(found.inputs, weight, units, chunk=3).tolist()) == list(range(K))


def unsorted_of(variant):
    parent = parent_of(variant)
    choices = {"mlp": [1, 0.5], "heads": [1, 0.5], "hidden": None, "depth": [1, 0.75]}
    return take(parent, family_config(parent.config, choices), release=False), parent


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_whole_row_needs_no_correction(variant):
    """Running halves of layers one by one is running the model, whatever the family."""
    model, _ = unsorted_of(variant)
    corrections, gains = reconstruct(model, model.built, [DATA[:4]], norms=True)
    assert all(up.shape[1] == len(gains[name]) for name, (up, _) in corrections.low_rank.items())
    for name, (up, down) in corrections.low_rank.items():
        assert (up @ down).abs().max() < 2e-3, name
    before = model(DATA[:2]).logits
    put_corrections(model, {"1": (model.built, corrections)})
    assert difference(model(DATA[:2]).logits, before) < 2e-2 * before.abs().max()


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("variant", ["gqa-tied-llama3", "gpt2", "neox", "qwen3"])
@torch.no_grad()
def test_a_row_is_nearer_to_the_parent_and_the_model_is_not_changed(variant, sequential):
    model, parent = unsorted_of(variant)
    row = smallest_subnetwork(model.config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = list(DATA.split(8))
    corrections, _ = reconstruct(model, row, batches, sequential=sequential, norms=sequential)

    def distance():
        return (model(DATA, flextron_budget=row).logits - parent(DATA).logits).square().mean()

    plain = distance()
    put_corrections(model, {"small": (row, corrections)})
    assert distance() < plain
    put_corrections(model, {})
    assert distance() == plain
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    if sequential:
        norms = {name for name in state if "norm" in name and "q_norm" not in name and "k_norm" not in name}
        dropped = set(range(4)) - set(row.layers)
        assert corrections.vectors.keys() == {n for n in norms if not any(f"layers.{i}." in n for i in dropped)}
    cut = corrections.cut(dict.fromkeys(corrections.low_rank, 2))
    assert all(up.shape[1] == 2 == len(down) for up, down in cut.low_rank.values())


@torch.no_grad()
def test_corrections_keep_their_budget():
    model, _ = unsorted_of("gqa-wide-heads")
    row = smallest_subnetwork(model.config)
    first = within(model, row, [DATA], share=0.05)
    second, _ = reconstruct(model, row, [DATA], ranks=first.ranks, norms=True)
    for found in (first, second):
        assert found.low_rank and found.ranks == first.ranks
        put_corrections(model, {"row": (row, found)})
        owned = sum(p.numel() for name, p in model.named_parameters() if owner_number(name) is not None)
        assert owned <= 0.05 * count_parameters(model.config, row, embeddings=False)
        put_corrections(model, {})


@torch.no_grad()
def test_moments_of_the_model_are_those_of_its_layers():
    model, parent = unsorted_of("mha")
    seen = {}
    for i, layer in enumerate(parent.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs, i=i: seen.update({i: inputs[0]}))
    states = parent(DATA, output_hidden_states=True).hidden_states
    for layer, axis, weight, moments in input_moments(model, list(DATA.split(5))):
        if axis == "mlp" and layer < 3:  # the last states are normed
            size = 1 / states[layer + 1].square().mean(-1, keepdim=True)
            h = seen[layer]
            expected = (h * size).flatten(0, 1).T @ h.flatten(0, 1)
            torch.testing.assert_close(moments.inputs, expected, rtol=1e-3, atol=1e-2)
            assert weight.shape == (64, 96)


@pytest.mark.parametrize("variant", ["gqa-wide-heads", "mha-tied-biased", "gpt2", "neox"])
@torch.no_grad()
def test_one_walk_fits_all_rows_as_walks_of_their_own_do(variant):
    model, _ = unsorted_of(variant)
    rows = {
        "a": SubNetwork(64, (0, 1, 2, 3), (96, 48, 24, 96), (4, 2, 4, 2)),
        "b": SubNetwork(64, (0, 1, 2, 3), (32, 48, 24, 24), (2, 4, 4, 2)),
    }
    found = from_inputs(model, rows, input_moments(model, [DATA]), 0.1)
    for name, row in rows.items():
        expected = within(model, row, [DATA], 0.1)
        assert list(found[name].low_rank) == list(expected.low_rank)
        for matrix, (up, down) in expected.low_rank.items():
            ours = found[name].low_rank[matrix]
            torch.testing.assert_close(ours[0] @ ours[1], up @ down, rtol=1e-2, atol=1e-3)
        owned = found[name].owner(name, row).parameters(model.config)
        assert found[name].low_rank and owned <= 0.1 * count_parameters(model.config, row, embeddings=False)


def test_the_order_is_the_one_whose_slices_lose_least():
    model, _ = unsorted_of("gqa-wide-heads")
    found = rankings(model, measure(model, [DATA]), [DATA], RANKINGS)
    assert list(found) == list(RANKINGS)
    assert all(scores.mlp.shape == (4, 96) and scores.heads.shape == (4, 8) for scores in found.values())
    large, small = SubNetwork(64, (0, 1), (96, 96), (8, 8)), SubNetwork(64, (0, 1), (48, 48), (4, 4))
    # The sum of the losses is lowest for the first, which owes that to a row that nobody can use.
    losses = dict(zip(RANKINGS, ({large: 3.0, small: 8.0}, {large: 2.9, small: 8.4}) * 2, strict=True))
    losses["variance"] = {large: 2.5, small: 8.8}
    now = []

    def permute(scores):
        now[:] = [name for name, each in found.items() if each is scores]

    name, lost = best_order(found, [large, small], permute, lambda row: losses[now[0]][row], 2.0)
    assert name == "variance"
    assert lost[name] == pytest.approx((0.5 * 6.8) ** 0.5) and lost["importance"] == pytest.approx(6**0.5)


@pytest.mark.parametrize("order", ["auto", *RANKINGS])
@torch.no_grad()
def test_conversion_in_every_order_is_the_parent(order):
    parent = parent_of("gqa-wide-heads")
    expected = parent(DATA).logits
    elastic = convert(parent, DATA, order=order, budgets=[1, 0.8, 0.6], sequence_length=24, batch_size=4)
    assert difference(elastic(DATA).logits, expected) < 1e-5 * expected.abs().max()


def test_moments_are_taken_of_no_more_tokens_than_fit_into_memory(monkeypatch):
    """The hidden states of all of them are there at the same time."""
    module, seen = importlib.import_module("flextron_trainer.conversion.convert"), []
    monkeypatch.setattr(module, "MOMENT_TOKENS", 100)

    def watched(name, original):
        def call(model, *args):
            batches = next(value for value in args if isinstance(value, list) and isinstance(value[0], torch.Tensor))
            seen.append((name, sum(batch.numel() for batch in batches)))
            return original(model, *args)

        monkeypatch.setattr(module, name, call)

    watched("rankings", module.rankings), watched("add_corrections", module.add_corrections)
    convert(parent_of("mha"), DATA, order="norms", corrections=0.05, budgets=[1, 0.6], sequence_length=24, batch_size=4)
    assert seen == [("rankings", 96), ("add_corrections", 96)]


def test_an_order_of_units_takes_three_gigabytes_beside_the_moments():
    """Of an 8B model, by plan, with the states of as many tokens as moments are taken of."""
    config = elastic_config(
        LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=128256, dtype="bfloat16",
        )
    )  # fmt: skip
    plan = plan_conversion(
        config, dtype="bfloat16", device="cpu", calibrated=True, budgets=4, max_samples=64, sequence_length=512,
        batch_size=1, search_evaluations=0, order="obs", corrections=0.0, offloaded=True,
    )  # fmt: skip
    assert plan.weights == 0 and plan.passes - 4 * config.intermediate_size**2 <= 3e9


def test_an_inverse_and_what_is_left_of_it_take_no_more_memory():
    matrix = torch.randn(40, 40, dtype=torch.float64)
    matrix = matrix @ matrix.T + torch.eye(40)
    expected, rows = torch.linalg.inv(matrix), torch.tensor([0, 3, *range(5, 38)])
    inverse = _inverted(matrix)
    assert inverse.data_ptr() == matrix.data_ptr()
    torch.testing.assert_close(inverse, expected)
    left = _compacted(inverse, rows, rows)
    assert left.data_ptr() == matrix.data_ptr() and left.is_contiguous()
    torch.testing.assert_close(left, expected[rows][:, rows])


def test_the_layer_before_a_dropped_one_learns_what_that_one_did():
    model, _ = unsorted_of("gqa-wide-heads")
    full = model.built
    row = SubNetwork(full.hidden, (0, 1, 3), full.mlp[:3], full.heads[:3])
    fitted, _ = reconstruct(model, row, [DATA], sequential=False)
    changes = {name: (up @ down).norm().item() for name, (up, down) in fitted.low_rank.items()}
    most = changes.pop("model.layers.1.mlp.down_proj.weight")
    assert all(10 * change < most for change in changes.values()), (most, changes)
