"""`FlextronConfig`: round trips, defaults, narrowing. Malformed input is in test_bad_input.py."""

import json
from itertools import pairwise

import pytest
import torch
from helpers import all_sizes, difference, elastic_of
from test_token_routing import routed
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_flextron import FlextronConfig, FlextronForCausalLM, count_parameters
from modeling_flextron.configuration_flextron import VERSION

SMALL = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "elastic": {"mlp": [64, 32], "heads": [4, 2], "depth": [3, 2], "layer_ranking": [1]},
}  # fmt: skip


def test_defaults_fill_every_axis_with_the_full_size():
    config = FlextronConfig(**{**SMALL, "elastic": None})
    assert config.elastic == {"mlp": [64], "heads": [4], "hidden": [32], "depth": [3], "layer_ranking": []}
    assert [row["name"] for row in config.frontier] == ["1"]
    assert config.head_dim == 8 and config.num_key_value_heads == 4


def test_json_round_trip(elastic, tmp_path):
    config = elastic.config
    config.save_pretrained(tmp_path)
    again = FlextronConfig.from_pretrained(tmp_path)
    assert again.elastic == config.elastic and again.frontier == config.frontier and again.built == config.built
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"].endswith("FlextronModel")


def test_the_budget_keyword_reaches_the_config(tmp_path):
    FlextronConfig(**SMALL).save_pretrained(tmp_path)
    assert FlextronConfig.from_pretrained(tmp_path, flextron_budget=0.5).flextron_budget == 0.5
    assert FlextronConfig.from_pretrained(tmp_path, flextron_context=7).flextron_context == 7
    with pytest.raises(ValueError, match="flextron_budget"):
        FlextronConfig.from_pretrained(tmp_path, flextron_budget=[0.5])


def test_narrowed_config_describes_the_small_model(elastic):
    config = elastic.config
    for sub in all_sizes(elastic):
        small = config.narrowed(sub)
        assert small.built == sub.within(sub)
        assert count_parameters(small, small.built) == count_parameters(config, sub)
        assert small.parent_size() == config.parent_size()
        assert small.flextron_budget is None
        held = [row for row in small.frontier if row["subnetwork"] is not None]
        assert small.resolve(held[0]["subnetwork"]) == small.built
        for row in held:
            assert small.built.contains(small.resolve(row["subnetwork"]))


def test_narrowing_twice_is_narrowing_once(elastic):
    rows = [elastic.config.resolve(row["subnetwork"]) for row in elastic.frontier]
    for outer, inner in pairwise(rows):
        twice = elastic.config.narrowed(outer).narrowed(inner.within(outer))
        once = elastic.config.narrowed(inner)
        assert twice.to_dict() == once.to_dict()


def test_a_heterogeneous_config_is_written_as_per_layer_config(tmp_path):
    config = FlextronConfig(**SMALL)
    small = config.narrowed(config.resolve({"mlp": [64, 32, 64], "heads": [2, 4, 2]}))
    small.save_pretrained(tmp_path)
    again = FlextronConfig.from_pretrained(tmp_path)
    assert [layer.intermediate_size for layer in again.per_layer_config] == [64, 32, 64]
    assert [layer.num_key_value_heads for layer in again.per_layer_config] == [2, 4, 2]
    assert again.built == small.built


def test_depth_keeps_what_the_ranking_does_not_drop():
    config = FlextronConfig(**SMALL)
    assert config.kept_layers(3) == (0, 1, 2) and config.kept_layers(2) == (0, 2)


def test_a_row_is_reached_by_its_own_name():
    config = FlextronConfig(**SMALL)
    sizes = {"0.9": 64, "0.95": 32, "40K": 64, "50000": 32, "9MB": 64, "10MiB": 32, "small": 32}
    rows = [config.row(name, config.resolve({"mlp": mlp, "heads": 2})) for name, mlp in sizes.items()]
    config = FlextronConfig(**SMALL, frontier=[*config.frontier, *rows])
    for row in config.frontier:  # also those that are much smaller than what would fit into their budget
        assert config.resolve(row["name"]) == config.resolve(row["subnetwork"])
    for name, same in (("0.5", "0.50"), ("1K", "1000")):
        two = [config.row(each, config.resolve({"mlp": 32, "heads": 2, "layers": 2})) for each in (name, same)]
        with pytest.raises(ValueError, match=r"cannot be used\. A row is reached by its name"):
            FlextronConfig(**SMALL, frontier=two)


@pytest.mark.parametrize(("version", "word"), [("99.1", "the older"), ("0.0.9", "the newer"), (VERSION, None)])
def test_says_which_code_runs(tmp_path, caplog, version, word):
    FlextronConfig(**SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    assert f'"flextron_version": "{VERSION}"' in path.read_text()
    path.write_text(path.read_text().replace(f'"flextron_version": "{VERSION}"', f'"flextron_version": "{version}"'))
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(config) is FlextronConfig and config.flextron_version == version
    lines = [record.message for record in caplog.records if "what runs is" in record.message]
    assert len(lines) == (word is not None)
    if word:
        assert f"is Flextron {version}; what runs is {word} {VERSION} in " in lines[0] and str(tmp_path) in lines[0]


COSTS = ("parameters", "non_embedding_parameters", "kv_values_per_token")
FIELDS = {  # of the shape, each changed alone; None for the opposite of a flag
    "vocab_size": 50, "tie_word_embeddings": None, "max_position_embeddings": 256, "head_dim": 8, "norm_type": "layer",
    "attention_bias": None, "attention_output_bias": None, "mlp_bias": None, "gated_mlp": None, "qk_norm": None,
    "parallel_residual": None, "num_key_value_heads": 1,
}  # fmt: skip
SIZES = {
    "one layer": {"num_hidden_layers": 1}, "more layers": {"num_hidden_layers": 6}, "narrow": {"hidden_size": 48},
    "wide": {"hidden_size": 72}, "few neurons": {"intermediate_size": 48}, "many neurons": {"intermediate_size": 100},
    "many heads": {"num_attention_heads": 16}, "many KV heads": {"num_attention_heads": 12, "num_key_value_heads": 6},
    "everything": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2,
                   "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 96},
}  # fmt: skip


@pytest.fixture(params=["keyword", "constructor", "attribute"])
def changed(request, tmp_path):
    """A function that changes fields of a config, in each of the ways in which users do it."""

    def change(config, **changes):
        if request.param == "constructor":
            return FlextronConfig(**{**config.to_diff_dict(), **changes})
        config.save_pretrained(tmp_path)
        if request.param == "attribute":
            config = FlextronConfig.from_pretrained(tmp_path)
            config.update(changes)
            config.validate()
            return config
        return AutoConfig.from_pretrained(tmp_path, **changes)

    return change


def is_right(config, **changes) -> FlextronForCausalLM:
    """Check that what a config says is what a model of it has, at every size; the model."""
    model = FlextronForCausalLM(config).eval()
    for name, value in changes.items():
        assert getattr(config, name) == value
    assert model.num_parameters() == count_parameters(config, config.built)
    for row in config.frontier:
        if row["subnetwork"] is not None:
            sub = config.resolve(row["subnetwork"])
            exact = config.row(row["name"], sub)
            assert {key: row[key] for key in COSTS} == {key: exact[key] for key in COSTS}
            assert model(torch.tensor([[1, 2, 3]]), flextron_budget=sub).logits.isfinite().all()
    return model


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("variant", ["mha-tied-biased", "qwen2"])
def test_costs_follow_a_changed_shape(variant, field, changed, caplog):
    """What the rows choose is still there, so they stay; nothing is said."""
    before = elastic_of(variant).config
    value = FIELDS[field] if FIELDS[field] is not None else not getattr(before, field)
    config = changed(before, **{field: value})
    is_right(config, **{field: value})
    if field == "gated_mlp":  # a third of the MLP less, or half as much more: what a row is of the whole changes
        assert [row["subnetwork"] for row in config.frontier] == [row["subnetwork"] for row in before.frontier]
        assert all(config.resolve(row["name"]) == config.resolve(row["subnetwork"]) for row in config.frontier)
    elif field != "num_key_value_heads":  # an MHA model becomes one with groups, and other heads are allowed
        assert [row["name"] for row in config.frontier] == [row["name"] for row in before.frontier]
        assert config.elastic == before.elastic and not caplog.records


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", ["qwen2", "gpt2"])
def test_what_no_longer_fits_a_changed_shape_is_dropped_with_a_warning(variant, size, changed, caplog):
    changes = SIZES[size]
    before = routed(variant).config
    before.static_router = {"budgets": [0.3, 1.0]}
    before.static_router |= {axis: [[0.0] * len(before.choices(axis))] * 2 for axis in ("hidden", "depth")}
    for axis in ("mlp", "heads"):
        before.static_router[axis] = [[[0.0] * len(before.choices(axis))] * 4] * 2
    config = changed(before, **changes)
    is_right(config, **changes)
    assert [row["name"] for row in config.frontier] == ["1"] and config.parent_size() < 10**6
    assert config.static_router is None and config.token_routing is None
    assert len(config.layer_types) == config.num_hidden_layers
    for axis, name in {"mlp": "intermediate_size", "hidden": "hidden_size", "depth": "num_hidden_layers"}.items():
        assert config.choices(axis)[0] == getattr(config, name)
        if name not in changes:  # what still fits stays
            assert config.choices(axis) == before.choices(axis)
    said = [record.message for record in caplog.records if "another shape" in record.message]
    assert said and all("frontier, static_router, token_routing" in line for line in said)
    again = FlextronConfig(**config.to_diff_dict())
    assert again.to_diff_dict() == config.to_diff_dict()


def test_layer_kinds_and_windows_follow(changed):
    mistral, qwen = elastic_of("mistral").config, elastic_of("qwen2").config
    assert is_right(changed(mistral, sliding_window=None)).config.layer_types == ["full_attention"] * 4
    full = is_right(changed(qwen, layer_types=["full_attention"] * 4, sliding_window=None)).config
    assert len(full.frontier) == 4
    two = is_right(changed(qwen, num_hidden_layers=2)).config
    assert two.layer_types == ["full_attention"] * 2 and two.sliding_window is None


def test_rows_that_are_not_held_follow_another_vocabulary(changed):
    """Their sizes are not known in a part, but what share of them are embeddings."""
    whole = elastic_of("gqa-wide-heads").config
    part = whole.narrowed(whole.resolve("0.35"))
    for changes in ({"vocab_size": 50}, {"tie_word_embeddings": True}, {"vocab_size": 300}):
        small, large = changed(part, **changes), FlextronConfig(**{**whole.to_diff_dict(), **changes})
        assert [{key: row[key] for key in COSTS} for row in small.frontier] == [
            {key: row[key] for key in COSTS} for row in large.frontier
        ]


def test_rows_that_are_not_held_go_when_their_cost_is_not_known(changed, caplog):
    whole = elastic_of("gqa-wide-heads").config
    part = whole.narrowed(whole.resolve("0.35"))
    config = changed(part, attention_bias=True)
    assert [row["name"] for row in config.frontier] == ["0.35", "0.15"]
    assert any("'1', '0.6'" in record.message for record in caplog.records)


def test_a_part_whose_layers_differ_changes_like_any_other(changed):
    whole = elastic_of("gqa-wide-heads").config
    part = whole.narrowed(whole.resolve({"mlp": [96, 48, 72, 24], "heads": [8, 4, 8, 4]}))
    assert is_right(changed(part, vocab_size=50)).config.built.mlp == (96, 48, 72, 24)
    assert is_right(changed(part, num_hidden_layers=2)).config.built.mlp == (96, 48)
    more = is_right(changed(part, num_hidden_layers=5)).config
    assert more.built.mlp == (96, 48, 72, 24, 96) and more.choices("mlp") == [96, 72, 48, 24]
    assert is_right(changed(part, intermediate_size=80)).config.choices("mlp") == [80, 72, 48, 24]


def test_other_choices_by_keyword_take_the_place_of_a_frontier(tmp_path, caplog):
    elastic_of("gqa-wide-heads").config.save_pretrained(tmp_path)
    config = FlextronConfig.from_pretrained(tmp_path, elastic={"mlp": [96, 40]})
    assert config.choices("mlp") == [96, 40] and [row["name"] for row in config.frontier] == ["1"]
    assert any("other choices" in record.message for record in caplog.records)


def test_what_is_typed_is_still_checked(changed):
    """Sizes that contradict the rows were not written for another shape: they are an error."""
    config = elastic_of("gqa-wide-heads").config
    for changes, name in (
        ({"elastic": {**config.elastic, "mlp": [90, 48]}}, "elastic|flextron_budget"),
        ({"layer_types": ["full_attention", "linear_attention"] * 2}, "layer_types"),
        ({"num_attention_heads": 9}, "num_key_value_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"sliding_window": 8}, "sliding_window"),
    ):
        with pytest.raises(ValueError, match=f"`{name}"):
            changed(config, **changes)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["plain", "levels"])
def test_the_first_layers_of_a_checkpoint(layout, ids, tmp_path):
    """As stock models: a smaller `num_hidden_layers` takes the first layers of what is stored."""
    model = elastic_of("gqa-wide-heads")
    (model.save_pretrained if layout == "plain" else model.export)(tmp_path)
    for count in (1, 3):
        short = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=count)
        assert len(short.model.layers) == count and short.config.kept_layers(count) == tuple(range(count))
        reference = elastic_of("gqa-wide-heads")
        reference.model.layers = reference.model.layers[:count]
        reference.model.built = reference.built = short.built
        reference.set_budget(None)
        assert difference(short(ids).logits, reference(ids).logits) < 1e-5
    wrong = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 50}
    for name, value in wrong.items():
        with pytest.raises((ValueError, RuntimeError), match=r"ignore_mismatched_sizes|this model needs"):
            AutoModelForCausalLM.from_pretrained(tmp_path, **{name: value})
