"""Comparisons at equal cost (`benchmarks/study.py`): what a line costs, which setting it gets, and what is shown."""

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
from helpers import parent_of
from training import VARIANT, rows

from flextron_trainer import FlextronTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
study = import_module("study")

PLAN = study.Plan(
    length=16, parents=("parent",), starts={"slices": {"heads": [1], "order": "importance"}},
    families={"elastic": "slices", "elastic, fuller": "slices"}, singles={"singles": "slices"}, others=("scratch",),
    recipes={"elastic, fuller": {"sampler": "weighted", "sampling_weights": [3, 1]}},
    compared=(("elastic", "singles"),),
)  # fmt: skip
OPTIONS = argparse.Namespace(seeds=[0, 1], budgets=[0.6], tokens=[128], device="cpu")
GRID = {"small": {"learning_rate": 1e-4, "per_device_train_batch_size": 4},
        "large": {"learning_rate": 1e-2, "per_device_train_batch_size": 4}}  # fmt: skip


class TinyStudy(study.Study):
    tokenizer, tests, selection = None, {"held out": rows(8)}, rows(8, seed=4)

    def __init__(self, folder: Path, seed: int):
        super().__init__(OPTIONS, PLAN, GRID, folder, seed)
        self.parent, self.calibration = parent_of(VARIANT), [row["input_ids"].tolist() for row in rows(16)]

    def train_rows(self, count: int) -> list:
        return rows(count, seed=self.seed)


def test_models_of_equal_cost(tmp_path, monkeypatch):
    for seed in OPTIONS.seeds:
        for line in ("elastic", "singles"):
            TinyStudy(tmp_path, seed).measure(line)
    first, second = (json.loads((tmp_path / str(seed) / "measured.json").read_text()) for seed in OPTIONS.seeds)
    assert {key for key in first if key.startswith("elastic")} == {"elastic 128 small", "elastic 128 large"}
    best = study.best(first, "elastic", 128, list(GRID))
    assert [key for key in second if key.startswith("elastic")] == [f"elastic 128 {best}"]  # the first seed has chosen
    elastic = second[f"elastic 128 {best}"]["flops"]
    singles = [value["flops"] for key, value in second.items() if key.startswith("singles")]
    tiny = TinyStudy(tmp_path, 1)
    assert singles == [pytest.approx(elastic, abs=32 * tiny.per_token("slices", ["0.6"]))]  # half a step
    assert elastic == 128 * tiny.per_token("slices", ["1", "0.6"])
    forward = tiny.per_token("slices", ["1"], taught=False) / 3  # of the parent, which is the teacher, too
    assert tiny.per_token("slices", ["1"]) == 4 * forward
    assert first["slices, conversion"]["flops"] > 100 * forward  # a block of 128 tokens calibrates, without a head

    monkeypatch.setattr(FlextronTrainer, "train", lambda *args, **kwargs: pytest.fail("it was measured before"))
    for line in ("elastic", "singles"):
        TinyStudy(tmp_path, 1).measure(line)


def test_draws_and_seconds_of_a_run(tmp_path):
    tiny = TinyStudy(tmp_path, 0)
    full, small = (tiny.per_token("slices", [name], passes=1, taught=False) for name in ("1", "0.6"))
    note = tmp_path / "0" / "runs" / "elastic,-fuller-100-small" / "seconds.json"
    found = tiny.family("elastic, fuller", 100, "small")
    assert found["flops"] == pytest.approx(128 * (full + 3 * (1.5 * full + 0.5 * small)))  # two steps of two draws
    assert 0 < json.loads(note.read_text()) <= found["cpu_seconds"]
    note.write_text("1000")  # as if the run had been stopped after its last checkpoint
    assert 1000 < tiny.family("elastic, fuller", 100, "small")["cpu_seconds"] < 1100


def test_other_settings_are_refused(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    for _ in range(2):
        study.check_settings(parser, tmp_path, {"budgets": [0.5], "length": 16})
    with pytest.raises(SystemExit):
        study.check_settings(parser, tmp_path, {"budgets": [0.6], "length": 16})
    assert "figures of other settings: budgets [0.5]. Pass" in capsys.readouterr().err


def test_the_table():
    def figures(losses: dict[str, float], selection: float = 1.0, **more: float) -> dict:
        return {b: {"held out": loss, "selection": selection} for b, loss in losses.items()} | more

    def seed(shift: float) -> dict:
        return {
            "parent": figures({"1": 1.0}),
            "elastic 256 small": figures({"1": 9.0, "0.8": 9.0}, selection=2.0),
            "elastic 256 large": figures({"1": 2.0 + shift, "0.8": 3.0 + shift}, flops=2e12, cpu_seconds=60),
            "singles 0.8 256 small": figures({"0.8": 2.5}, flops=1e12, cpu_seconds=30),
            "singles 0.8 256 large": figures({"0.8": 0.0}, selection=2.0),  # better, but the text that chooses says no
            "scratch 0.8": figures({"0.8": 4.0}, flops=3e12),
        }

    result = {
        "options": {"budgets": [0.8], "tokens": [256], "seeds": [0, 1, 2], "grid": ["small", "large"]},
        "texts": ["held out"], "seeds": {"0": seed(100.0), "1": seed(0.0), "2": seed(0.2)}, "counted": ["1", "2"],
    }  # fmt: skip
    lines = study.table(result, PLAN).splitlines()
    assert "| elastic | 256 | 2.0 | 1.0 | 2.100 | 3.100 |" in lines
    assert "| singles | 256 | 1.0 | 0.5 |  | 2.500 |" in lines
    assert "| scratch |  | 3.0 |  |  | 4.000 |" in lines
    assert "| elastic - singles | 256 |  | +0.600 ± 0.141 |" in lines  # of differences, seed by seed
    del result["seeds"]["2"]
    assert "| elastic - singles | 256 |  | +0.500 |" in study.table(result, PLAN).splitlines()


def test_small_models_that_are_better_are_not_shown():
    quality = import_module("bench_quality")

    def with_scratch(*losses: float) -> str:
        names = ("parent", "scratch 0.75", "scratch 0.5")
        budgets = ("1", "0.75", "0.5")
        found = {n: {b: {"held out": loss}} for n, b, loss in zip(names, budgets, losses, strict=True)}
        options = {"budgets": [0.75, 0.5], "tokens": [256], "seeds": [0, 1], "grid": ["small"]}
        return quality.tables({"options": options, "families": {"llama": {"seeds": {"0": {}, "1": found}}}})

    assert "| scratch |  |  |  |  | 1.100 | 1.200 |" in with_scratch(1.0, 1.1, 1.2)
    shown = with_scratch(1.0, 1.2, 1.1)
    assert "| parent |" in shown and "| scratch |" not in shown
