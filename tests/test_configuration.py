"""`FlextronConfig`: round trips, defaults, narrowing. Malformed input is in test_bad_input.py."""

import json
from itertools import pairwise

import pytest
from helpers import all_sizes
from transformers import AutoConfig

from modeling_flextron import FlextronConfig, count_parameters
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
