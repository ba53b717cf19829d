"""Quantized weights at every budget, and compiled models: one graph for each sub-network."""

import copy

import pytest
import torch
from helpers import difference, elastic_of, parent_of
from training import losses, trainer

from modeling_flextron import FlextronForCausalLM
from modeling_flextron.elastic import ElasticLinear

IDS = torch.randint(1, 96, (2, 9), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model, budget=None):
    return model(IDS, flextron_budget=budget).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    elastic_of("gqa-wide-heads").export(folder)
    return folder


@pytest.fixture(scope="module")
def quantize():
    """`quantize(folder, bits, group, budget)`: a model loaded with weights of torchao."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    def load(folder, bits=8, group=8, budget=None):
        groups = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group))
        config = TorchAoConfig(Int8WeightOnlyConfig() if bits == 8 else groups)
        return FlextronForCausalLM.from_pretrained(folder, quantization_config=config, flextron_budget=budget)

    return load


@pytest.mark.parametrize("bits", [8, 4])
def test_a_slice_of_quantized_weights_is_the_slice_of_what_they_mean(saved, quantize, bits):
    model = quantize(saved, bits)
    meant = FlextronForCausalLM.from_pretrained(saved)
    for name, layer in meant.named_modules():
        if isinstance(layer, ElasticLinear) and name != "lm_head":
            layer.weight.data = model.get_submodule(name).weight.dequantize().float()
    for row in model.frontier:
        assert difference(logits(model, row["name"]), logits(meant, row["name"])) < 1e-4, row["name"]
    small = quantize(saved, bits, budget="0.35")
    plain = FlextronForCausalLM.from_pretrained(saved, flextron_budget="0.35")
    assert difference(logits(small), logits(plain)) < {8: 0.2, 4: 2.0}[bits]
    assert difference(logits(small, "0.15"), logits(meant, "0.15")) < {8: 0.2, 4: 2.0}[bits]


def test_groups_that_do_not_divide_a_size(saved, quantize):
    model = quantize(saved, 4, group=32)
    assert torch.isfinite(logits(model)).all()
    with pytest.raises(ValueError, match="groups that divide"):
        logits(model, "0.15")


def test_quantized_weights_on_disk(saved, quantize, tmp_path):
    model = quantize(saved)
    model.save_pretrained(tmp_path)
    again = FlextronForCausalLM.from_pretrained(tmp_path)
    assert difference(logits(again, "0.35"), logits(model, "0.35")) == 0
    with pytest.raises(ValueError, match="quantized"):
        FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget="0.35")


def test_figures_are_those_of_the_weights(saved, quantize, tmp_path):
    """Not of those that were quantized while loading; of quantized ones as long as they are loaded as they are."""
    measured = FlextronForCausalLM.from_pretrained(saved)
    measured.config.record({"0.35": {"loss": 2.0}}, text="wiki")
    measured.save_pretrained(tmp_path / "plain")
    small = quantize(tmp_path / "plain", budget="loss<=2.5")
    assert small.built == measured.resolve_budget("0.35") and small.frontier[0]["loss"] is None
    model = quantize(tmp_path / "plain")
    assert all(row["loss"] is None for row in model.frontier)
    model.config.record({"0.35": {"loss": 2.1}}, text="wiki")
    model.save_pretrained(tmp_path / "quantized")
    assert FlextronForCausalLM.from_pretrained(tmp_path / "quantized").frontier[2]["loss"] == 2.1


def test_adapters_on_quantized_weights_train_at_every_size(saved, quantize, tmp_path):
    pytest.importorskip("peft")
    run = trainer(tmp_path, model=quantize(saved), adapter={}, teacher="self")
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.1


def test_an_8_bit_teacher_teaches_as_the_full_one(tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    parent_of("gqa-wide-heads").save_pretrained(tmp_path)
    how = TorchAoConfig(Int8WeightOnlyConfig())
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how)
    assert type(teacher.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"
    small, full = (trainer(tmp_path, teacher=who, max_steps=4, optim="sgd") for who in (teacher, "parent"))
    small.train(), full.train()
    for a, b in zip(losses(small), losses(full), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)


class Graphs:
    """A backend that counts what it compiles."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def one_layer(budgets=(1, 0.5, 0.3)):
    """Compiling takes a time for each layer and size; sizes whose layers differ are in test_modeling.py."""
    parent = parent_of("gqa-wide-heads", num_hidden_layers=1)
    return elastic_of("gqa-wide-heads", parent, depth=[1], budgets=list(budgets))


def test_one_graph_for_each_row_at_inference():
    torch._dynamo.reset()
    model, graphs = one_layer(), Graphs()
    expected = [logits(model, row["name"]) for row in model.frontier]
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    sizes = [model.resolve_budget(row["name"]) for row in model.frontier]
    for repeat in range(3):
        for size, logit in zip(sizes, expected, strict=True):
            with torch.no_grad():
                assert difference(compiled(IDS, flextron_budget=size).logits, logit) < 1e-5
        if repeat == 0:
            first = graphs.count
    assert graphs.count == first <= len(model.frontier)  # a graph may serve two rows, with their sizes as symbols


def test_a_compiled_model_runs_at_the_size_of_the_block_around():
    torch._dynamo.reset()
    model = one_layer((1, 0.5))
    compiled = torch.compile(model, backend="eager")
    for name in ("1", "0.5", "1", "0.5"):
        with model.at_budget(name), torch.no_grad():
            assert difference(compiled(IDS).logits, logits(model, name)) < 1e-5


def test_one_graph_for_each_row_in_training():
    torch._dynamo.reset()
    model, graphs = one_layer((1, 0.5)), Graphs()
    eager, compiled = copy.deepcopy(model), torch.compile(model, backend=graphs)
    counts = []
    for _ in range(2):
        for row in model.frontier:
            for either in (eager, compiled):
                either(IDS, labels=IDS, flextron_budget=row["subnetwork"]).loss.backward()
        counts.append(graphs.count)
    assert counts[0] == counts[1] <= len(model.frontier)
    for a, b in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_the_trainer_compiles_one_graph_for_each_row(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    models = [one_layer((1, 0.5)) for _ in range(2)]
    settings = {"teacher": None, "max_steps": 2, "subnetworks_per_step": 2}
    compiled = trainer(tmp_path, model=models[0], torch_compile=True, torch_compile_backend="eager", **settings)
    compiled.train()
    assert {draw.name for step in range(2) for draw in compiled.draws(step)} == {"1", "0.5"}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    plain = trainer(tmp_path, model=models[1], **settings)
    plain.train()
    assert losses(compiled)[-1]["loss"] == pytest.approx(losses(plain)[-1]["loss"], rel=1e-3)
