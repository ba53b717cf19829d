"""Rows use their budgets: chosen together, over real shapes, by size or by loss."""

import copy
import dataclasses
import json
import warnings
from itertools import pairwise

import pytest
from helpers import elastic_of
from transformers import AutoConfig, GPT2Config, LlamaConfig

from flextron_trainer.conversion.rows import USED, choose_rows, named_budgets
from flextron_trainer.conversion.sizes import elastic_config
from flextron_trainer.presets import load_preset, names
from modeling_flextron import FlextronConfig
from modeling_flextron.extraction import misfit
from modeling_flextron.frontier import FrontierRow
from modeling_flextron.subnetwork import smallest_subnetwork

# Query heads, KV heads, channels in a head, neurons: real ones, and some that nothing divides.
ODD = [
    (9, 3, 64, 1536), (15, 5, 64, 2560), (12, 12, 64, 3072), (14, 2, 64, 4864), (7, 1, 64, 1365),
    (25, 25, 64, 6400), (40, 8, 128, 27648), (28, 4, 128, 18944), (8, 4, 8, 172), (3, 3, 64, 768),
]  # fmt: skip


def llama(heads: int, kv_heads: int, head_dim: int, neurons: int, layers: int = 12) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        intermediate_size=neurons, num_hidden_layers=layers, vocab_size=512,
    )  # fmt: skip


def check(config, budgets=(1, 0.75, 0.5, 0.25)) -> None:
    """Each row uses 95 % of its budget at least, nests in the one before, and fits the stock class."""
    within = config.built
    for row, budget in zip(config.frontier, budgets, strict=True):
        subnetwork = config.resolve(budget)
        assert subnetwork == config.resolve(row["subnetwork"])
        assert USED * budget <= row["non_embedding_parameters"] / config.parent_size() <= budget, (budget, row)
        assert within.contains(subnetwork) and misfit(config, subnetwork) is None
        within = subnetwork


@pytest.mark.parametrize("name", names())
def test_default_choices_of_the_presets_parents(name):
    parent = load_preset(name).parent_config()
    if name == "qwen3-0.6b":  # whose smallest network by MLP and heads alone is larger than a quarter
        with pytest.warns(UserWarning, match="do not reach budget 0.25"):
            config = elastic_config(parent)
        assert config.resolve(config.frontier[-1]["name"]) == smallest_subnetwork(config)
        return check(elastic_config(parent, budgets=[1, 0.75, 0.5, 0.35]), (1, 0.75, 0.5, 0.35))
    check(elastic_config(parent))


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_default_choices_of_odd_shapes(shape):
    config = elastic_config(llama(*shape))
    assert len(config.choices("heads")) > 1 and len(config.choices("mlp")) > 20
    check(config)


def test_the_choices_of_the_readme():
    """Whose row of 0.75 once took so many heads that 0.31 was left for the one of 0.5."""
    for name in ("llama-3.2-1b", "llama-3.1-8b", "llama-2-7b", "tinyllama-1.1b"):
        choices = {"mlp": [1, 0.75, 0.5, 0.25], "heads": [1, 0.5]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = elastic_config(load_preset(name).parent_config(), **choices, budgets=[1, 0.75, 0.5])
        assert config.frontier[-1]["non_embedding_parameters"] / config.parent_size() > 0.37


def test_a_row_that_cannot_use_its_budget_is_named_with_what_would_help():
    with pytest.warns(UserWarning, match=r"Row '0.7' uses 71% .* of `mlp` between 3072 and 1024.*`nested=False`"):
        elastic_config(llama(12, 12, 64, 3072), mlp=[1, 1024], heads=[1], budgets=[1, 0.7])


def test_rows_by_themselves():
    """The choices have a network for each budget, of which none is inside the other."""
    choices = {"mlp": [1, 0.5], "heads": [1, 0.25], "hidden": [1, 0.75, 0.375], "budgets": [1, 0.75, 0.375]}
    with pytest.warns(UserWarning, match="uses"):
        nested = elastic_config(llama(12, 12, 64, 3072), **choices | {"hidden": [1, 0.75]})
    within = nested.resolve(nested.frontier[1]["subnetwork"])
    assert within.contains(nested.resolve(nested.frontier[2]["subnetwork"]))
    budgets = named_budgets(nested, [1, 0.75, 0.375])
    alone = choose_rows(nested, budgets, None, nested=False)
    shares = [row["non_embedding_parameters"] / nested.parent_size() for row in alone]
    best = [row["non_embedding_parameters"] / nested.parent_size() for row in nested.frontier]
    assert all(a >= b for a, b in zip(shares, best, strict=True))


def test_losses_decide_over_all_rows_together():
    """A network that is a little better for one budget alone is not worth a much worse one for the next."""
    config = elastic_config(llama(12, 12, 64, 3072))

    def loss(subnetwork):  # heads matter far more than neurons where there are few
        return 100.0 / subnetwork.heads[0] ** 2 + (1e-3 if subnetwork.heads[0] == 12 else 0.0)

    rows = choose_rows(config, named_budgets(config, [1, 0.75, 0.5]), loss)
    chosen = [config.resolve(row["subnetwork"]) for row in rows]
    assert [s.heads[0] for s in chosen] == [12, 12, 12]
    assert all(a.contains(b) for a, b in pairwise(chosen))


def test_gpt_rows_fit_the_stock_class():
    check(elastic_config(GPT2Config(n_embd=768, n_head=12, n_layer=4, vocab_size=512)))


class TestRows:
    """A row is a value of its own class; `config.json` holds it as before."""

    @pytest.fixture
    def config(self):
        return elastic_of("mha").config

    def test_rows_are_read_and_written_as_they_were(self, config, tmp_path):
        config.record({"1": {"loss": 2.0, "accuracy": 0.5}}, text="wiki", tokens=9)
        config.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())["frontier"]
        again = AutoConfig.from_pretrained(tmp_path)
        assert again.frontier == config.frontier == copy.deepcopy(config).frontier
        assert written == config.to_dict()["frontier"] == again.to_diff_dict()["frontier"]
        assert set(written[1]["subnetwork"]) == {"hidden", "layers", "mlp", "heads"}
        assert written[0]["measured"][0]["figures"] == ["accuracy", "loss"] and written[1]["measured"] == []
        for row, values in zip(config.frontier, written, strict=True):
            assert row.to_dict() == values == {field: row[field] for field in values}
            assert FrontierRow.from_dict(config, values) == row and config.resolve(row.name) == row.subnetwork

    def test_dicts_become_rows_where_they_are_checked(self, config):
        rows = config.frontier
        config.frontier = [row.to_dict() for row in rows]
        assert config.to_dict()["frontier"] == [row.to_dict() for row in rows]
        config.validate()
        assert config.frontier == rows and FlextronConfig(**config.to_dict()).frontier == rows

    def test_rows_do_not_change(self, config):
        full, before = config.frontier[0], copy.deepcopy(config.frontier)
        config.record({"1": {"loss": 2.0}}, text="wiki")
        assert full.loss is None and config.frontier[0].loss == 2.0 and config.frontier[1:] == before[1:]
        measured = config.frontier[0]
        config.forget_measurements()
        assert config.frontier == before and measured.loss == 2.0
        with pytest.raises(dataclasses.FrozenInstanceError):
            full.loss = 1.0

    def test_what_sizes_mean_follows_the_config(self, config):
        """Another order of the layers: the rows have as many of them as before."""
        config.elastic["layer_ranking"] = config.elastic["layer_ranking"][::-1]
        config.validate()
        for row in config.frontier:
            assert row.subnetwork.layers == config.kept_layers(len(row.subnetwork.layers))
