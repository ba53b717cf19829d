"""`flextron bench` and what it shares with the benchmarks: what is reported, and that it is what happened.

Of a repo on the Hub: `test_hub.py`.
"""

import json
import sys
from dataclasses import asdict

import pytest
import torch
import yaml
from helpers import elastic_of, flextron, run_python
from planted import plant

from flextron_trainer.measuring.bench import (
    Variants,
    against,
    logits_difference,
    tokens_per_second,
    variants_of,
    warnings,
)
from flextron_trainer.measuring.loading import Load, fetched_bytes, measure_loads


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A family in levels, and plain."""
    root = tmp_path_factory.mktemp("bench")
    model = elastic_of("gqa-wide-heads", mlp=[1, 0.5], heads=[1, 0.5], hidden=[1], depth=[1], budgets=[1, 0.6])
    model.export(root / "levels")
    model.save_pretrained(root / "plain")
    plant(root / "levels", root / "marker")
    yield model, root
    assert not (root / "marker").exists()  # of the code that lies there none was run


def test_the_verb_reports_every_budget(exported, tmp_path):
    model, root = exported
    result = flextron(
        "bench", root / "levels", "--rounds", 1, "--context", 8, "--batch-sizes", 2, "--threads", 1, "--device", "cpu",
        "--json-file", tmp_path / "result.json",
    )  # fmt: skip
    assert json.loads((tmp_path / "result.json").read_text()) == result
    kept = yaml.safe_load((tmp_path / ".result.json.run.yaml").read_text())
    assert (kept["model"], kept["rounds"], kept["batch_sizes"]) == (str(root / "levels"), 1, "2")
    parameters = {row["name"]: row["parameters"] for row in model.frontier}
    loading = {(row["budget"], row["how"]): row for row in result["loading"]}
    assert set(loading) == {(name, how) for name in parameters for how in ("budget", "slice")}
    for (name, how), row in loading.items():
        assert row["parameter_bytes"] == 4 * parameters[name] and row["seconds"] > 0
        assert row["fetched_bytes"] == fetched_bytes(root / "levels", name if how == "budget" else None)
    part, whole = loading["0.6", "budget"], loading["1", "budget"]
    assert part["fetched_bytes"] < whole["fetched_bytes"]
    if part["read_bytes"] and whole["read_bytes"]:  # from a disk that counts: the files of the budget, and no others
        assert part["fetched_bytes"] <= part["read_bytes"] < whole["read_bytes"]
    places = [(row["budget"], row["what"], row["batch"]) for row in result["cost"]]
    assert places == [(name, what, 2) for name in parameters for what in ("prefill", "decode")]
    for row in result["cost"]:
        assert row["reference"] == "native" and row["native"]["ratio"] == 1
        assert all(row[name]["milliseconds"] > 0 for name in ("control", "family", "loaded"))
    assert {(row["budget"], row["what"]) for row in result["speed"]} == {place[:2] for place in places}
    assert result["switching"]["set_budget_bytes"] == result["switching"]["share_bytes"] == 0
    assert {"threads", "versions", "device"} <= set(result["machine"]) and result["dtype"] == "float32"


def test_a_load_that_fails_says_why(exported, tmp_path, monkeypatch):
    """The process that loads writes its error, and whoever waits raises it; a script stands in for that process."""
    _, root = exported
    assert fetched_bytes(root / "plain", "0.6") == (root / "plain" / "model.safetensors").stat().st_size
    load, code = Load(str(root / "levels"), "0.01"), "from flextron_trainer.measuring.loading import main\nmain()"
    done = run_python(f"import io\nsys.stdin = io.StringIO(sys.argv[1])\n{code}", json.dumps([asdict(load)]))
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat > /dev/null\ncat << 'END'\n{done.stdout}END\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(OSError, match=r"was not loaded at budget '0.01': ValueError: `flextron_budget`='0.01'"):
        measure_loads([load])


def test_variants_are_one_network(exported):
    """Also where no stock class holds it, and the loaded model is compared with another one."""
    model, root = exported
    ids = torch.arange(1, 9)[None]
    for budget, reference in (("0.6", "native"), ({"mlp": [96, 48, 96, 48]}, "loaded")):
        variants = variants_of(model, root / "levels", budget)
        assert next(iter(variants)) == reference and set(variants) >= {"control", "family", "loaded"}
        assert logits_difference(variants, ids) < 1e-5
        model.extract("1")
    other: Variants = {**variants, "family": (model, {})}
    assert logits_difference(other, ids) > 1e-3


def test_a_smaller_budget_that_is_slower_is_named(monkeypatch):
    times = {"1": [1.0, 1.1, 1.0], "0.5": [1.3, 1.2, 1.4], "0.25": [0.5, 0.6, 0.5]}
    monkeypatch.setattr("flextron_trainer.measuring.bench.interleaved", lambda *_: times)
    monkeypatch.setattr("flextron_trainer.measuring.bench.TASKS", {"prefill": lambda *_: None})
    speed, slower = tokens_per_second(dict.fromkeys(times, (None, {})), [torch.zeros(2, 8)], 3)
    assert [(row["budget"], row["than"]) for row in slower] == [("0.5", "1")] and len(speed) == 3
    busy = {
        "budget": "1",
        "what": "decode",
        "batch": 1,
        **against({"native": [1.0, 1.0], "control": [1.5, 1.5]}, "native"),
    }
    sentences = list(warnings({"slower": slower, "cost": [busy]}))
    assert sentences[0].startswith("0.5 is slower than 1 (prefill, batch 2)") and "distrust" in sentences[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--context", 128), "`context`=128 cannot be used. The model has 128 positions"),
        (("--rounds", 0), "`rounds`=0 cannot be used"),
        (("--batch-sizes", "1,x"), "`batch_sizes`='1,x' cannot be used"),
        (("--batch-sizes", "0.5"), "`batch_sizes`=0.5 cannot be used"),
        (("--budgets", "1,huge"), "`flextron_budget`='huge' cannot be used"),
        (("--json-file", "no/such/folder.json"), "`json_file`='no/such/folder.json' cannot be used"),
    ],
)
def test_bad_input(exported, arguments, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        flextron("bench", exported[1] / "levels", "--device", "cpu", "--context", 8, *arguments)
