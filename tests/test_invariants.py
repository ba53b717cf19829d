"""What must always hold (docs/method.md), for every kind of LLaMA and for random heterogeneous sub-networks."""

import json
import random

import pytest
import torch
from helpers import all_sizes, difference, random_subnetworks, run_python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from modeling_flextron import FlextronForCausalLM, count_parameters
from modeling_flextron.extraction import misfit, padded
from modeling_flextron.families import axes, layer_of
from modeling_flextron.subnetwork import random_subnetwork

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def saved(elastic, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    elastic.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(elastic, saved):
    """Sizes, and what is loaded at each of them. Shared: do not change them."""
    load = FlextronForCausalLM.from_pretrained
    return [(size, load(saved, flextron_budget=size.to_dict())) for size in all_sizes(elastic)]


@torch.no_grad()
def test_1_full_size_gives_the_parents_logits(parent, elastic, ids):
    assert difference(parent(ids).logits, elastic(ids).logits) < 1e-5
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    shifted = [m(ids, attention_mask=mask, position_ids=positions).logits[0, 5:] for m in (parent, elastic)]
    assert difference(*shifted) < 1e-5


@torch.no_grad()
def test_2_subnetwork_equals_loaded_equals_extracted(parent, elastic, parts, ids, tmp_path):
    for i, (sub, loaded) in enumerate(parts):
        expected = elastic(ids, flextron_budget=sub).logits
        assert difference(expected, loaded(ids).logits) < 1e-5
        assert loaded.num_parameters() == count_parameters(elastic.config, sub)
        if misfit(elastic.config, sub) is not None:
            with pytest.raises(ValueError, match="nearest sub-network that fits"):
                elastic.extract(sub)
        larger = padded(elastic.config, sub)
        if larger is None:
            with pytest.raises(ValueError, match="nearest sub-network that fits"):
                elastic.extract(sub, pad=True)
            continue
        elastic.extract(sub, pad=True).save_pretrained(tmp_path / str(i))
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / str(i))
        assert type(stock) is type(parent)
        assert difference(expected, stock(ids).logits) < 1e-5
        assert stock.num_parameters() == count_parameters(elastic.config, larger)
        assert larger.contains(sub) and (larger == sub) == (misfit(elastic.config, sub) is None)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
@torch.no_grad()
def test_2_heterogeneous_subnetworks_load_as_they_run(elastic, saved, ids, seed):
    sub = random_subnetwork(elastic.config, random.Random(seed))
    loaded = FlextronForCausalLM.from_pretrained(saved, flextron_budget=sub.to_dict())
    assert difference(elastic(ids, flextron_budget=sub).logits, loaded(ids).logits) < 1e-5
    inner = random_subnetworks(loaded, 1, seed)[0]  # and can go further down
    outer = type(inner)(inner.hidden, tuple(sub.layers[i] for i in inner.layers), inner.mlp, inner.heads)
    assert difference(elastic(ids, flextron_budget=outer).logits, loaded(ids, flextron_budget=inner).logits) < 1e-5


def test_3_parameter_formula_is_exact(elastic):
    for sub in all_sizes(elastic, count=20):
        if misfit(elastic.config, sub) is None:
            stock = elastic.extract(sub)
            assert count_parameters(elastic.config, sub) == sum(p.numel() for p in stock.parameters())
            embeddings = ("embed", "wte", "wpe", "lm_head")
            rest = sum(p.numel() for name, p in stock.named_parameters() if not any(e in name for e in embeddings))
            assert rest == count_parameters(elastic.config, sub, embeddings=False)


def test_4_subnetworks_nest(elastic, parts):
    full = dict(elastic.named_parameters())
    for sub, loaded in parts:
        for name, small in loaded.named_parameters():
            layer = layer_of(name)
            stored = name if layer is None else name.replace(f"layers.{layer}.", f"layers.{sub.layers[layer]}.")
            assert len(axes(name)) == small.ndim
            assert torch.equal(small, full[stored][tuple(slice(0, size) for size in small.shape)])


@torch.no_grad()
def test_5_generation_with_cache_equals_without_and_drafting_changes_nothing(elastic, ids):
    options = {"max_new_tokens": 8, "do_sample": False}
    for sub in all_sizes(elastic, count=4):
        cached = elastic.generate(ids, flextron_budget=sub, **options)
        assert torch.equal(cached, elastic.generate(ids, flextron_budget=sub, use_cache=False, **options))
    draft = elastic.share(elastic.frontier[-1]["name"])
    plain = elastic.generate(ids[:1], **options)
    assert torch.equal(plain, elastic.generate(ids[:1], assistant_model=draft, **options))


def test_7_a_saved_folder_works_without_our_package(parent, elastic, saved, ids, tmp_path):
    budgets = [None, elastic.frontier[1]["name"], elastic.frontier[-1]["name"]]
    code = """
import json
import torch
from transformers import AutoModel, AutoModelForCausalLM, pipeline
folder, out, budgets, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), torch.tensor(json.loads(sys.argv[4]))
logits = {}
for budget in budgets:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, flextron_budget=budget)
    logits[str(budget)] = model(ids).logits.detach()
family = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
for budget in budgets[1:]:
    family.set_budget(budget)
    assert (family(ids).logits - logits[budget]).abs().max() < 1e-5
    base = AutoModel.from_pretrained(folder, trust_remote_code=True, flextron_budget=budget)
    with torch.no_grad():
        assert (model.__class__.__name__, base.__class__.__name__) == ("FlextronForCausalLM", "FlextronModel")
        assert torch.equal(base(ids).last_hidden_state, family.model(ids, flextron_budget=budget).last_hidden_state)
    with family.at_budget(budget):
        assert type(family.extract(budget, pad=True)).__name__ == sys.argv[5]
half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, flextron_budget=budgets[-1])
half.save_pretrained(out + "/again")   # a model loaded by remote code saves its code again
again = AutoModelForCausalLM.from_pretrained(out + "/again", trust_remote_code=True)
assert (again(ids).logits - logits[budgets[-1]]).abs().max() == 0
torch.save({"logits": logits, "frontier": [row.to_dict() for row in family.frontier]}, out + "/result.pt")
assert not any(name.startswith(("modeling_flextron", "flextron_trainer")) for name in sys.modules)
"""
    arguments = saved, tmp_path, json.dumps(budgets), json.dumps(ids.tolist()), type(parent).__name__
    run_python(code, *arguments, package=False)
    result = torch.load(tmp_path / "result.pt")
    assert result["frontier"] == [row.to_dict() for row in elastic.frontier]
    for budget in budgets:
        expected = elastic(ids, flextron_budget=budget or elastic.built).logits
        assert difference(expected, result["logits"][str(budget)]) < 1e-5
