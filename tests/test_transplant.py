"""Transplanting: what was trained in an elastic model of a base, on a variant of that base."""

import copy
import json

import pytest
import torch
from helpers import CHOICES, difference, elastic_of, flextron, parent_of
from test_teachers import resized, tokenizer_of

from flextron_trainer import convert, transplant
from modeling_flextron import FlextronForCausalLM
from modeling_flextron.corrections import owner_number
from modeling_flextron.families import axes, family_of, from_stock, layer_of, stock_name

DATA = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(2))
VARIANT = "gqa-wide-heads"


def moved(model, seed: int, scale: float = 0.02):
    """A copy with all weights a little elsewhere."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def same(one, other) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(t, states[1][n]) for n, t in states[0].items())


def test_both_ends_are_exact(variant, ids):
    """Without training it is the conversion of the variant in that order; of the base itself it is what was trained."""
    dtype = torch.bfloat16 if variant == "qwen2" else torch.float32
    base, untrained = parent_of(variant).to(dtype), elastic_of(variant).to(dtype)
    instruct, trained = moved(base, 1), moved(untrained, 2)
    carried = transplant(untrained, instruct, base)
    family, theirs = family_of(base.config.model_type), instruct.state_dict()
    for name, tensor in carried.state_dict().items():
        view = from_stock(family, name, theirs[stock_name(family, name)], base.config.num_attention_heads)
        assert torch.equal(tensor, untrained.permutation.to_ours(view, axes(name), layer_of(name))), name
    assert [row.subnetwork for row in carried.frontier] == [row.subnetwork for row in untrained.frontier]
    assert same(transplant(trained, base, base), trained)
    if dtype == torch.float32:
        assert difference(carried(ids).logits, instruct(ids).logits) < 1e-5


def test_it_is_the_conversion_of_the_variant_where_that_finds_the_same_order():
    base, instruct = parent_of(VARIANT), parent_of(VARIANT)
    instruct.lm_head.weight.data *= 2  # which no neuron, head or channel is ranked by
    assert same(transplant(elastic_of(VARIANT), instruct, base), elastic_of(VARIANT, instruct))


def test_the_trained_difference_is_added_to_every_size(ids):
    base, trained = parent_of(VARIANT), moved(elastic_of(VARIANT), 2)
    instruct = moved(base, 1)
    carried = transplant(trained, instruct, base)
    plain = transplant(elastic_of(VARIANT), instruct, base)
    for name, tensor in carried.state_dict().items():
        change = trained.state_dict()[name] - elastic_of(VARIANT).state_dict()[name]
        torch.testing.assert_close(tensor, plain.state_dict()[name] + change, rtol=0, atol=1e-6)
    made = carried.config.conversion["transplanted"]
    assert 0.01 < made["trained_difference"] < 1 and 0.01 < made["variant_difference"] < 1


def test_corrections_and_norms_of_rows_carry_over(tmp_path, ids):
    base = parent_of(VARIANT)
    untrained = convert(base, DATA, order="importance", corrections=0.3, **CHOICES)
    assert untrained.config.corrections
    trained, instruct = moved(untrained, 2), moved(base, 1)
    assert same(transplant(trained, base, base), trained)
    carried, states = transplant(trained, instruct, base), trained.state_dict()
    own = [name for name in states if "_correction" in name]
    assert own and all(torch.equal(carried.state_dict()[name], states[name]) for name in own)
    norms = [name for name in states if "corrections" in name and name not in own]
    for name in norms:
        shared = name.replace(f"corrections.{owner_number(name)}.", "")
        width = len(states[name])
        here = instruct.state_dict()[shared], base.state_dict()[shared]
        change = (here[0] - here[1])[untrained.permutation.hidden[:width]]
        torch.testing.assert_close(carried.state_dict()[name], states[name] + change, rtol=0, atol=1e-6)
    assert norms
    carried.save_pretrained(tmp_path)
    for row in carried.frontier:
        loaded = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget=row.name)
        assert difference(loaded(ids).logits, carried(ids, flextron_budget=row.name).logits) < 1e-4


@pytest.mark.parametrize("variant", ["mha-tied-biased", "gqa-wide-heads", "gpt2"])
@pytest.mark.parametrize("count", [90, 101])
def test_tokens_that_only_one_has(variant, count, ids):
    base, trained = parent_of(variant), moved(elastic_of(variant), 2)
    instruct = resized(moved(base, 1), count)
    whole, carried = transplant(trained, moved(base, 1), base), transplant(trained, instruct, base)
    common = min(count, 96)
    for name, tensor in carried.state_dict().items():
        if axes(name)[0] == "vocab":
            assert len(tensor) == count and torch.equal(tensor[:common], whole.state_dict()[name][:common])
        else:
            assert torch.equal(tensor, whole.state_dict()[name])
    order = trained.permutation.hidden
    added = instruct.get_input_embeddings().weight[common:][:, order]
    assert torch.equal(carried.get_input_embeddings().weight[common:], added)
    assert carried.config.vocab_size == count
    costs = [row.parameters for row in carried.frontier]
    assert costs[0] == sum(p.numel() for p in carried.parameters()) and costs != [
        r.parameters for r in trained.frontier
    ]
    assert carried(ids.clamp(max=80), flextron_budget=0.35).logits.shape[-1] == count


def test_a_part_of_an_elastic_model(tmp_path):
    base = parent_of(VARIANT)
    trained = moved(elastic_of(VARIANT), 2)
    trained.save_pretrained(tmp_path / "whole")
    FlextronForCausalLM.from_pretrained(tmp_path / "whole", flextron_budget=0.35).save_pretrained(tmp_path / "part")
    part = FlextronForCausalLM.from_pretrained(tmp_path / "part")
    carried = transplant(part, moved(base, 1), base)
    whole = transplant(trained, moved(base, 1), base)
    whole.save_pretrained(tmp_path / "carried")
    assert same(carried, FlextronForCausalLM.from_pretrained(tmp_path / "carried", flextron_budget=0.35))


def test_the_verb(tmp_path):
    base, trained = parent_of(VARIANT), moved(elastic_of(VARIANT), 2)
    instruct = moved(base, 1)
    instruct.generation_config.max_new_tokens = 7
    instruct.config.rope_parameters["rope_theta"] = 123456.0
    trained.config.record({"0.6": {"loss": 2.0}}, text="base text")
    trained.config.parent_name, trained.config.training_runs = "base", [{"steps": 3}]
    for name, model in {"base": base, "instruct": instruct, "run": trained}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer = tokenizer_of()
        tokenizer.chat_template = f"{name}: {{{{ messages[0]['content'] }}}}"
        tokenizer.save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    done = flextron("transplant", tmp_path / "run", tmp_path / "instruct", out, "--base", tmp_path / "base")
    assert done["base"] == "base" and all(row["loss"] is None for row in done["frontier"])
    carried = FlextronForCausalLM.from_pretrained(out)
    assert same(carried, transplant(trained, instruct, base))
    assert carried.generation_config.max_new_tokens == 7 and carried.config.parent_name == "instruct"
    assert carried.config.rope_parameters["rope_theta"] == 123456.0
    assert "instruct: " in (out / "chat_template.jinja").read_text()
    assert "Of the runs below the first 1 trained that model" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["training_runs"] == trained.config.training_runs
    with pytest.raises(ValueError, match=r"does not say where that is, only its name: base\."):
        transplant(tmp_path / "run", tmp_path / "instruct")
    with pytest.raises(ValueError, match="It is the folder that is read"):
        flextron("transplant", tmp_path / "run", tmp_path / "instruct", tmp_path / "instruct")
    tokenizer_of(prefix="v").save_pretrained(tmp_path / "instruct")
    with pytest.raises(ValueError, match=r"`variant`=.* Token 0 is 'v0' in its tokenizer and 'w0' in that of"):
        transplant(tmp_path / "run", tmp_path / "instruct", tmp_path / "base")


def test_what_is_refused(tmp_path):
    base, trained = parent_of(VARIANT), elastic_of(VARIANT)
    deeper = parent_of(VARIANT, num_hidden_layers=5)
    with pytest.raises(ValueError, match=r"`variant`='llama' .*shape that.*: layers is 5 and not 4\."):
        transplant(trained, deeper, base)
    with pytest.raises(ValueError, match=r"`base`='llama' .*intermediate|mlp is 64 and not 96"):
        transplant(trained, base, parent_of(VARIANT, intermediate_size=64))
    tied = parent_of(VARIANT, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"`variant`=.* tie_word_embeddings is True and not False\."):
        transplant(trained, tied, base)
    with pytest.raises(ValueError, match=r"`variant`='qwen3' .*base_model_type is 'qwen3' and not 'llama'"):
        transplant(trained, parent_of("qwen3"), base)
    stranger = moved(base, 5, 1.0)
    with pytest.raises(ValueError, match=r"`variant`=.* differs from the base by .* neither comes from the other"):
        transplant(trained, stranger, base)
    with pytest.raises(ValueError, match=r"`base`=.* differs from the elastic model by"):
        transplant(trained, stranger, stranger)
    positions = parent_of("gpt2", max_position_embeddings=100)
    with pytest.raises(ValueError, match=r"`variant`='model.embed_positions.weight' .* is \(100, 64\) of the variant"):
        transplant(elastic_of("gpt2"), positions, parent_of("gpt2"))
    with pytest.raises(ValueError, match=r"`elastic`=.* It is an elastic language model"):
        transplant(base, base, base)
    rotated = convert(base, DATA, rotate=True, order="importance", hidden=[1, 0.5], budgets=[1, 0.5])
    with pytest.raises(ValueError, match=r"`elastic`=.* rotated for its own parent"):
        transplant(rotated, base, base)
    rotated.permutation = None
    with pytest.raises(ValueError, match=r"`elastic`=.* does not know in which order its units were"):
        transplant(rotated, base, base)
