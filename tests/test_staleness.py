"""A smaller size always runs on the weights of now: whatever moved, replaced or changed them since the last call."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers import difference, elastic_of
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

BUDGET = {"mlp": 48, "heads": 2, "hidden": 48}
IDS = torch.randint(1, 96, (1, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model():
    return elastic_of("mha")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Twice: what a first call might keep, a second one would read."""
    budget = model.resolve_budget(BUDGET)
    first = model(IDS, flextron_budget=budget).logits
    assert torch.equal(first, model(IDS, flextron_budget=budget).logits)
    return first


def up_proj(model) -> nn.Module:
    return model.model.layers[0].mlp.up_proj


def step(model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(IDS, labels=IDS, flextron_budget=BUDGET).loss.backward()
    optimizer.step()


def new_data(model) -> None:
    for parameter in model.parameters():
        parameter.data = 1.1 * parameter.data


def new_parameters(model) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(1.1 * parameter.detach()))
    model.tie_weights()


def loaded(model, assign: bool) -> None:
    model.load_state_dict({name: 1.1 * tensor for name, tensor in model.state_dict().items()}, assign=assign)
    model.tie_weights()


def transposed_storage(model) -> None:
    weight = up_proj(model).weight
    weight.data = (1.1 * weight.data).t().contiguous().t()


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


CHANGES: dict[str, Callable] = {
    "in place": lambda model: up_proj(model).weight.data.mul_(1.1),
    "optimizer": step,
    "data": new_data,
    "parameters": new_parameters,
    "load_state_dict": lambda model: loaded(model, assign=False),
    "load_state_dict, assign": lambda model: loaded(model, assign=True),
    "strides": transposed_storage,
    "parametrized": lambda model: parametrize.register_parametrization(up_proj(model), "weight", Twice()),
    "another layer": lambda model: setattr(model.model.layers[0].mlp, "up_proj", copy.deepcopy(up_proj(model)).apply(
        lambda layer: layer.weight.data.neg_()
    )),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_is_seen(model, change):
    before, twin = logits(model), model.share(None)
    logits(twin)
    CHANGES[change](model)
    after = logits(model)
    assert not torch.equal(before, after)
    # A deep copy has nothing that a call could have kept.
    assert torch.equal(after, logits(copy.deepcopy(model)))
    if change in ("in place", "optimizer", "data", "strides", "load_state_dict"):  # which keep the parameters
        assert torch.equal(after, logits(twin))


def test_a_gradient_lands_in_the_full_weight_after_calls_without_one(model):
    logits(model)
    model(IDS, labels=IDS, flextron_budget=BUDGET).loss.backward()
    gradient = up_proj(model).weight.grad
    assert gradient[:48, :48].any() and not gradient[48:].any() and not gradient[:, 48:].any()


def test_dtypes_and_copies(model):
    before = logits(model)
    assert torch.equal(before, logits(pickle.loads(pickle.dumps(model))))
    assert torch.equal(before, logits(copy.deepcopy(model)))
    half = logits(model.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and difference(half.float(), before) < 5e-2


def test_weights_that_are_passed_are_those_that_run(model):
    before, budget = logits(model), model.resolve_budget(BUDGET)
    other = {name: 1.1 * parameter.detach() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        after = functional_call(model, other, (IDS,), {"flextron_budget": budget}).logits
    assert not torch.equal(before, after) and torch.equal(before, logits(model))


def test_no_call_keeps_memory(model):
    logits(model)
    held = {id(parameter) for parameter in model.parameters()} | {id(buffer) for buffer in model.buffers()}
    for module in model.modules():
        for value in vars(module).values():
            assert not isinstance(value, torch.Tensor) or id(value) in held
