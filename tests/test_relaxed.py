"""Gates with gradients: forward exactly the chosen sizes, backward to what chose them."""

import random

import pytest
import torch
from helpers import difference, elastic_of

from flextron_trainer.conversion.search import random_candidate
from flextron_trainer.routers.gates import RelaxedSizes, unit_gates
from flextron_trainer.routers.surrogate import Places, ScoreTable

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_spread():
    at_least = torch.tensor([0.1, 0.4, 1.0])
    assert unit_gates(at_least, [6, 3, 1]).tolist() == pytest.approx([1.0, 0.4, 0.4, 0.1, 0.1, 0.1])


@torch.no_grad()
def test_gates_give_what_slices_give(elastic, ids):
    """Also the norms over fewer channels, and skipped layers."""
    config, generator = elastic.config, random.Random(0)
    places = Places(config)
    for _ in range(8):
        choices = random_candidate(config, generator)
        routing = RelaxedSizes(places, places.encode(choices))
        gated = elastic(ids, routing=routing).logits
        assert difference(gated, elastic(ids, flextron_budget=choices.subnetwork(config)).logits) < 2e-5


def test_every_place_gets_a_gradient(variant, ids):
    model = elastic_of(variant)
    places = Places(model.config)
    table = ScoreTable(places, [0.2, 0.6, 1.0])
    noise = table.noise(torch.Generator().manual_seed(0))
    choice = places.straight_through(table(torch.tensor([0.5]), noise))
    model.requires_grad_(False)
    model(ids, labels=ids, routing=RelaxedSizes(places, choice[0])).loss.backward()
    gradient = table.table.grad
    assert gradient.isfinite().all()
    kept = places.keep(choice.detach())[0].bool().tolist()
    for number, part in enumerate(places.split(gradient[:2])):
        runs = number < 2 or kept[(number - 2) % places.layers]  # sizes of layers that were dropped have none
        assert bool((part != 0).all()) == runs and bool((part != 0).any()) == runs
    assert (gradient[2] == 0).all()  # 0.5 lies between the first two
