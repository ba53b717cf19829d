"""Where every unit was in the parent: the value, what carries it, and stock models in the parent's order."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from helpers import elastic_of, parent_of, random_subnetworks
from shapes import VARIANTS
from training import trainer as flextron_trainer
from transformers import AutoModel

from modeling_flextron import FlextronForCausalLM
from modeling_flextron.families import axes, family_of, from_stock, layer_of, stock_name
from modeling_flextron.permutation import FILE, Permutation


def orders(model):
    return {name: order.tolist() for name, order in model.permutation._tensors().items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("permutation")
    elastic = elastic_of("gqa-wide-heads")
    elastic.config.elastic["layer_ranking"] = [1, 2, 3]
    elastic.save_pretrained(folder / "plain")
    elastic.export(folder / "levels")
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_brings_every_tensor_of_the_parent_over_and_back(variant):
    parent, elastic = parent_of(variant), elastic_of(variant)
    family, theirs = family_of(parent.config.model_type), parent.state_dict()
    permutation = elastic.permutation
    assert permutation.moved >= {"hidden", "mlp", "heads"}
    for name, ours in elastic.state_dict().items():
        dims, layer = axes(name), layer_of(name)
        view = from_stock(family, name, theirs[stock_name(family, name)], parent.config.num_attention_heads)
        assert torch.equal(permutation.to_ours(view, dims, layer), ours)
        assert torch.equal(permutation.to_parent(ours, dims, layer), view)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_of_it_as_a_stock_model_is_the_parent_bit_for_bit(variant):
    stock = elastic_of(variant).extract().state_dict()
    parent = parent_of(variant).state_dict()
    assert set(stock) == set(parent)
    assert all(torch.equal(tensor, parent[name]) for name, tensor in stock.items())


def test_a_stock_model_of_a_part_has_its_units_in_the_parents_order():
    elastic = elastic_of("mha")
    parent = dict(parent_of("mha").named_parameters())
    for sub in [elastic.resolve_budget({"mlp": 48}), elastic.resolve_budget({"heads": 2, "hidden": 48})]:
        stock, part = elastic.extract(sub, pad=True), elastic.permutation.narrowed(sub)
        neurons, channels = (index.sort().values for index in part.indices(("mlp", "hidden"), 2))
        expected = parent["model.layers.2.mlp.up_proj.weight"][neurons][:, channels]
        assert torch.equal(stock.model.layers[2].mlp.up_proj.weight, expected)
        if sub.hidden == 64:  # and nothing is moved along an axis that is not cut
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "input_layernorm"):
                name = f"model.layers.1.{name}.weight"
                assert torch.equal(stock.get_parameter(name), parent[name])


def test_an_axis_that_cannot_shrink_stays_as_it_is():
    parent = parent_of("mha").state_dict()
    for axis in ("mlp", "heads", "hidden"):
        elastic = elastic_of("mha", **{axis: [1]})
        others = {"mlp": {"mlp"}, "heads": {"heads", "kv_heads"}, "hidden": {"hidden"}}
        assert elastic.permutation.moved == set.union(*(moved for key, moved in others.items() if key != axis))
    assert torch.equal(elastic.model.embed_tokens.weight, parent["model.embed_tokens.weight"])
    assert elastic_of("mha", mlp=[1], heads=[1], hidden=[1]).permutation.moved == set()
    grouped = elastic_of("gqa-wide-heads", mlp=[1], heads=[1], hidden=[1]).permutation
    assert grouped.moved == {"heads"} and grouped.heads[0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_narrows_as_the_model_does():
    elastic = elastic_of("gqa-wide-heads")
    for sub in random_subnetworks(elastic, 5):
        part = elastic.permutation.narrowed(sub)
        assert part.layers == sub.layers and part.hidden.tolist() == elastic.permutation.hidden[: sub.hidden].tolist()
        assert tuple(map(len, part.mlp)) == sub.mlp and tuple(map(len, part.heads)) == sub.heads
        assert {len(order) for order in part.kv_heads} == {2}
        assert part.conversion == elastic.permutation.conversion and part.sizes == elastic.permutation.sizes


def test_is_made_on_the_cpu_whatever_the_default_device_is(saved):
    with torch.device("meta"):
        elastic = elastic_of("gqa-wide-heads")
        permutation = Permutation.unsorted(elastic.config)
        assert permutation.moved == {"heads"} and elastic.permutation.moved == {"hidden", "mlp", "heads"}
        assert permutation.indices(("heads",), 0)[0].device.type == "cpu"


# --------------------------------------------------------------------------------------------- what carries it


@pytest.mark.parametrize("layout", ["plain", "levels"])
@pytest.mark.parametrize("budget", [None, "0.35", "0.15", {"mlp": [96, 48, 24, 96], "heads": [8, 4, 8, 4]}])
def test_survives_loading_and_saving(saved, tmp_path, layout, budget):
    whole = elastic_of("gqa-wide-heads").permutation
    loaded = FlextronForCausalLM.from_pretrained(saved / layout, flextron_budget=budget)
    expected = whole if budget is None else whole.narrowed(loaded.stored)
    assert {name: order.tolist() for name, order in expected._tensors().items()} == orders(loaded)
    loaded.save_pretrained(tmp_path / "again")  # of its own size now
    again = FlextronForCausalLM.from_pretrained(tmp_path / "again")
    assert orders(again) == orders(loaded) and again.permutation.conversion == whole.conversion
    smallest = FlextronForCausalLM.from_pretrained(tmp_path / "again", flextron_budget={"mlp": 24, "hidden": 32})
    assert orders(smallest)["hidden"] == whole.hidden[:32].tolist() and smallest.permutation.layers == expected.layers
    assert AutoModel.from_pretrained(saved / layout, flextron_budget=budget).permutation.layers == expected.layers
    assert orders(loaded.share(None)) == orders(loaded)


def test_survives_training(saved, tmp_path):
    flextron_trainer(tmp_path, begin=saved / "plain", max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = FlextronForCausalLM.from_pretrained(tmp_path / "checkpoint-1", flextron_budget="0.35")
    assert orders(checkpoint) == orders(FlextronForCausalLM.from_pretrained(saved / "levels", flextron_budget="0.35"))


def old_checkpoint(saved, folder):
    """As it was written before there were permutations."""
    shutil.copytree(saved, folder)
    shutil.rmtree((folder / FILE).parent)
    config = json.loads((folder / "config.json").read_text())
    del config["permutation"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_checkpoint_without_one_loads_and_extracts(saved, tmp_path):
    folder = old_checkpoint(saved / "levels", tmp_path / "old")
    elastic = elastic_of("gqa-wide-heads")
    elastic.config.elastic["layer_ranking"] = [1, 2, 3]
    ids = torch.arange(1, 9)[None]
    for budget in (None, "0.35"):
        old = FlextronForCausalLM.from_pretrained(folder, flextron_budget=budget)
        assert old.permutation is None and old.config.permutation is None
        with torch.no_grad():
            expected = elastic(ids, flextron_budget=budget).logits
            torch.testing.assert_close(old.extract()(ids).logits, expected, atol=1e-5, rtol=0)
        old.save_pretrained(tmp_path / "again")
        assert FlextronForCausalLM.from_pretrained(tmp_path / "again").permutation is None


def test_one_of_another_model_or_a_broken_one_is_not_used(saved, tmp_path, caplog):
    def loaded(change):
        shutil.copytree(saved / "plain", tmp_path, dirs_exist_ok=True)
        change(tmp_path / FILE)
        caplog.clear()
        model = FlextronForCausalLM.from_pretrained(tmp_path)
        assert model.permutation is None
        assert "Adapters of the parent will be refused" in caplog.text
        model.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "config.json").read_text())["permutation"] is None

    transformers.logging.enable_propagation()
    whole = elastic_of("gqa-wide-heads").permutation
    loaded(lambda path: path.write_bytes(path.read_bytes()[:-8]))
    loaded(lambda path: path.unlink())
    loaded(lambda path: elastic_of("mha").permutation.save(path))
    loaded(lambda path: elastic_of("gqa-wide-heads", order="reverse").permutation.save(path))
    loaded(lambda path: whole.narrowed(random_subnetworks(elastic_of("gqa-wide-heads"), 1)[0]).save(path))
    twice = replace(whole, hidden=torch.full_like(whole.hidden, 3))
    loaded(twice.save)
    transformers.logging.disable_propagation()


def test_the_same_conversion_has_the_same_name():
    one, same, other = (elastic_of("mha", parent_of("mha"), **c).permutation for c in ({}, {}, {"order": "reverse"}))
    assert one.conversion == same.conversion != other.conversion
    assert elastic_of("mha", hidden=[1]).permutation.conversion != one.conversion
