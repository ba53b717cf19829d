"""Rotation into principal axes: exact at full size, and worth something where the hidden axis is cut."""

import copy

import pytest
import torch
from helpers import difference, parent_of
from shapes import VARIANTS
from transformers import AutoModelForCausalLM

from flextron_trainer import convert
from flextron_trainer.conversion.rotation import principal_axes, rotate
from flextron_trainer.conversion.sizes import family_config
from flextron_trainer.conversion.weights import take
from modeling_flextron import FlextronForCausalLM

DATA = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(2))
RMS = [variant for variant in VARIANTS if variant not in ("gpt2", "neox", "neox-serial")]
HOW = {"hidden": [1, 0.5], "budgets": [1, 0.5], "sequence_length": 24, "batch_size": 4}


@pytest.mark.parametrize("variant", RMS)
def test_the_full_network_stays_the_parent_and_the_hidden_axis_is_turned(variant):
    parent = parent_of(variant)
    config = family_config(parent.config, {"mlp": None, "heads": None, "hidden": [1, 0.5], "depth": None})
    elastic = take(parent, config, release=False)
    before = copy.deepcopy(elastic)
    rotate(elastic, [DATA[:8]])
    assert difference(elastic(DATA).logits, parent(DATA).logits) < 1e-4
    assert not elastic.config.tie_word_embeddings
    assert elastic.lm_head.weight is not elastic.model.embed_tokens.weight
    assert all((norm.weight == 1).all() for norm in (elastic.model.norm, elastic.model.layers[1].input_layernorm))
    turned = before.model.embed_tokens.weight.double() @ principal_axes(before, [DATA[:8]])
    torch.testing.assert_close(elastic.model.embed_tokens.weight, turned.float(), rtol=0, atol=1e-5)


def test_leading_channels_hold_most_of_what_the_layers_read():
    elastic = convert(parent_of("gqa-wide-heads"), DATA, rotate=True, corrections=0, **HOW)
    energy = torch.zeros(64)

    def observe(kind, layer, *activations):
        if kind == "layer":
            energy.add_(torch.nn.functional.rms_norm(activations[1], (64,)).square().mean((0, 1)))

    with torch.no_grad():
        elastic.model(DATA, observe=observe, use_cache=False)
    best = energy.sort(descending=True).values
    assert energy[:32].sum() > 0.97 * best[:32].sum()
    assert energy[:32].sum() > 0.7 * energy.sum()


def test_a_rotated_model_is_saved_loaded_and_extracted_as_any_other(tmp_path):
    parent = parent_of("gqa-tied-llama3")
    elastic = convert(parent, DATA, rotate=True, corrections=0.2, **HOW)
    elastic.save_pretrained(tmp_path)
    for budget in (1, 0.5):
        expected = elastic(DATA, flextron_budget=budget).logits
        loaded = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget=budget)
        assert difference(loaded(DATA).logits, expected) < 1e-4
        elastic.extract(budget).save_pretrained(tmp_path / f"dense-{budget}")
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / f"dense-{budget}")
        assert difference(dense(DATA).logits, expected) < 1e-4
    assert difference(elastic(DATA).logits, parent(DATA).logits) < 1e-4
    assert loaded.config.permutation == elastic.config.permutation and loaded.permutation.rotated


def test_what_cannot_be_rotated_is_refused():
    with pytest.raises(ValueError, match="Layer norms"):
        convert(parent_of("gpt2"), DATA, rotate=True, **{**HOW, "hidden": [64, 32]})
    with pytest.raises(ValueError, match="smaller sizes of `hidden`"):
        convert(parent_of("mha"), DATA, rotate=True)
    with pytest.raises(ValueError, match="smaller sizes of `hidden`"):
        convert(parent_of("mha"), "weights", rotate=True, hidden=[1, 0.5])


def test_no_adapter_of_the_parent_or_of_another_rotation_fits(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(parent_of("mha"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    adapted.save_pretrained(tmp_path / "of-the-parent")
    elastic = convert(parent_of("mha"), DATA, rotate=True, **HOW)
    with pytest.raises(ValueError, match="rotated in the conversion"):
        elastic.load_adapter(str(tmp_path / "of-the-parent"))
    other = convert(parent_of("mha"), DATA.flip(0)[:12], rotate=True, **HOW)
    assert other.permutation.conversion != elastic.permutation.conversion


def test_scores_of_one_parent_serve_conversions_with_and_without(tmp_path):
    how = {**HOW, "importance": tmp_path / "scores.safetensors"}
    convert(parent_of("mha"), DATA, **how)
    with pytest.warns(UserWarning, match="measured again"):
        turned = convert(parent_of("mha"), DATA, rotate=True, **how)
    again = convert(parent_of("mha"), DATA, rotate=True, **how)
    assert difference(turned(DATA).logits, again(DATA).logits) < 1e-5
