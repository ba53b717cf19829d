"""Predictions of what is lost, against what is lost, and the rows that are chosen by them."""

import warnings

import pytest
import torch
from helpers import parent_of
from shapes import VARIANTS

from flextron_trainer import convert
from flextron_trainer.conversion.moments import Moments, low_rank, matrix_name, regularised
from flextron_trainer.conversion.reconstruction import input_moments, token_weights
from flextron_trainer.conversion.sensitivity import (
    leading_losses,
    predicted_losses,
    rows_by_prediction,
    sensitivities,
)
from flextron_trainer.conversion.sizes import family_config
from flextron_trainer.conversion.weights import take
from modeling_flextron import SubNetwork
from modeling_flextron.frontier import held

DATA = torch.randint(0, 96, (32, 24), generator=torch.Generator().manual_seed(2))
HOW = {"sequence_length": 24, "batch_size": 4, "corrections": 0}


def elastic_of(variant, **sizes):
    parent = parent_of(variant)
    config = family_config(parent.config, dict.fromkeys(("mlp", "heads", "hidden", "depth")) | sizes)
    return take(parent, config, release=False)


def test_leading_losses_are_those_of_the_best_matrices():
    torch.manual_seed(0)
    h = torch.randn(500, 8, dtype=torch.double) @ torch.randn(8, 8, dtype=torch.double)
    weight, root = torch.randn(5, 8, dtype=torch.double), torch.randn(5, 5, dtype=torch.double)
    moments = Moments.zeros(8, 5, dtype=torch.double)
    moments.add(h, h @ weight.T)
    sliced, fitted = leading_losses(moments, weight, root @ root.T, 1e-12)
    for k in range(9):
        plain = (h[:, k:] @ weight[:, k:].T @ root).square().sum(1).mean().item() / 2
        assert sliced[k].item() == pytest.approx(plain, rel=1e-6, abs=1e-8)
        kept = torch.linalg.lstsq(h[:, :k], h @ weight.T).solution if k else h.new_zeros(0, 5)
        lost = (h @ weight.T - h[:, :k] @ kept) @ root
        assert fitted[k].item() == pytest.approx(lost.square().sum(1).mean().item() / 2, rel=1e-6, abs=1e-8)
    assert (fitted.diff() <= 0).all() and (fitted <= sliced + 1e-9).all()


def test_low_ranks_are_best_in_the_metric():
    torch.manual_seed(0)
    change, inputs, root = (torch.randn(*shape, dtype=torch.double) for shape in ((5, 8), (8, 20), (5, 5)))
    inputs, metric = inputs @ inputs.T, root @ root.T
    up, down, gains = low_rank(change, inputs, metric=metric)
    torch.testing.assert_close(up @ down, change)
    weighted = torch.linalg.cholesky(regularised(metric, 0.1), upper=True) @ change
    singular = torch.linalg.svdvals(weighted @ torch.linalg.cholesky(regularised(inputs)))
    torch.testing.assert_close(gains, singular.square())


@pytest.mark.parametrize("variant", ["gqa-wide-heads", "gpt2", "neox"])
@torch.no_grad()
def test_the_predicted_divergence_is_the_measured_one(variant):
    model = elastic_of(variant)
    metrics = sensitivities(model, [DATA])
    before = model(DATA).logits.log_softmax(-1)
    for layer, axis, weight, moments in list(input_moments(model, [DATA])):
        torch.manual_seed(layer)
        change = torch.randn_like(weight) * 0.02 * weight.norm() / len(weight)
        inputs = moments.inputs / moments.count
        predicted = (metrics[matrix_name(layer, axis)] * (change @ inputs @ change.T)).sum() / 2
        weight.data += change
        after = model(DATA).logits.log_softmax(-1)
        weight.data -= change
        divergence = (before.exp() * (before - after)).sum(-1).mean()
        assert 0.5 < predicted / divergence < 2, (layer, axis)


@torch.no_grad()
@pytest.mark.parametrize("scale", [0, 0.3, 1])
def test_biases_go_with_a_dropped_layer(scale):
    model = elastic_of("gpt2", depth=[1, 0.75])
    for layer in model.model.layers:
        for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
            matrix.weight.mul_(0.1)
            matrix.bias.mul_(scale)
    losses = predicted_losses(model, input_moments(model, [DATA]), sensitivities(model, [DATA]))
    before = model(DATA).logits.log_softmax(-1)
    model.config.elastic["layer_ranking"] = [2]
    built = model.built
    kept = SubNetwork(64, (0, 1, 3), built.mlp[:3], built.heads[:3])
    after = model(DATA, flextron_budget=kept).logits.log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    assert 0.5 < (losses["mlp"][2][0] + losses["heads"][2][0]) / divergence < 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_use_their_budgets_nest_and_are_predicted_to_lose_less(variant):
    depth = [1, 0.75]
    hidden = [64] if "gpt2" in variant or "neox" in variant else None
    model = convert(parent_of(variant), DATA, uniform=False, depth=depth, hidden=hidden, budgets=[1, 0.8, 0.6], **HOW)
    config, rows = model.config, held(model.config.frontier)
    assert list(rows) == ["1", "0.8", "0.6"]
    metrics = sensitivities(model, [DATA])
    losses = predicted_losses(model, input_moments(model, [DATA]), metrics)
    uniform = convert(parent_of(variant), DATA, depth=depth, hidden=hidden, budgets=[1, 0.8, 0.6], **HOW)
    for (name, row), other in zip(rows.items(), held(uniform.config.frontier).values(), strict=True):
        used = config.row(name, row).non_embedding_parameters / config.parent_size()
        assert 0.9 * float(name) < used <= 1.01 * float(name)
        if name != "1":
            assert _lost(row, losses) < 1.05 * _lost(other, losses)
    assert rows["1"].contains(rows["0.8"]) and rows["0.8"].contains(rows["0.6"])


def _lost(subnetwork, losses):
    sizes = dict(zip(subnetwork.layers, zip(subnetwork.mlp, subnetwork.heads, strict=True), strict=True))
    every = (sizes.get(layer, (0, 0)) for layer in range(4))
    return sum(losses["mlp"][i][mlp] + losses["heads"][i][heads] for i, (mlp, heads) in enumerate(every))


def test_budgets_that_cannot_be_reached_or_are_the_same_are_said():
    model = elastic_of("mha", mlp=[1, 0.5], heads=[1, 0.5])
    losses = predicted_losses(model, input_moments(model, [DATA]), sensitivities(model, [DATA]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rows = rows_by_prediction(model.config, {"0.1": 0.1, "0.8": 0.8, "0.799": 0.799}, losses)
    assert [row.name for row in rows][:2] == ["1", "0.8"] and len(rows) == 3
    assert rows[-1].name.startswith("0.5") and len(said) == 3  # and "0.8" leaves some of its budget
    assert sum("same sub-network" in str(each.message) for each in said) == 1


def test_sinks_are_left_out():
    states = torch.ones(1, 5, 4)
    states[0, 0] *= 100
    weights = token_weights(states)
    assert (weights > weights.median() / 10).tolist() == [[False, True, True, True, True]]


def test_what_cannot_be_chosen_by_prediction_is_refused():
    for how in ({"calibration": "weights"}, {"search_evaluations": 5}, {"nested": False}):
        with pytest.raises(ValueError, match="`uniform`=False"):
            convert(parent_of("mha"), **{"calibration": DATA, "uniform": False, **HOW, **how})


def test_a_row_that_leaves_much_of_its_budget_is_said():
    model = elastic_of("mha", mlp=[1, 0.75], heads=[1, 0.75], hidden=[1, 0.5])
    losses = predicted_losses(model, input_moments(model, [DATA]), sensitivities(model, [DATA]))
    with pytest.warns(UserWarning, match="of its budget"):
        rows_by_prediction(model.config, {"0.7": 0.7}, losses)
