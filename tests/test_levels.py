"""One checkpoint in levels: what a budget reads, that it is right, and that anything else is refused by name."""

import copy
import json
import random
import re
import shutil
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import all_sizes, difference, elastic_of, flextron, random_subnetworks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from flextron_trainer.export.verify import verify
from flextron_trainer.publishing.levels import blocks_of, plan_levels, row_bytes
from modeling_flextron import FlextronConfig, FlextronForCausalLM, FlextronForSequenceClassification
from modeling_flextron.level_blocks import index_name, overlap, parse_block, volume
from modeling_flextron.level_reader import Block

BUDGET = "0.35"


@pytest.fixture(scope="module")
def model():
    return elastic_of("gqa-wide-heads")


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "levels"
    model.export(folder)
    return folder


@pytest.fixture
def broken(exported, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(exported, tmp_path / "broken"))


def change(folder: Path, name: str, edit) -> None:
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("seed", range(20))
def test_blocks_tile_whatever_the_rows_need(seed):
    """Also rows of which none contains another."""
    generator = random.Random(seed)
    dims = generator.choice((1, 2))
    shape = tuple(generator.randint(1, 9) for _ in range(dims))
    needs = [
        None if generator.random() < 0.2 else tuple(generator.randint(1, size) for size in shape)
        for _ in range(generator.randint(0, 5))
    ]
    blocks = blocks_of(shape, needs)
    assert sum(volume(box) for _, box in blocks) == volume(tuple((0, size) for size in shape))
    for cell in product(*map(range, shape)):
        owners = [
            level for level, box in blocks if all(low <= at < high for at, (low, high) in zip(cell, box, strict=True))
        ]
        first = [
            i for i, need in enumerate([*needs, shape]) if need and all(a < b for a, b in zip(cell, need, strict=True))
        ]
        assert owners == first[:1]


def test_nested_rows_make_two_blocks_for_each_level():
    blocks = blocks_of((8, 6), [(2, 2), (4, 4)])
    assert [level for level, _ in blocks] == [0, 1, 1, 2, 2]
    assert blocks[0] == (0, ((0, 2), (0, 2)))
    assert parse_block("a.b[0:2,3:4]") == ("a.b", ((0, 2), (3, 4))) and parse_block("a.b") == ("a.b", None)
    assert overlap(((0, 2),), ((2, 3),)) is None


@torch.no_grad()
def test_every_size_is_right_and_reads_what_it_needs(elastic, ids, tmp_path):
    """Of all families: rows, networks between them, everything."""
    elastic.export(tmp_path / "levels")
    for subnetwork in [*all_sizes(elastic, 3), None]:
        loaded = FlextronForCausalLM.from_pretrained(tmp_path / "levels", flextron_budget=subnetwork)
        assert difference(loaded(ids).logits, elastic(ids, flextron_budget=subnetwork or elastic.built).logits) < 1e-5
    bytes_of = row_bytes(tmp_path / "levels", FlextronConfig.from_pretrained(tmp_path / "levels"))
    rows = elastic.frontier
    assert list(bytes_of.values()) == sorted(bytes_of.values(), reverse=True)
    for row in rows:
        assert needed_bytes(tmp_path / "levels", row["name"]) == 4 * row["parameters"]  # float32, and nothing more


def needed_bytes(folder: Path, budget) -> int:
    return json.loads((folder / index_of(folder, budget)).read_text())["metadata"]["total_size"]


def index_of(folder: Path, budget) -> str:
    config = FlextronConfig.from_pretrained(folder, flextron_budget=budget)
    return config.transformers_weights or index_name(None)


@torch.no_grad()
def test_rows_that_do_not_nest(model, ids, tmp_path):
    other = copy.deepcopy(model)
    for i, subnetwork in enumerate(random_subnetworks(model, 3, seed=5)):
        other.config.frontier.append(other.config.row(f"mixed-{i}", subnetwork))
    other.config.frontier.sort(key=lambda row: -row["non_embedding_parameters"])
    other.export(tmp_path / "levels", max_shard_size="20KB")
    assert len(list((tmp_path / "levels").glob("model.level0-*"))) > 1
    for row in other.frontier:
        loaded = FlextronForCausalLM.from_pretrained(tmp_path / "levels", flextron_budget=row["subnetwork"])
        assert difference(loaded(ids).logits, other(ids, flextron_budget=row["subnetwork"]).logits) < 1e-5
        assert needed_bytes(tmp_path / "levels", row["subnetwork"]) == 4 * row["parameters"]
    assert verify(tmp_path / "levels")["rows"][-1] == "everything"


@pytest.mark.parametrize("budget", ["0.15", BUDGET, "0.6", None])
def test_what_is_read(model, exported, monkeypatch, budget):
    """The blocks of a row and nothing else."""
    read = []

    class Counting(Block):
        def read(self, part):
            tensor = super().read(part)
            read.append(tensor.nbytes)
            return tensor

    monkeypatch.setattr("modeling_flextron.level_reader.Block", Counting)
    loaded = load(exported, budget)
    assert 4 * loaded.num_parameters() == sum(read)


@torch.no_grad()
def test_ways_to_load(model, exported, ids, tmp_path):
    expected = model(ids, flextron_budget=BUDGET)
    load = AutoModelForCausalLM.from_pretrained
    for options in ({"device_map": "auto"}, {"device_map": "cpu"}, {"dtype": "float32"}):
        assert difference(load(exported, flextron_budget=BUDGET, **options)(ids).logits, expected.logits) < 1e-5
    half = load(exported, flextron_budget=BUDGET, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and difference(half(ids).logits, expected.logits) < 1
    states = model.model(ids, flextron_budget=BUDGET).last_hidden_state
    assert difference(AutoModel.from_pretrained(exported, flextron_budget=BUDGET)(ids).last_hidden_state, states) < 1e-5
    offloaded = load(
        exported,
        flextron_budget=BUDGET,
        device_map="auto",
        max_memory={"cpu": 30_000},
        offload_folder=tmp_path / "disk",
    )
    assert "disk" in offloaded.hf_device_map.values()
    assert difference(offloaded(ids).logits, expected.logits) < 1e-5
    offloaded.export(tmp_path / "again")
    assert difference(load(tmp_path / "again")(ids).logits, expected.logits) < 1e-5
    scored = AutoModelForSequenceClassification.from_pretrained(exported, num_labels=3, flextron_budget=BUDGET)
    scored.export(tmp_path / "scored")
    again = FlextronForSequenceClassification.from_pretrained(tmp_path / "scored", flextron_budget="0.15")
    assert difference(again(ids).logits, scored(ids, flextron_budget="0.15").logits) < 1e-5


def test_memory_budgets_count_in_the_dtype_that_is_loaded(model, exported):
    row = model.frontier[0]
    budget = f"{2 * row['parameters'] / 1000 + 1:.3f}KB"
    whole = FlextronForCausalLM.from_pretrained(exported, flextron_budget=budget, flextron_context=0, dtype="bfloat16")
    assert whole.num_parameters() == row["parameters"]
    less = AutoModelForCausalLM.from_pretrained(exported, flextron_budget=budget, flextron_context=0)
    assert less.num_parameters() < row["parameters"]


@torch.no_grad()
def test_a_loaded_part_exports_and_saves_as_itself(model, exported, ids, tmp_path):
    part = FlextronForCausalLM.from_pretrained(exported, flextron_budget="0.6")
    part.export(tmp_path / "part")
    part.save_pretrained(tmp_path / "plain")
    assert FlextronConfig.from_pretrained(tmp_path / "plain").levels is None and part.config.levels is not None
    for budget in (None, BUDGET, "0.15"):
        expected = model(ids, flextron_budget=budget or "0.6").logits
        for folder in ("part", "plain"):
            loaded = FlextronForCausalLM.from_pretrained(tmp_path / folder, flextron_budget=budget)
            assert difference(loaded(ids).logits, expected) < 1e-5
    with pytest.raises(ValueError, match="not among the weights"):
        FlextronForCausalLM.from_pretrained(tmp_path / "part", flextron_budget="1")


def test_saving_plain_over_levels_and_back_leaves_one_of_them(model, tmp_path):
    weights = lambda: {path.name for path in tmp_path.glob("model.*")}  # noqa: E731
    model.export(tmp_path)
    levels = weights()
    model.save_pretrained(tmp_path)
    assert weights() == {"model.safetensors"}
    model.export(tmp_path)
    assert weights() == levels
    before = {path.name: path.read_bytes() for path in tmp_path.glob("model.*")}
    model.export(tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("model.*")}  # the same bytes again


def test_the_command_exports_and_verifies(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    flextron("export", tmp_path / "plain", tmp_path / "levels")
    flextron("export", tmp_path / "levels", tmp_path / "part", "--budget", BUDGET)
    assert flextron("verify", tmp_path / "levels")["rows"] == ["0.15", "0.35", "0.6", "everything"]
    assert flextron("verify", tmp_path / "part")["rows"] == ["0.15", "everything"]
    with pytest.raises(ValueError, match="describes no levels"):
        verify(tmp_path / "plain")


def test_what_is_written_is_one_copy(model):
    """Blocks of all levels together are the tensors, once each."""
    levels, _ = plan_levels(model)
    assert sum(piece.size for pieces in levels for piece in pieces) == 4 * model.num_parameters()


# ------------------------------------------------------------------------------------------------- bad files


def load(folder: Path, budget=BUDGET):
    return FlextronForCausalLM.from_pretrained(folder, flextron_budget=budget)


def test_truncated_missing_swapped_and_renamed_shards(broken, exported, model, tmp_path):
    low, high = broken / "model.level0.safetensors", broken / "model.level1.safetensors"
    content = low.read_bytes()
    low.write_bytes(content[:-1])
    with pytest.raises(OSError, match=r"level0.safetensors has [\d,]+ bytes, and its index says"):
        load(broken)
    low.unlink()
    with pytest.raises(OSError, match=r"level0.safetensors is missing"):
        load(broken)
    low.write_bytes(high.read_bytes())
    with pytest.raises(OSError, match=r"level0.safetensors has"):
        load(broken)
    change(
        broken, index_of(broken, BUDGET), lambda i: i["metadata"]["shards"][low.name].update(size=low.stat().st_size)
    )
    with pytest.raises(ValueError, match=r"level0.safetensors.*says that it holds"):
        load(broken)
    shutil.copy(exported / low.name, low)
    damaged = bytearray(content)
    damaged[-5] ^= 1
    low.write_bytes(damaged)
    shutil.copy(exported / index_of(broken, BUDGET), broken)
    with pytest.raises(OSError, match=r"level0.safetensors is damaged"):
        verify(broken)
    other = elastic_of("gqa-wide-heads")
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1)
    other.export(tmp_path / "other")
    shutil.copy(tmp_path / "other" / low.name, low)
    with pytest.raises(ValueError, match=r"level0.safetensors.*It is of checkpoint"):
        load(broken)
    shutil.copy(tmp_path / "other" / index_of(broken, BUDGET), broken)
    with pytest.raises(ValueError, match=r"`index`=.*of another checkpoint"):
        load(broken)


@pytest.mark.parametrize("name", ["../model.level0.safetensors", "/etc/passwd", "model.bin", 7, None])
@pytest.mark.parametrize("budget", [BUDGET, None])
def test_names_outside_of_the_folder(broken, name, budget):
    shutil.copy(broken / "model.level0.safetensors", broken.parent)
    index = index_of(broken, budget)
    change(broken, index, lambda i: i["weight_map"].update(dict.fromkeys(i["weight_map"], name)))
    with pytest.raises(ValueError, match="may only name files like"):
        load(broken, budget)


def test_blocks_that_do_not_tile(broken):
    """A file whose blocks leave a part out, overlap, or have another shape than their names say."""
    index = index_of(broken, BUDGET)
    change(broken, index, lambda i: i["weight_map"].pop(next(k for k in i["weight_map"] if "[" in k)))
    with pytest.raises(ValueError, match="Its blocks have"):
        load(broken)
    file = broken / "model.level0.safetensors"
    with safe_open(file, "pt") as tensors:
        name = next(key for key in tensors.keys() if "up_proj.weight[0:" in key)  # noqa: SIM118
    rows, columns = (int(end) for end in re.findall(r":(\d+)", name))
    assert columns == 32  # of which one more or 8 more are two digits, too: the length of the header stays
    for box, message in (("8:40]", "Its blocks (overlap|leave)"), ("0:31]", "Its block has the shape")):
        wrong = name.replace(f"[0:{rows},0:32]", f"[0:{rows},{box}")
        content = file.read_bytes()
        file.write_bytes(content.replace(name.encode(), wrong.encode()))
        original = (broken / index).read_text()
        text = (broken / index_of(broken.parent / "broken", "0.15")).read_text()
        (broken / index_of(broken, "0.15")).write_text(text.replace(name, wrong))
        with pytest.raises(ValueError, match=message):
            load(broken, "0.15")
        file.write_bytes(content)
        (broken / index).write_text(original)
        (broken / index_of(broken, "0.15")).write_text(text)


def test_broken_levels_in_a_config(exported):
    values = json.loads((exported / "config.json").read_text())
    for levels, message in (
        ([], "has the fields"),
        ({"checkpoint": 1, "rows": []}, "the text that its files share"),
        ({"checkpoint": "a", "rows": ["nothing"]}, "names of rows"),
    ):
        with pytest.raises(ValueError, match=message):
            FlextronConfig.from_dict({**values, "levels": levels})


# -------------------------------------------------------------------------------------------------- fuzzing

JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.just(2**70), st.floats(), st.text(max_size=3),
    st.sampled_from(["../x", "/etc/passwd", "model.level9.safetensors", "full_attention", "0.15"]),
    st.lists(st.integers(-1, 2), max_size=2), st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
)  # fmt: skip


def mutated(draw, value):
    """A JSON value with one entry replaced, dropped or renamed, at any depth."""
    if isinstance(value, (dict, list)) and value and draw(st.booleans() | st.just(True)):
        key = draw(st.sampled_from(list(value) if isinstance(value, dict) else list(range(len(value)))))
        result = copy.copy(value)
        kind = draw(st.integers(0, 5))
        if kind == 0:
            del result[key]
        elif kind == 1 and isinstance(value, dict):
            result[draw(st.text(max_size=4))] = result.pop(key)
        else:
            result[key] = mutated(draw, value[key])
        return result
    return draw(JUNK)


FUZZ = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=100, **FUZZ)
@given(data=st.data())
def test_a_fuzzed_config_is_refused_or_whole(exported, data):
    """Reading a config raises ValueError or OSError, and nothing else."""
    values = mutated(data.draw, json.loads((exported / "config.json").read_text()))
    try:
        config = FlextronConfig.from_dict(values) if isinstance(values, dict) else None
    except (ValueError, OSError):
        return
    if config is not None:
        assert config.built.contains(config.resolve(config.frontier[-1]["subnetwork"] or {}))


@settings(max_examples=50, **FUZZ)
@given(data=st.data())
@torch.no_grad()
def test_a_fuzzed_index_is_refused_or_right(exported, model, tmp_path_factory, data):
    """Loading through a damaged index raises ValueError or OSError, or gives the right model."""
    folder = exported.parent / "fuzzed"
    if not folder.exists():
        shutil.copytree(exported, folder)
    index = index_of(exported, "0.15")
    (folder / index).write_text(json.dumps(mutated(data.draw, json.loads((exported / index).read_text()))))
    try:
        loaded = load(folder, "0.15")
    except (ValueError, OSError):
        return
    ids = torch.arange(1, 9)[None]
    assert difference(loaded(ids).logits, model(ids, flextron_budget="0.15").logits) < 1e-5


def test_a_package_of_another_version_writes_no_levels(tmp_path, monkeypatch):
    monkeypatch.setattr("flextron_trainer.publishing.push.VERSION", "9.0.0")
    with pytest.raises(ValueError, match=r"`flextron`='9.0.0'.*which its levels are written for"):
        elastic_of("mha").export(tmp_path / "elastic")
    monkeypatch.setitem(sys.modules, "flextron_trainer.publishing", None)  # as in a package from before it had one
    monkeypatch.delitem(sys.modules, "flextron_trainer.publishing.push")
    with pytest.raises(ValueError, match=r"`flextron`='older'.*which its levels are written for"):
        elastic_of("mha").export(tmp_path / "elastic")
    assert not any(tmp_path.iterdir())
