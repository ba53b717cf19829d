"""Layers that learn one by one: what they learn, what stays, and runs that go on."""

import copy
import itertools
import re
import signal

import pytest
import torch
from helpers import elastic_of, flextron, let_tokens_choose, parent_of, run_python
from shapes import VARIANTS
from training import arguments, rows, with_adapter
from transformers import Trainer

from flextron_trainer import FlextronTrainer, convert
from flextron_trainer.blockwise import BlockRecipe, States, Streams, _learning, decay_groups, distill_blocks
from flextron_trainer.conversion.corrections import train_corrections
from flextron_trainer.data import collator
from flextron_trainer.demo import train_tokenizer
from flextron_trainer.layerwise import ModelBlocks, Text
from flextron_trainer.models import load_elastic
from flextron_trainer.training.block_stage import train_blocks, train_folder
from modeling_flextron.frontier import held

DATA = torch.randint(0, 96, (32, 24), generator=torch.Generator().manual_seed(5))
RECIPE = BlockRecipe(24, 4, learning_rate=3e-3, quiet=True)


def recipe(**changes) -> BlockRecipe:
    return BlockRecipe(**{**vars(RECIPE), **changes})


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("variant", "inputs"),
    [("gqa-wide-heads", "own"), ("gpt2", "parent"), ("neox", "own"), ("qwen2", "parent"), ("gpt2", "own")],
)
def test_the_errors_of_all_rows_fall(variant, inputs):
    model = elastic_of(variant)
    errors = distill_blocks(ModelBlocks(model), Text(DATA), recipe(inputs=inputs))
    rows = held(model.config.frontier)
    assert errors.keys() == rows.keys()
    for name, changes in errors.items():
        assert len(changes) == len(rows[name].layers)
        before, after = (sum(column) for column in zip(*changes, strict=True))
        if rows[name] == model.built:
            assert before < 1e-9 or inputs == "own"
            assert after < 0.2 * sum(start for start, _ in errors[list(rows)[-1]])
        else:
            assert after < before, name
    assert all(p.requires_grad for p in model.parameters())


def test_a_row_without_the_next_layer_aims_behind_it():
    model = elastic_of("mha", budgets=[1, 0.35], mlp=[1], heads=[1], hidden=[1], depth=[1, 0.5])
    small = list(held(model.config.frontier).values())[-1]
    dropped = next(layer for layer in range(4) if layer not in small.layers)
    errors = distill_blocks(ModelBlocks(model), Text(DATA), recipe(inputs="parent"))
    name = list(held(model.config.frontier))[-1]
    at = small.layers.index(max(layer for layer in small.layers if layer < dropped))
    before, after = errors[name][at]
    assert after < 0.9 * before


@pytest.mark.parametrize("inputs", ["own", "parent"])
@pytest.mark.parametrize("variant", ["gqa-tied-llama3", "gpt2"])
def test_corrections_alone_leave_the_full_network_as_it_is(variant, inputs):
    model = elastic_of(variant, corrections=0.1)
    before = weights(model)
    errors = distill_blocks(ModelBlocks(model), Text(DATA), recipe(parameters="corrections", inputs=inputs))
    after = weights(model)
    own = [name for name in before if "corrections." in name]
    assert own and all(torch.equal(before[name], after[name]) for name in before if name not in own)
    assert any(not torch.equal(before[name], after[name]) for name in own)
    assert errors and all(sum(a for _, a in changes) < sum(b for b, _ in changes) for changes in errors.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_streams_are_what_the_model_has_between_its_layers(variant):
    model = elastic_of(variant)
    mask, positions = torch.ones_like(DATA), torch.arange(24).expand(32, 24).clone()
    mask[3, 20:] = 0
    positions[:, 10:] -= 10
    for text in (Text(DATA), Text(DATA, attention_mask=mask), Text(DATA, position_ids=positions)):
        streams = Streams(ModelBlocks(model), text, 5)
        streams.reach(4)
        with torch.no_grad():
            found = model(
                DATA, attention_mask=text.attention_mask, position_ids=text.position_ids, output_hidden_states=True,
                use_cache=False,
            ).hidden_states  # fmt: skip
        for number in range(4):
            real = torch.ones_like(DATA).bool() if text.attention_mask is None else text.attention_mask.bool()
            torch.testing.assert_close(streams.at[number].read(range(32))[real], found[number][real])


def test_states_in_a_file_are_those_in_memory(tmp_path):
    values = torch.randn(6, 3, 4).bfloat16()
    states = States(values.shape, torch.bfloat16, tmp_path / "states")
    states.write(0, values[:4])
    states.write(4, values[4:])
    assert torch.equal(states.read([5, 0, 3]), values[[5, 0, 3]])
    states.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variant", "changes", "dtype"),
    [
        ("gqa-tied-llama3", {"corrections": 0.1}, torch.float32),
        ("gqa-wide-heads", {}, torch.bfloat16),
        ("gpt2", {"corrections": 0.1}, torch.float32),
        ("qwen3", {}, torch.float32),
    ],
)
def test_a_folder_gives_what_a_model_in_memory_gives(variant, changes, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("flextron_trainer.blockwise.IN_MEMORY", 0)
    elastic_of(variant, **changes).to(dtype).save_pretrained(tmp_path / "begin")
    settings = {"stage": "blocks", "max_steps": 3}
    model, kept, errors = train_folder(
        tmp_path / "begin", arguments(tmp_path / "out", **settings), rows(), collator(), resume=False
    )
    kept.remove()
    assert all(parameter.is_meta for parameter in model.parameters())
    run = FlextronTrainer(
        load_elastic(tmp_path / "begin"), arguments(tmp_path / "memory", **settings), train_dataset=rows()
    )
    output = run.train()
    assert output.metrics == errors
    found = load_elastic(tmp_path / "out")
    assert found.dtype == dtype and equal(weights(found), weights(run.model))
    assert equal(weights(load_elastic(tmp_path / "memory")), weights(run.model))
    assert not equal(weights(found), weights(load_elastic(tmp_path / "begin")))
    assert found.config.training_runs[-1]["steps"] == 3 and found.permutation is not None
    for folder in ("out", "memory"):
        assert not (tmp_path / folder / "blocks").exists()
    FlextronTrainer(found, arguments(tmp_path / "then", max_steps=1), train_dataset=rows()).train()


def test_a_checkpoint_in_levels_is_read_too(tmp_path):
    model = elastic_of("mha-tied-biased", corrections=0.1)
    model.save_pretrained(tmp_path / "plain")
    model.export(tmp_path / "levels")
    for name in ("plain", "levels"):
        settings = arguments(tmp_path / f"{name}-out", stage="blocks", max_steps=2)
        train_folder(tmp_path / name, settings, rows(), collator(), resume=False)
    plain, levels = (load_elastic(tmp_path / f"{name}-out") for name in ("plain", "levels"))
    assert equal(weights(plain), weights(levels)) and levels.config.levels is None


KILLED = """
import os, signal, sys
from pathlib import Path
from training import arguments, rows
from flextron_trainer.data import collator
from flextron_trainer.training.block_stage import KeptBlocks, train_folder
save = KeptBlocks.save
def killing(self, number, layer, errors):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, number, layer, errors)
KeptBlocks.save = killing
settings = arguments(sys.argv[2], stage="blocks", max_steps=3, block_inputs=sys.argv[3])
train_folder(Path(sys.argv[1]), settings, rows(), collator(), resume=False)
"""


@pytest.mark.parametrize("inputs", ["own", "parent"])
def test_a_killed_run_goes_on_behind_the_last_layer(inputs, tmp_path):
    elastic_of("gqa-wide-heads", corrections=0.1).save_pretrained(tmp_path / "begin")
    done = run_python(KILLED, tmp_path / "begin", tmp_path / "killed", inputs, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "killed" / "blocks").glob("layer-*.safetensors"))) == 2
    assert not (tmp_path / "killed" / "config.json").exists()
    results = {}
    for name in ("killed", "whole"):
        settings = arguments(tmp_path / name, stage="blocks", max_steps=3, block_inputs=inputs)
        found = train_folder(tmp_path / "begin", settings, rows(), collator(), resume=name == "killed")
        _, kept, results[name] = found
        kept.remove()
    found, whole = (load_elastic(tmp_path / name) for name in ("killed", "whole"))
    assert equal(weights(found), weights(whole)) and results["killed"] == results["whole"]
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_what_another_run_left_is_not_gone_on_with(tmp_path, monkeypatch):
    elastic_of("gqa-wide-heads").save_pretrained(tmp_path / "begin")
    monkeypatch.setattr("flextron_trainer.training.block_stage.write_beside", lambda folder: 1 / 0)
    settings = arguments(tmp_path / "out", stage="blocks", max_steps=1)
    with pytest.raises(ZeroDivisionError):
        train_folder(tmp_path / "begin", settings, rows(), collator(), resume=False)
    settings = arguments(tmp_path / "out", stage="blocks", max_steps=1, learning_rate=0.5)
    with pytest.raises(ValueError, match=r"another run: recipe differ"):
        train_folder(tmp_path / "begin", settings, rows(), collator(), resume=True)


def test_the_command(tmp_path):
    text, begin, out = tmp_path / "text.txt", tmp_path / "begin", tmp_path / "out"
    text.write_text("a man a plan a canal panama " * 300)
    elastic_of("gqa-wide-heads", parent_of("gqa-wide-heads", vocab_size=300)).save_pretrained(begin)
    train_tokenizer([text.read_text()], 300).save_pretrained(begin)
    common = ("--stage", "blocks", "--max_steps", 2, "--use_cpu", "--sequence-length", 16, "--report_to", "none")
    planned = flextron("train", begin, text, *common, "--output_dir", out, "--plan")
    assert planned["gib"]["logits"] == 0 and not out.exists()
    result = flextron("train", begin, text, *common, "--output_dir", out)
    assert result["block_error_0.35"] > 0 and (out / "README.md").is_file()
    load_elastic(out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "self"}, "own full network teaches"),
        ({"eval_dataset": rows(4)}, "whole again only at the end"),
        ({"gradient_accumulation_steps": 2}, "larger batch size"),
        ({"float32_weights": False}, "float32 meanwhile"),
        ({"optim": "sgd"}, "has an AdamW for each layer"),
        ({"push_to_hub": True}, "flextron push"),
        ({"block_parameters": "corrections"}, "No row owns anything"),
    ],
)
def test_what_the_stage_refuses(changes, message, tmp_path):
    given = {name: changes.pop(name) for name in ("teacher", "eval_dataset") if name in changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        FlextronTrainer(
            elastic_of("gqa-wide-heads"), arguments(tmp_path, stage="blocks", **changes), train_dataset=rows(), **given
        )


def test_models_that_the_stage_refuses(tmp_path):
    def refused(model, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            FlextronTrainer(model, arguments(tmp_path, stage="blocks"), train_dataset=rows())

    refused(elastic_of("mha", budgets=[1]), "full network alone")
    refused(with_adapter(elastic_of("mha")), "weights without adapters")
    refused(let_tokens_choose(elastic_of("mha")), "Train the blocks first")


def test_a_stream_needs_max_steps(tmp_path):
    run = FlextronTrainer(elastic_of("mha"), arguments(tmp_path, stage="blocks", max_steps=1), train_dataset=rows())
    run.args.max_steps, run.train_dataset = -1, iter(rows())
    with pytest.raises(ValueError, match="does not say how long"):
        run.train()


def test_an_error_that_is_no_number_stops(tmp_path):
    model = elastic_of("mha")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="is nan at step 0"):
        distill_blocks(ModelBlocks(model), Text(DATA), recipe(steps=1))


def test_conversion_trains_what_rows_own(monkeypatch):
    """Where held-out text says that it helps: at first always, then never."""

    def say(step):
        losses = itertools.count(0, step)
        monkeypatch.setattr("flextron_trainer.conversion.corrections.mean_loss", lambda *_: next(losses))

    def converted(**more):
        say(-1)
        return convert(copy.deepcopy(parent), DATA, corrections=0.1, **changes, **more)

    parent = parent_of("gqa-wide-heads")
    changes = {"order": "importance", "mlp": [1, 0.5], "budgets": [1, 0.6]}
    with pytest.raises(ValueError, match="block_steps"):
        convert(copy.deepcopy(parent), DATA, block_steps=2, **changes)
    plain, model = weights(converted()), converted(block_steps=8)
    learned = weights(model)
    changed = {name for name in plain if not torch.equal(plain[name], learned[name])}
    assert changed and all("corrections" in name for name in changed)
    say(1)
    train_corrections(model, [DATA], [DATA], 2, 0)
    assert equal(weights(model), learned)


def test_a_run_goes_on_from_its_own_layers_alone(tmp_path):
    """Not from those of other weights, other documents, or a folder without any."""
    model = elastic_of("gqa-wide-heads")
    texts = [{"input_ids": ids.tolist()} for ids in DATA]
    args = arguments(tmp_path, stage="blocks", max_steps=2)
    with pytest.raises(ValueError, match="no layers"):
        train_blocks(ModelBlocks(model), args, texts, collator(None), True)
    train_blocks(ModelBlocks(copy.deepcopy(model)), args, texts, collator(None), False)
    train_blocks(ModelBlocks(copy.deepcopy(model)), args, texts, collator(None), True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="weights differ"):
        train_blocks(ModelBlocks(other), args, texts, collator(None), True)
    parts = [{**row, "position_ids": [*range(12), *range(len(row["input_ids"]) - 12)]} for row in texts]
    with pytest.raises(ValueError, match="text differ"):
        train_blocks(ModelBlocks(model), args, parts, collator(None), True)


def test_parents_are_run_without_dropout():
    model = elastic_of("gpt2")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = layer.dropout = 0.5
    found = []
    for training in (False, True):
        model.train(training)
        streams = Streams(ModelBlocks(model), Text(DATA), 8)
        found.append(streams.reach(4).read(range(len(DATA))))
        assert model.model.layers[0].training is training
    torch.testing.assert_close(*found)


def test_what_has_no_gradients_does_not_learn():
    model = elastic_of("gqa-wide-heads")
    model.model.layers[1].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    distill_blocks(ModelBlocks(model), Text(DATA), BlockRecipe(2, 4, quiet=True))
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert {name for name in before if "layers.1." in name} <= same
    assert not any("layers.2.mlp" in name for name in same)


def test_what_decays_is_what_decays_in_a_trainer():
    for variant in ("gpt2", "qwen3"):
        layer = elastic_of(variant).model.layers[0]
        expected = set(Trainer.get_decay_parameter_names(None, layer))
        matrices, vectors = decay_groups(list(layer.parameters()), 0.1)
        assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
        found = {name for name, p in layer.named_parameters() if any(p is one for one in matrices["params"])}
        assert found == expected and len(matrices["params"]) + len(vectors["params"]) == len([*layer.parameters()])


def test_every_weight_keeps_its_dtype():
    layer = elastic_of("gqa-wide-heads").to(torch.bfloat16).model.layers[0]
    layer.input_layernorm.float()
    before = {name: p.dtype for name, p in layer.named_parameters()}
    with _learning(layer, "all") as parameters:
        assert all(p.dtype == torch.float32 for p in parameters)
    assert {name: p.dtype for name, p in layer.named_parameters()} == before
