"""The presets of hub_configs/: exact sizes, budgets that resolve, recipes that parse."""

import json
from pathlib import Path

import pytest
import torch
from helpers import parent_of
from transformers import AutoModelForCausalLM, HfArgumentParser

from flextron_trainer import FlextronTrainingArguments, convert
from flextron_trainer.cli.train import as_defaults
from flextron_trainer.presets import FOLDER, load_preset, names, sizes_table
from modeling_flextron import FlextronForCausalLM, count_parameters
from modeling_flextron.extraction import stock_config

ROOT = Path(__file__).parent.parent
# Parameters of the published models.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "pythia-1.4b": 1_414_647_808,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "tinyllama-1.1b": 1_100_048_384,
}


@pytest.fixture(scope="module", params=names())
def preset(request):
    return load_preset(request.param)


def test_the_readme_shows_the_table_of_sizes():
    table = sizes_table()
    print(table)
    assert table in (ROOT / "hub_configs" / "README.md").read_text()
    assert set(names()) == {*PUBLISHED, "gpt3-2b", "gpt3-8b"} and ROOT / "hub_configs" == FOLDER


def test_sizes_are_those_of_real_models(preset):
    """Of the published parent and of ours at every budget; the smallest is built, and what `extract` makes of it."""
    config = preset.elastic_config()
    with torch.device("meta"):
        parent = AutoModelForCausalLM.from_config(preset.parent_config())
    assert (
        parent.num_parameters()
        == config.frontier[0]["parameters"]
        == PUBLISHED.get(preset.name, parent.num_parameters())
    )
    assert [row["name"] for row in config.frontier] == [f"{budget:g}" for budget in preset.convert["budgets"]]
    for row, budget in zip(config.frontier, preset.convert["budgets"], strict=True):
        assert preset.sizes[row["name"]] == [row["non_embedding_parameters"], row["parameters"]]
        subnetwork = config.resolve(budget)
        assert subnetwork == config.resolve(row["name"])
        assert 0.95 * budget <= row["non_embedding_parameters"] / config.parent_size() <= budget
        assert count_parameters(config, subnetwork) == row["parameters"]
        stock = stock_config(config, subnetwork)
    config.flextron_budget = budget
    with torch.device("meta"):
        models = FlextronForCausalLM(config), AutoModelForCausalLM.from_config(stock)
    assert [model.num_parameters() for model in models] == [row["parameters"]] * 2


def parsed(recipe, *given):
    """The training arguments that `flextron train --preset` makes of a recipe."""
    parser = HfArgumentParser(FlextronTrainingArguments)
    parser.set_defaults(**as_defaults(recipe))
    return parser.parse_args_into_dataclasses(list(given))[0]


def test_recipes_are_arguments_of_the_trainer(preset, tmp_path):
    recipe = preset.recipe("elastic", ["bf16"])  # which needs a GPU or a recent processor
    length = recipe.pop("sequence_length")
    limits = ("max_position_embeddings", "n_positions")
    assert length <= min(preset.config.get(name, length) for name in limits)
    arguments = parsed(recipe, "--output_dir", str(tmp_path))
    assert arguments.max_steps == recipe["max_steps"] and arguments.weight_decay == 0
    assert arguments.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_what_the_user_gives_goes_before_the_recipe():
    preset = load_preset("gpt2")
    assert "max_steps" not in preset.recipe("elastic", ["num_train_epochs"])
    recipe = preset.recipe("elastic", ["lr_scheduler_type", "learning_rate"])
    assert not {"lr_scheduler_type", "lr_scheduler_kwargs", "learning_rate"} & set(recipe)
    with pytest.raises(ValueError, match=r"`stage`='router' .*has the stages elastic"):
        preset.recipe("router")


def test_a_preset_is_keywords_of_convert():
    preset = load_preset("gpt3-2b")
    choices = {key: value for key, value in preset.convert.items() if key != "budgets"} | {"depth": [1]}
    elastic = convert(parent_of("gpt2"), torch.randint(0, 96, (8, 16)), budgets=[1, 0.6], **choices)
    assert elastic.config.choices("hidden") == [64, 48, 32]


def test_a_preset_of_another_parent_is_refused():
    with pytest.raises(ValueError, match=r"`preset`='gpt2' .*`hidden_size=768`, not 64"):
        load_preset("gpt2").check(parent_of("gpt2").config)
    with pytest.raises(ValueError, match="`base_model_type=gpt2`, not llama"):
        load_preset("gpt2").check(parent_of("mha").config)
    parent = load_preset("gpt2").parent_config()
    load_preset("gpt2").check(parent)
    parent.n_inner = 4 * parent.n_embd  # written out
    load_preset("gpt2").check(parent)
    load_preset("gpt2").check(load_preset("gpt2").elastic_config())


def test_what_is_no_preset_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`preset`='llama-9' .*The presets are gpt2, "):
        load_preset("llama-9")
    mine, good = tmp_path / "mine.json", json.loads((FOLDER / "gpt2.json").read_text())
    for text, message in (
        ("{", "not JSON"),
        (json.dumps({"parent": None}), "has no 'config'"),
        (json.dumps({**good, "more": 1}), "'more' is not one of them"),
        (json.dumps({**good, "config": {}}), "'config' has no 'model_type'"),
        (json.dumps({**good, "convert": {"detph": [1]}}), "'detph' is no argument of `convert`"),
    ):
        mine.write_text(text)
        with pytest.raises(ValueError, match=rf"`preset`=.*{message}"):
            load_preset(mine)
    mine.write_text(json.dumps({key: good[key] for key in ("config", "convert")}))
    assert load_preset(mine).elastic_config().frontier == load_preset("gpt2").elastic_config().frontier
