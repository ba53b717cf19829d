"""The tables between stock models and ours, in both directions."""

import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
from helpers import difference, elastic_of, parent_of, random_subnetworks
from shapes import VARIANTS
from transformers import AutoModelForCausalLM, GenerationConfig

from modeling_flextron import FlextronForCausalLM, count_parameters
from modeling_flextron.extraction import fitting, misfit, stock_sizes
from modeling_flextron.families import axes, family_of, head_rows, stock_name, stored_heads
from modeling_flextron.modeling_flextron import FlextronAttention


def test_every_tensor_of_ours_is_in_the_table(elastic, parent):
    family = family_of(parent.config.model_type)
    ours = {stock_name(family, name) for name in elastic.state_dict()}
    assert ours == set(parent.state_dict())
    assert sum(t.numel() for t in elastic.state_dict().values()) == sum(t.numel() for t in parent.state_dict().values())
    for name, tensor in elastic.state_dict().items():
        assert len(axes(name)) == tensor.ndim


def test_config_fields_go_there_and_back(elastic, parent):
    stock = elastic.extract().config
    ignored = ("architectures", "dtype", "transformers_version", "_name_or_path", "head_dim", "max_window_layers")
    before, after = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (parent.config, stock))
    assert before == after
    for ours, theirs in family_of(parent.config.model_type).fields.items():
        if hasattr(parent.config, theirs):
            assert getattr(stock, theirs) == getattr(parent.config, theirs)
            assert getattr(elastic.config, ours) == getattr(parent.config, theirs) or ours == "layer_types"


def test_head_order_is_rank_major():
    # three KV heads with two query heads each: the first of every group, then the second of every group
    assert stored_heads(6, 3) == [0, 2, 4, 1, 3, 5]
    assert stored_heads(4, 4) == [0, 1, 2, 3] and stored_heads(4, 1) == [0, 1, 2, 3]
    assert head_rows([1, 0], 2).tolist() == [2, 3, 0, 1]


def test_extract_keeps_dtype_device_tying_and_generation_settings():
    parent = parent_of("gqa-tied-llama3").bfloat16()
    parent.generation_config = GenerationConfig(max_new_tokens=3, temperature=0.5, do_sample=True)
    elastic = elastic_of("gqa-tied-llama3", parent)
    stock = elastic.extract("0.6")
    assert stock.dtype == torch.bfloat16 == stock.config.dtype
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    assert stock.generation_config.max_new_tokens == 3
    assert not stock.training


def test_extract_copies(elastic):
    mine = {tensor.data_ptr() for tensor in elastic.parameters()}
    assert not mine & {tensor.data_ptr() for tensor in elastic.extract().parameters()}


@torch.no_grad()
def test_extract_from_a_part_that_was_loaded(elastic, ids, tmp_path):
    elastic.save_pretrained(tmp_path)
    name = elastic.frontier[2]["name"]
    part = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget=name)
    assert difference(part.extract()(ids).logits, elastic(ids, flextron_budget=name).logits) < 1e-5


def test_what_no_stock_class_holds_is_refused_with_a_way_out():
    elastic = elastic_of("gqa-wide-heads", heads=[1, 0.75, 0.5, 0.25])
    with pytest.raises(ValueError, match="same sizes in every layer"):
        elastic.extract({"mlp": [96, 48, 48, 48]})
    with pytest.raises(ValueError, match=r"does not divide.*'heads': 8.*`pad=True`"):
        elastic.extract({"heads": 6})


def test_hidden_sizes_and_head_counts_of_families_that_tie_them():
    for variant in ("gpt2", "neox"):
        elastic = elastic_of(variant)
        with pytest.raises(ValueError, match="hidden / 16 heads, which makes 4"):
            elastic.extract({"heads": 2})
        assert elastic.extract({"heads": 2}, pad=True).config.num_attention_heads == 4
        with pytest.raises(ValueError, match="nearest sub-network that fits is"):
            elastic.extract({"hidden": 32, "heads": 4}, pad=True)  # four heads of 16 are more than 32


@pytest.mark.parametrize(
    "variant, option",
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"reorder_and_upcast_attn": True}),
        ("gpt2", {"add_cross_attention": True}),
        ("mha", {"is_causal": False}),
        ("qwen3", {"num_experts": 4}),
        ("neox", {"alibi": True}),
    ],
)
def test_unsupported_options_are_refused_by_name(variant, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        elastic_of(variant, parent_of(variant, **option))


def test_every_row_of_the_frontier_can_be_extracted():
    elastic = elastic_of("gqa-wide-heads", heads=[1, 0.75, 0.5, 0.25])
    for row in elastic.frontier:
        assert elastic.extract(row["name"]).num_parameters() == row["parameters"]


@torch.no_grad()
def test_the_family_that_the_documentation_adds(monkeypatch, ids, tmp_path):
    from transformers import AutoModelForCausalLM, StableLmConfig, StableLmForCausalLM

    from flextron_trainer import convert
    from modeling_flextron import families

    text = (Path(__file__).parent.parent / "docs" / "families.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 10
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    exec(code, vars(families))
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "use_qkv_bias": True}
    parent = StableLmForCausalLM(StableLmConfig(**shape, **heads)).eval()
    elastic = convert(parent, torch.randint(0, 96, (8, 16)), hidden=[1, 0.5], heads=[1, 0.5], budgets=[1, 0.6, 0.3])
    assert difference(parent(ids).logits, elastic(ids).logits) < 1e-5
    for row in elastic.frontier:
        elastic.extract(row["name"]).save_pretrained(tmp_path / row["name"])
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / row["name"])
        assert type(stock) is StableLmForCausalLM
        assert difference(stock(ids).logits, elastic(ids, flextron_budget=row["name"]).logits) < 1e-5


@torch.no_grad()
def test_a_gpt2_whose_config_leaves_the_mlp_out(ids):
    parent = parent_of("gpt2", n_inner=None)
    elastic = elastic_of("gpt2", parent)
    assert elastic.config.intermediate_size == 256 == elastic.extract().config.n_inner
    assert difference(parent(ids).logits, elastic.extract()(ids).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gqa-wide-heads", "mistral", "qwen2", "qwen3"])
def test_a_rotary_factor_that_the_stock_class_ignores(variant, ids):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    parent = parent_of(variant, rope_parameters=rope)
    elastic = elastic_of(variant, parent)
    assert difference(parent(ids).logits, elastic(ids).logits) < 1e-5
    assert difference(parent(ids).logits, elastic.extract()(ids).logits) < 1e-5


def test_gradients_are_those_of_the_parent(elastic, parent, ids):
    """Of every embedding too, that of the padding token included, which some families train."""
    family = family_of(parent.config.model_type)
    models = [copy.deepcopy(model).train() for model in (parent, elastic)]
    text = ids.clone()
    text[:, 3] = parent.config.pad_token_id
    for model in models:
        model(text, labels=text, use_cache=False).loss.backward()
    theirs, ours = (dict(model.named_parameters()) for model in models)
    hidden = elastic.model.embed_tokens.weight[:, None] == models[0].get_input_embeddings().weight[:, :, None]
    order = hidden.all(0).int().argmax(0)  # of our channels in the parent
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        gradient = theirs[stock_name(family, name)].grad
        assert difference(ours[name].grad, gradient[..., order]) < 1e-5 * gradient.abs().max() + 1e-6


def test_nothing_that_is_held_fits_the_stock_class(tmp_path, ids):
    """Without choices of `hidden`, no smaller number of heads makes a GPT-2."""
    elastic = elastic_of("gpt2", hidden=[1], depth=[1], budgets=[1])
    elastic.save_pretrained(tmp_path)
    part = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget={"heads": 2})
    with pytest.raises(ValueError, match=r"Load more of the checkpoint\. With `pad=True`"):
        part.extract()
    with torch.no_grad():
        assert difference(part.extract(pad=True)(ids).logits, part(ids).logits) < 1e-5


def test_buffers_of_old_gpt2_checkpoints(tmp_path):
    from safetensors.torch import load_file, save_file

    from flextron_trainer import convert

    parent_of("gpt2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {f"transformer.h.{i}.attn.{name}": torch.ones(1) for i in range(4) for name in ("bias", "masked_bias")}
    save_file(load_file(file) | old, file, {"format": "pt"})
    assert convert(tmp_path, [[1, 2, 3]]).config.base_model_type == "gpt2"


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_default_conversion_fit_the_stock_class(variant):
    elastic = elastic_of(variant, **dict.fromkeys(("mlp", "heads", "hidden", "depth")), budgets=[1, 0.75, 0.5])
    for row in elastic.frontier:
        assert elastic.extract(row["name"]).num_parameters() == row["parameters"]


@torch.no_grad()
def test_every_row_is_exported_for_all_readers_and_reads_back(elastic, parent, ids, tmp_path):
    """With the additional names in config.json, which must not change what transformers 5 computes."""
    from flextron_trainer.export.dense import export_dense

    elastic.save_pretrained(tmp_path / "elastic")
    for row in elastic.frontier:
        sub = elastic.resolve_budget(row["name"])
        result = export_dense(tmp_path / "elastic", tmp_path / row["name"], row["name"], snap=True)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / row["name"])
        assert type(stock) is type(parent) and stock.num_parameters() == result["parameters"] == row["parameters"]
        assert (
            result["changed"] == "" and difference(stock(ids).logits, elastic(ids, flextron_budget=sub).logits) < 1e-5
        )
        assert not list((tmp_path / row["name"]).glob("*.py"))


@torch.no_grad()
def test_snapping_finds_the_largest_that_fits(elastic, ids):
    config = elastic.config
    for sub in random_subnetworks(elastic, 4):
        sizes = stock_sizes(config, sub, snap=True)
        cost = count_parameters(config, sizes)
        assert misfit(config, sizes) is None and cost <= count_parameters(config, sub)
        assert not any(cost < count_parameters(config, s) <= count_parameters(config, sub) for s in fitting(config))
        stock = elastic.extract(sub, snap=True)
        assert difference(stock(ids).logits, elastic(ids, flextron_budget=sizes).logits) < 1e-5


def test_vllm_finds_the_attention_interface():
    """vLLM 0.32 takes the one call of it in the source of `forward`; what it computes is checked by `make interop`."""
    source = inspect.getsource(FlextronAttention.forward)
    assert source.count("ALL_ATTENTION_FUNCTIONS.get_interface(") == source.count("attention_interface(\n") == 1
