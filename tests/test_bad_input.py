"""Malformed input: each case is a `ValueError` that names the argument and the value, the rule, and the way out."""

import copy
import random
import re

import pytest
import torch
from helpers import elastic_of, flextron, parent_of
from safetensors.torch import load_file, save_file
from training import arguments, rows
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
)

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments, convert
from flextron_trainer.cli.options import fitting_length, parse_numbers
from flextron_trainer.data import calibration_batches, load_text, pack
from modeling_flextron import FlextronConfig, FlextronForCausalLM, SubNetwork

SMALL = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "elastic": {"mlp": [64, 32], "heads": [4, 2], "depth": [3, 2], "layer_ranking": [1]},
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}


def config(**changes):
    return lambda: FlextronConfig(**{**SMALL, **changes})


def elastic(**changes):
    return lambda: FlextronConfig(**{**GROUPED, "elastic": {**SMALL["elastic"], **changes}})


def frontier(**changes):
    row = FlextronConfig(**SMALL).frontier[0]
    return lambda: FlextronConfig(**SMALL, frontier=[row.to_dict() | changes])


CONFIG = {
    "family": (config(base_model_type="bert"), "base_model_type"),
    "kind of norm": (config(norm_type="batch"), "norm_type"),
    "kind of attention": (config(layer_types=["full_attention", "linear_attention", "full_attention"]), "layer_types"),
    "kinds of fewer layers": (config(layer_types=["full_attention"]), "layer_types"),
    "window without layers": (config(sliding_window=8), "sliding_window"),
    "layers without window": (config(layer_types=["sliding_attention"] * 3), "sliding_window"),
    "flag as number": (config(parallel_residual=1), "parallel_residual"),
    "dropout as text": (config(residual_dropout="none"), "residual_dropout"),
    "negative size": (config(hidden_size=-1), "hidden_size"),
    "size as text": (config(intermediate_size="64"), "intermediate_size"),
    "size as bool": (config(num_hidden_layers=True), "num_hidden_layers"),
    "heads as float": (config(num_attention_heads=4.0), "num_attention_heads"),
    "kv heads that do not divide": (config(num_key_value_heads=3), "num_key_value_heads"),
    "odd head size": (config(head_dim=7), "head_dim"),
    "tied as text": (config(tie_word_embeddings="yes"), "tie_word_embeddings"),
    "epsilon as text": (config(norm_eps="small"), "norm_eps"),
    "negative dropout": (config(attention_dropout=-0.1), "attention_dropout"),
    "context as text": (config(flextron_context="4k"), "flextron_context"),
    "budget as list": (config(flextron_budget=[0.5]), "flextron_budget"),
    "budget as bool": (config(flextron_budget=True), "flextron_budget"),
    "misspelt flextron field": (config(flextron_budgets=0.5), "flextron_budgets"),
    "misspelt elastic field": (config(elastic_choices=[1]), "elastic_choices"),
    "elastic as list": (config(elastic=[1]), "elastic"),
    "unknown axis": (elastic(width=[64]), "elastic['width']"),
    "choices as number": (elastic(mlp=64), "elastic['mlp']"),
    "no choices": (elastic(mlp=[]), "elastic['mlp']"),
    "choice as fraction": (elastic(mlp=[64, 0.5]), "elastic['mlp']"),
    "choices that do not begin with the full size": (elastic(mlp=[32]), "elastic['mlp']"),
    "choices that do not descend": (elastic(mlp=[64, 32, 48]), "elastic['mlp']"),
    "choices that repeat": (elastic(mlp=[64, 64]), "elastic['mlp']"),
    "heads that split a group unevenly": (elastic(heads=[4, 3]), "elastic['heads']"),
    "ranking too short": (elastic(layer_ranking=[]), "elastic['layer_ranking']"),
    "ranking drops layer 0": (elastic(layer_ranking=[0]), "elastic['layer_ranking']"),
    "ranking repeats": (elastic(depth=[3, 1], layer_ranking=[1, 1]), "elastic['layer_ranking']"),
    "frontier as dict": (config(frontier={}), "frontier"),
    "row without a field": (lambda: FlextronConfig(**SMALL, frontier=[{"name": "x"}]), "frontier[0]"),
    "row without a name": (frontier(name=""), "frontier[0]['name']"),
    **{
        f"row called {name!r}": (frontier(name=name), "frontier[0]['name']")
        for name in (
            "25ms",
            "auto",
            "auto:0.5",
            "loss<=2",
            "ppl<=9",
            "2x",
            "-1",
            ".x",
            ">x",
            "0",
            "0.0",
            " small",
            "small\n",
            "0.5",
            "1.5",
            "100",
            "1K",
        )  # of the last four the row is too large
    },
    "row with a count as text": (frontier(parameters="5"), "frontier[0]['parameters']"),
    "row with infinite loss": (frontier(loss=float("inf")), "frontier[0]['loss']"),
    "row with metrics as list": (frontier(metrics=[]), "frontier[0]['metrics']"),
    "row with sizes as text": (frontier(subnetwork="full"), "frontier[0]['subnetwork']"),
    "row with impossible sizes": (frontier(subnetwork={"mlp": 33}), "flextron_budget"),
    "parent as number": (config(parent_name=7), "parent_name"),
    "licence as text": (config(parent_license="mit"), "parent_license"),
    "licence with an unknown field": (config(parent_license={"licence": "mit"}), "parent_license"),
    "conversion as text": (config(conversion="obs"), "conversion"),
    "conversion without an order": (config(conversion={"rows": {}}), "conversion"),
    "runs as dict": (config(training_runs={"max_steps": 1}), "training_runs"),
    "steps as text": (config(training_runs=[{"steps": "3"}]), "training_runs['steps']"),
    "version as number": (config(flextron_version=1.0), "flextron_version"),
    "version as words": (config(flextron_version="newest"), "flextron_version"),
    "parent size as text": (config(parent_non_embedding_parameters="1B"), "parent_non_embedding_parameters"),
}


def resolve(budget, **changes):
    return lambda: FlextronConfig(**{**GROUPED, **changes}).resolve(budget)


def odd():
    return FlextronConfig(**GROUPED).resolve(SubNetwork(32, (0, 1), (65, 1), (4, 4)))


BUDGETS = {
    "zero": resolve(0),
    "negative": resolve(-0.5),
    "fraction above one": resolve(1.5),
    "not a number": resolve(float("nan")),
    "infinite": resolve(float("inf")),
    "bool": resolve(True),
    "list at load": resolve([0.5, 1.0]),
    "bytes": resolve(b"0.5"),
    "empty text": resolve(""),
    "negative text": resolve("-3"),
    "zero parameters": resolve("0M"),
    "unknown unit": resolve("3 apples"),
    "unknown name": resolve("gigantic"),
    "unknown comparison": resolve("<=2"),
    "latency without a table": resolve("25ms"),
    "auto without routers": resolve("auto"),
    "auto with a target": resolve("auto:0.5"),
    "quality that was not measured": resolve("loss<=2.3"),
    "below the smallest fraction": resolve(0.01),
    "below the smallest count": resolve("1K"),
    "below the smallest memory": resolve("1KiB"),
    "unknown field": resolve({"width": 3}),
    "size that is no choice": resolve({"mlp": 33}),
    "size as text": resolve({"mlp": "64"}),
    "wrong number of sizes": resolve({"mlp": [64, 64]}),
    "layers that depth does not keep": resolve({"layers": [0, 1]}),
    "depth that is no choice": resolve({"layers": 1}),
    "sub-network that is too wide": odd,
}


def converted(**changes):
    return lambda: convert(parent_of("gqa-wide-heads"), [[1, 2, 3]], **changes)


def bloom():
    return convert(BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=32, n_head=2, vocab_size=50)), [[1, 2]])


def trainer(**changes):
    def build():
        given = {"model": elastic_of("mha"), "args": arguments("unused"), "train_dataset": rows(2), **changes}
        return FlextronTrainer(given.pop("model"), given.pop("args"), **given)

    return build


def batches(data, **changes):
    defaults = {"vocab_size": 96, "sequence_length": 4, "batch_size": 2, "max_samples": 4, "tokenizer": None}
    return lambda: calibration_batches(data, **{**defaults, **changes})


CONVERSION = {
    "architecture": (bloom, "parent"),
    "fraction that does not divide": (converted(mlp=[1, 0.33]), "mlp"),
    "heads outside groups": (converted(heads=[1, 0.6]), "heads"),
    "heads that split a group": (converted(heads=[8, 3]), "heads"),
    "size above the full one": (converted(mlp=[200]), "mlp"),
    "negative size": (converted(hidden=[1, -0.5]), "hidden"),
    "size as text": (converted(depth=["all"]), "depth"),
    "sizes as text": (converted(mlp="1,0.5"), "mlp"),
    "not from the full size": (converted(mlp=[0.5]), "mlp"),
    "not descending": (converted(mlp=[1, 0.25, 0.5]), "mlp"),
    "no budgets": (converted(budgets=[]), "budgets"),
    "budgets as text": (converted(budgets="half"), "budgets"),
    "budget of latency": (converted(budgets=["25ms"]), "budgets['25ms']"),
    "budgets in percent": (converted(budgets=[100, 50]), "budgets['100']"),
    "budget out of range": (converted(budgets=[2.5]), "flextron_budget"),
    "order": (converted(order="size"), "order"),
    "elastic already": (lambda: convert(elastic_of("mha"), [[1, 2]]), "parent"),
    "options for a model": (converted(dtype="float16"), "load_kwargs"),
    "no calibration": (lambda: convert(parent_of("mha")), "calibration"),
    "empty calibration": (batches([]), "calibration"),
    "one token": (batches([[1]]), "calibration"),
    "text without tokenizer": (batches(["some text"]), "calibration"),
    "calibration as one text": (batches("some text"), "calibration"),
    "rows of floats": (batches([[0.5, 0.25]]), "calibration"),
    "rows without text": (batches([{"label": 1}]), "calibration"),
    "ids of another vocabulary": (batches([[1, 2, 3, 500]]), "calibration"),
    "negative ids": (batches([[1, 2, 3, -1]]), "calibration"),
    "samples of one token": (batches([[1, 2]], sequence_length=1), "sequence_length"),
    "no samples": (batches([[1, 2]], max_samples=0), "max_samples"),
    "no such text": (lambda: load_text("/nowhere/at/all"), "dataset"),
    "block of one token": (lambda: pack(None, None, 1), "sequence_length"),
    "choices on the command line": (lambda: parse_numbers("mlp", "1;0.5"), "mlp"),
}


def args(**changes):
    return lambda: FlextronTrainingArguments("unused", use_cpu=True, **changes)


TRAINING = {
    "stage": (args(stage="all"), "stage"),
    "sampler": (args(sampler="biggest"), "sampler"),
    "sandwich of one": (args(subnetworks_per_step=1), "subnetworks_per_step"),
    "no sub-networks": (args(sampler="uniform", subnetworks_per_step=0), "subnetworks_per_step"),
    "negative weight of distillation": (args(kd_weight=-1.0), "kd_weight"),
    "weight as text": (args(ce_weight="a lot"), "ce_weight"),
    "temperature zero": (args(temperature=0.0), "temperature"),
    "temperature no number": (args(temperature=float("nan")), "temperature"),
    "a weight of infinity": (args(stage="router", latency_weight=float("inf")), "latency_weight"),
    "chunk of nothing": (args(loss_chunk_size=0), "loss_chunk_size"),
    "weights without the sampler": (args(sampling_weights=[1.0]), "sampling_weights"),
    "label smoothing": (args(label_smoothing_factor=0.1), "label_smoothing_factor"),
    "plain arguments": (trainer(args=None), "args"),
    "plain model": (trainer(model=parent_of("mha")), "model"),
    "wrong number of weights": (
        trainer(args=arguments("unused", sampler="weighted", sampling_weights=[1.0])),
        "sampling_weights",
    ),
    "missing weights": (trainer(args=arguments("unused", sampler="weighted")), "sampling_weights"),
    "weights of zero": (
        trainer(args=arguments("unused", sampler="weighted", sampling_weights=[0.0] * 4)),
        "sampling_weights",
    ),
    "weights of no number": (
        trainer(args=arguments("unused", sampler="weighted", sampling_weights=[1.0, float("nan"), 1.0, 1.0])),
        "sampling_weights",
    ),
    "teacher of another architecture": (
        trainer(teacher=BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=32, n_head=2, vocab_size=96))),
        "teacher",
    ),
}


def check(build, name):
    with pytest.raises(ValueError) as caught:
        build()
    message = str(caught.value)
    assert message.startswith(f"`{name}`="), message
    first, *rest = re.split(r"(?<=[.)`'\"])\s+(?=[A-Z`0-9'])", message)
    assert first.endswith("cannot be used.") and len(rest) >= 2 and message.endswith("."), message


@pytest.mark.parametrize("case", CONFIG)
def test_config(case):
    check(*CONFIG[case])


@pytest.mark.parametrize("case", BUDGETS)
def test_budgets(case):
    check(BUDGETS[case], "flextron_budget")


@pytest.mark.parametrize("case", CONVERSION)
def test_conversion(case):
    check(*CONVERSION[case])


@pytest.mark.parametrize("case", TRAINING)
def test_training(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(*TRAINING[case])


def test_there_are_enough_cases():
    assert sum(map(len, (CONFIG, BUDGETS, CONVERSION, TRAINING))) > 100


def test_messages_say_what_is_needed():
    """A few of them in full, as a user reads them."""
    config = FlextronConfig(**GROUPED)
    with pytest.raises(ValueError, match=r"smallest row of the frontier, '1', costs .* non-embedding parameters"):
        config.resolve(0.01)
    with pytest.raises(ValueError, match=r"`flextron_budget`='25ms' .*flextron measure"):
        config.resolve("25ms")
    with pytest.raises(ValueError, match="flextron train --stage router"):
        config.resolve("auto")
    with pytest.raises(ValueError, match="flextron evaluate --write"):
        config.resolve("ppl<=10")
    with pytest.raises(ValueError, match="supported families are llama, mistral, qwen2"):
        bloom()
    with pytest.raises(ValueError, match=r"makes 31.68 of 96.*nearest size is 32"):
        converted(mlp=[1, 0.33])()
    with pytest.raises(ValueError, match="teacher='self'"):
        model = elastic_of("mha")
        trainer(model=model, teacher=model)()


def test_the_forward_pass_takes_ids_or_embeddings():
    model = elastic_of("mha")
    ids = torch.ones(1, 2, dtype=torch.long)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": torch.ones(1, 2, 64)}):
        with pytest.raises(ValueError, match="Exactly one of the two"):
            model(**inputs)


def refused(folder, *words):
    """`flextron convert` names what is wrong in one message and writes nothing."""
    output = folder.parent / "output"
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        flextron("convert", folder, output, "--calibration", "weights", "--device", "cpu")
    assert not output.exists() and [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("variant", ["mha", "qwen3", "gpt2", "neox"])
def test_a_checkpoint_with_missing_or_foreign_tensors_is_not_converted(variant, tmp_path):
    folder = tmp_path / "parent"
    parent_of(variant).save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in random.Random(0).sample(sorted(name for name in tensors if "layers.1" in name or "h.1" in name), 2):
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, {"format": "pt"})
        refused(folder, "missing", name.removeprefix("transformer."))
    save_file({**tensors, "extra.weight": torch.ones(1)}, file, {"format": "pt"})
    refused(folder, "unexpected", "extra.weight")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BloomConfig(), ("`parent`='bloom'", "supported families are llama, mistral, qwen2, qwen3, gpt2, gpt_neox")),
        (MixtralConfig(), ("`parent`='mixtral'", "supported families")),
        (FalconConfig(alibi=True), ("`parent`='falcon'", "supported families")),
        (LlamaConfig(is_causal=False), ("`parent.config.is_causal`=False", "`is_causal=True`")),
        (GPT2Config(add_cross_attention=True), ("`parent.config.add_cross_attention`=True",)),
    ],
    ids=["another family", "experts", "ALiBi", "not causal", "cross attention"],
)
def test_a_parent_that_is_not_supported_is_refused_before_its_weights_are_read(config, words, tmp_path):
    config.save_pretrained(tmp_path / "parent")  # and there are no weights
    refused(tmp_path / "parent", *words)


def test_bad_input_at_load_changes_nothing(tmp_path):
    model = elastic_of("mha")
    model.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for budget in ("huge", 0.001, {"mlp": 7}, [1]):
        with pytest.raises(ValueError, match="flextron_budget"):
            FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget=budget)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_a_changed_config_is_refused_at_save(tmp_path):
    model = copy.deepcopy(elastic_of("mha"))
    model.config.elastic["mlp"] = [7]
    with pytest.raises(ValueError, match="elastic"):
        model.save_pretrained(tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_a_change_of_a_loaded_config_is_checked(tmp_path):
    elastic_of("mha").save_pretrained(tmp_path)
    for name, value in (("norm_type", "foo"), ("sliding_window", 8), ("head_dim", 7)):
        with pytest.raises(ValueError, match=f"`{name}`="):
            FlextronForCausalLM.from_pretrained(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="heads"):
        FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget={"heads": [4, 2, 2, 4]}, num_key_value_heads=3)


def test_a_text_longer_than_learned_positions():
    model = elastic_of("gpt2")
    with pytest.raises(ValueError, match=r"`input_ids`='129 tokens' .*128 learned positions"):
        model(torch.ones(1, 129, dtype=torch.long))
    for length in (129, None, 128):
        if length == 129:
            with pytest.raises(ValueError, match=r"`sequence_length`=129 .*128 learned positions"):
                fitting_length(length, model.config)
        else:
            assert fitting_length(length, model.config) == 128
    assert fitting_length(129, elastic_of("mha").config) == 129


def test_a_parent_without_a_tokenizer(tmp_path):
    """For GPT-2 transformers makes up an empty one."""
    (tmp_path / "text.txt").write_text("some text")
    for variant in ("gpt2", "mha"):
        folder = tmp_path / variant
        parent_of(variant).save_pretrained(folder)
        with pytest.raises(ValueError, match=r"`tokenizer`=.*There is none"):
            flextron("convert", folder, tmp_path / "out", "--calibration", tmp_path / "text.txt")
        assert not (tmp_path / "out").exists()
        flextron("convert", folder, tmp_path / f"elastic-{variant}", "--calibration", "weights", "--device", "cpu")
        assert not list((tmp_path / f"elastic-{variant}").glob("tokenizer*"))
        with pytest.raises(ValueError, match=r"`tokenizer`=.*There is none"):
            flextron("generate", tmp_path / f"elastic-{variant}", "text")


def test_a_size_that_no_stock_gpt2_has():
    with pytest.raises(ValueError, match=r"`hidden`=0\.7 .* The nearest size is 48"):
        elastic_of("gpt2", hidden=[1, 0.7])
