"""Budgets and costs."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from helpers import all_sizes, elastic_of
from transformers import DynamicCache, StaticCache

from flextron_trainer.training.router_stage import add_token_routers
from modeling_flextron import (
    FlextronConfig,
    LatencyTable,
    SubNetwork,
    count_parameters,
    flops_per_token,
    kv_cache_bytes,
    weight_bytes,
)
from modeling_flextron.budgets import parse_budget, resolve, row_cost
from modeling_flextron.latency import shape_of
from modeling_flextron.subnetwork import Cost, memory_of


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        (None, "full", None),
        (0.5, "fraction", 0.5),
        (1, "fraction", 1.0),
        (1.0, "fraction", 1.0),
        ("0.5", "fraction", 0.5),
        (".25", "fraction", 0.25),
        (350_000_000, "parameters", 350_000_000),
        ("350000000", "parameters", 350_000_000),
        ("350M", "parameters", 350e6),
        ("3.5B", "parameters", 3.5e9),
        ("3.5 b", "parameters", 3.5e9),
        ("6GiB", "memory", 6 * 2**30),
        ("900MiB", "memory", 900 * 2**20),
        ("1.5 GB", "memory", 1.5e9),
        ("25ms", "latency", 0.025),
        ("loss<=2.31", "loss", 2.31),
        ("ppl <= 10", "loss", math.log(10)),
        ("small", "name", "small"),
        ("auto", "auto", None),
        ("auto:0.5", "auto", 0.5),
        ("automatic", "name", "automatic"),
        ("bulk", "name", "bulk"),
    ],
)
def test_grammar(text, kind, value):
    parsed = parse_budget(text)
    assert parsed.kind == kind
    assert parsed.value == pytest.approx(value) if isinstance(value, float) else parsed.value == value


def test_costs_of_a_known_model():
    config = FlextronConfig(  # the shape of Llama-3.2-1B
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    full = config.built
    assert count_parameters(config, full) == 1_235_814_400  # as its model card says
    assert count_parameters(config, full, embeddings=False) == 1_235_814_400 - 128256 * 2048
    assert weight_bytes(config, full) == 2 * 1_235_814_400
    assert weight_bytes(config, full, torch.float32) == 4 * 1_235_814_400
    assert kv_cache_bytes(config, full, 4096) == 2 * 16 * 8 * 64 * 4096 * 2
    per_layer = 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192
    assert flops_per_token(config, full) == 2 * (16 * per_layer + 128256 * 2048)
    assert flops_per_token(config, full, context=100) - flops_per_token(config, full) == 16 * 4 * 2048 * 100


def test_every_cost_is_at_most_that_of_a_larger_network(elastic):
    config = elastic.config
    for small in all_sizes(elastic):
        for cost in (count_parameters, flops_per_token, weight_bytes):
            assert cost(config, small) <= cost(config, config.built)
        assert kv_cache_bytes(config, small, 10) <= kv_cache_bytes(config, config.built, 10)


def test_gqa_keeps_its_cache_and_mha_shrinks_it():
    gqa, mha = elastic_of("gqa-wide-heads").config, elastic_of("mha").config
    assert gqa.kv_heads(2) == gqa.kv_heads(8) == 2
    assert [mha.kv_heads(heads) for heads in (4, 2)] == [4, 2]


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 20], ids=["within the windows", "beyond them"])
def test_kv_bytes_are_those_of_the_caches_of_transformers(elastic, length):
    """At every size, also of a model that holds a part; windows are of 7 tokens."""
    ids = torch.arange(1, length + 1)[None]
    part = type(elastic)(elastic.config.narrowed(elastic.resolve_budget({"mlp": [96, 48, 24], "layers": 3})))
    for model in (elastic, part):
        for sub in all_sizes(model, 3):
            for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=length)):
                model(ids, past_key_values=cache, use_cache=True, flextron_budget=sub)
                filled = [layer for layer in cache.layers if layer.is_initialized]
                real = sum(tensor.nbytes for layer in filled for tensor in (layer.keys, layer.values))
                static = isinstance(cache, StaticCache)
                assert kv_cache_bytes(model.config, sub, length, torch.float32, static=static) == real


def test_memory_budgets_know_windows_and_positions():
    mistral = FlextronConfig(  # the shape of Mistral-7B-v0.1
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=32768, sliding_window=4096, dtype="bfloat16",
        layer_types=["sliding_attention"] * 32, flextron_context=32768,
    )  # fmt: skip
    cache = 2 * 32 * 8 * 128 * 2
    assert kv_cache_bytes(mistral, mistral.built, 32768) == 4095 * cache
    assert kv_cache_bytes(mistral, mistral.built, 32768, static=True) == 4096 * cache
    expected = weight_bytes(mistral, mistral.built) + 4095 * cache
    assert memory_of(mistral)(mistral.built) == row_cost(mistral, mistral.frontier[0], "memory") == expected
    assert mistral.resolve(f"{expected / 2**20}MiB") == mistral.built
    short = FlextronConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, dtype="float32",
    )  # fmt: skip
    assert memory_of(short)(short.built) == weight_bytes(short, short.built) + kv_cache_bytes(short, short.built, 512)


@pytest.mark.parametrize("variant", ["mha", "gqa-wide-heads", "mistral", "qwen2"])
def test_rows_that_are_not_held_still_cost_memory(variant):
    """By the numbers that they have beside their names, for a message that says how to reload."""
    model = elastic_of(variant)
    config = model.config
    part = config.narrowed(config.resolve({**config.frontier[1]["subnetwork"], "layers": len(config.layer_types)}))
    row = part.frontier[0]
    assert row["subnetwork"] is None
    assert row_cost(part, row, "memory") == row_cost(config, config.frontier[0], "memory")
    with pytest.raises(ValueError, match=f"means row {row['name']!r}, which is not among the weights"):
        part.resolve("1GiB")


class TestResolve:
    @pytest.fixture(scope="class")
    def model(self):
        return elastic_of("gqa-wide-heads", budgets={"large": 1, "medium": 0.6, "small": 0.25})

    def test_a_fraction_is_an_upper_limit_on_non_embedding_parameters(self, model):
        full = count_parameters(model.config, model.built, embeddings=False)
        for fraction in (1.0, 0.99, 0.6, 0.4, 0.25):
            found = model.config.resolve(fraction)
            assert count_parameters(model.config, found, embeddings=False) <= fraction * full
            larger = [r for r in model.frontier if r["non_embedding_parameters"] <= fraction * full]
            assert count_parameters(model.config, found) == max(r["parameters"] for r in larger)

    def test_parameters_count_the_embeddings_too(self, model):
        row = model.frontier[1]
        assert model.config.resolve(row["parameters"]) == model.config.resolve("medium")
        assert model.config.resolve(row["parameters"] - 1) == model.config.resolve("small")

    def test_memory_is_weights_and_cache(self, model):
        config = model.config
        small = config.resolve("small")
        need = weight_bytes(config, small) + kv_cache_bytes(config, small, 128)  # all its positions
        assert config.resolve(f"{need / 2**20}MiB") == small
        with pytest.raises(ValueError, match="smallest row of the frontier, 'small', costs"):
            config.resolve(f"{need / 2**20 - 0.001}MiB")

    def test_memory_depends_on_dtype_and_context(self, model):
        values = model.config.to_dict()
        medium = model.config.resolve("medium")
        need = weight_bytes(model.config, medium) + kv_cache_bytes(model.config, medium, 128)
        half = FlextronConfig.from_dict({**values, "dtype": "bfloat16"})
        assert half.resolve(f"{need / 2 / 2**20}MiB") == half.resolve("medium")
        short = FlextronConfig.from_dict(values, flextron_context=0)
        assert short.resolve(f"{weight_bytes(short, medium) / 2**20}MiB") == short.resolve("medium")

    def test_quality_picks_the_cheapest_that_is_good_enough(self, model):
        values = model.config.to_dict()
        for row, loss in zip(values["frontier"], (2.0, 2.2, 2.6), strict=True):
            row["loss"] = loss
        config = FlextronConfig.from_dict(values)
        assert config.resolve("loss<=2.3") == config.resolve("medium")
        assert config.resolve(f"ppl<={math.exp(2.61)}") == config.resolve("small")
        with pytest.raises(ValueError, match=r"best measured loss is 2\.0000"):
            config.resolve("loss<=1.9")

    def test_a_dict_names_exact_sizes_and_the_rest_is_full(self, model):
        assert model.config.resolve({"mlp": 48}) == SubNetwork(64, (0, 1, 2, 3), (48,) * 4, (8,) * 4)
        sub = model.config.resolve({"layers": 3, "mlp": [96, 48, 24], "heads": [4, 8, 4], "hidden": 32})
        assert sub.mlp == (96, 48, 24) and sub.hidden == 32 and len(sub.layers) == 3
        assert model.config.resolve(sub.to_dict()) == sub

    def test_a_subnetwork_is_taken_as_it_is(self, model):
        odd = SubNetwork(63, (0, 2), (95, 17), (8, 2))
        assert model.config.resolve(odd) == odd


def test_contains_and_within():
    outer = SubNetwork(8, (0, 2, 3), (10, 8, 10), (4, 4, 2))
    inner = SubNetwork(6, (0, 3), (10, 5), (4, 2))
    assert outer.contains(inner) and outer.contains(outer) and not inner.contains(outer)
    assert not outer.contains(SubNetwork(6, (0, 1), (1, 1), (1, 1)))
    assert not outer.contains(SubNetwork(6, (0, 2), (10, 9), (1, 1)))
    assert inner.within(outer).layers == (0, 2)


class TestRemembered:
    """`resolve_budget` remembers what budgets mean; whatever that depends on may change, also in place."""

    ASKED = (0.7, "0.4", "60K", "450KB", "loss<=2.3", "small", "auto:0.4")

    @pytest.fixture
    def model(self):
        model = elastic_of("gqa-wide-heads", budgets={"large": 1, "medium": 0.6, "small": 0.25})
        losses = zip(("large", "medium", "small"), (2.0, 2.2, 2.6), strict=True)
        model.config.record({name: {"loss": loss} for name, loss in losses}, text="wiki")
        add_token_routers(model, [0.35, 0.6])
        return model

    def means(self, model) -> dict:
        """What every budget means; `resolve`, which remembers nothing, says the same."""
        result = {}
        for budget in self.ASKED:
            try:
                expected = resolve(model.config, budget)
            except ValueError as error:
                with pytest.raises(ValueError, match=re.escape(str(error))):
                    model.resolve_budget(budget)
                continue
            result[budget] = model.resolve_budget(budget)
            assert result[budget] == expected
        return result

    @pytest.mark.parametrize(
        "change",
        [
            lambda config: config.frontier.pop(1),
            lambda config: config.frontier.append(
                config.row("more", config.resolve({"mlp": 48, "heads": 4, "layers": 3, "hidden": 48}))
            ),
            lambda config: config.frontier.__setitem__(1, replace(config.frontier[1], loss=2.4)),
            lambda config: config.frontier.__setitem__(2, replace(config.frontier[1], name="small")),
            lambda config: config.forget_measurements(),
            lambda config: setattr(config, "frontier", config.frontier[:1]),
            lambda config: setattr(config, "parent_non_embedding_parameters", 2 * config.parent_size()),
            lambda config: setattr(config, "dtype", torch.bfloat16),
            lambda config: setattr(config, "flextron_context", 0),
            lambda config: setattr(config, "max_position_embeddings", 16),
            lambda config: setattr(config, "static_router", routing(config)),
            lambda config: config.token_routing["targets"][1].update(target=0.5, layers=3, heads=[4] * 3),
            lambda config: setattr(config, "token_routing", None),
        ],
    )
    def test_no_answer_is_stale(self, model, change):
        before = self.means(model)
        change(model.config)
        assert self.means(model) != before

    def test_routers_choices_and_the_shape_changed_in_place(self, model):
        config = model.config
        config.static_router = routing(config)
        before = self.means(model)
        for layers in config.static_router["mlp"]:
            for scores in layers:
                scores.reverse()
        assert self.means(model) != before
        config.static_router = None
        before = self.means(model)
        config.elastic["layer_ranking"].reverse()
        config.validate()
        assert self.means(model) != before
        config.gated_mlp = False
        config.validate()
        self.means(model)

    def test_the_same_budget_is_resolved_once(self, model, monkeypatch):
        calls = []
        monkeypatch.setattr("modeling_flextron.budgets.resolve", lambda *args: calls.append(args[1]) or resolve(*args))
        for asked in (0.5, "0.5", "0.50", "auto", 0.5, "small", "small"):
            model.resolve_budget(asked)
        assert calls == [0.5, "auto", "small"]
        assert model.share(0.5).resolve_budget(0.5) == model.resolve_budget(0.5) and len(calls) == 3

    def test_latency_is_looked_up_every_time(self, model, monkeypatch):
        table = LatencyTable("here", {}, shape_of(model.config), {})
        for rest in (1.0, 3.0):
            monkeypatch.setattr(LatencyTable, "cost", lambda self, rest=rest: Cost(lambda hidden: rest))
            monkeypatch.setattr("modeling_flextron.budgets.table_of", lambda config: table)
            if rest == 1.0:
                assert model.resolve_budget("2s") == model.built
        with pytest.raises(ValueError, match="takes 3e"):
            model.resolve_budget("2s")

    def test_numbers_that_python_holds_for_equal(self, model):
        assert model.resolve_budget(1) == model.resolve_budget(1.0) == model.built
        with pytest.raises(ValueError, match="A bool is not a budget"):
            model.resolve_budget(True)


def routing(config) -> dict:
    """A static router whose layers prefer different sizes."""
    layers = config.num_hidden_layers
    scores = {axis: [float(i) for i, _ in enumerate(config.choices(axis))] for axis in ("mlp", "heads")}
    by_layer = {axis: [[row if i % 2 else row[::-1] for i in range(layers)]] * 2 for axis, row in scores.items()}
    whole = {axis: [[0.0] * len(config.choices(axis))] * 2 for axis in ("hidden", "depth")}
    return json.loads(json.dumps({"budgets": [0.2, 1.0], **whole, **by_layer}))  # nothing in it is there twice
