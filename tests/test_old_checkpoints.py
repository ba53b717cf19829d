"""What earlier versions wrote still loads, at every budget, with the logits that it had.

`fixtures/v0.1` holds what version 0.1.0 wrote: one family as plain tensors and in levels (a frontier with an uneven row
and measured losses, a static router, token routers, a latency table), a part of it whose layers differ, the code that
was saved beside them, and the logits of the last four of `IDS` at every budget.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import difference, run_python
from safetensors.torch import load_file

from modeling_flextron import FlextronForCausalLM

OLD = Path(__file__).parent / "fixtures" / "v0.1"
IDS = torch.arange(5, 65, 6)[None]
EXPECTED = load_file(OLD / "expected.safetensors")
PART = [name for name in EXPECTED if name.startswith("part")]
BUDGETS = [name for name in EXPECTED if name not in PART]


def value_of(name: str):
    """The budget that a name of expected logits means."""
    return json.loads(name) if name.startswith("{") else name


@torch.no_grad()
def wrong(model, name: str, **options) -> float:
    """How far a model is from the logits that it had."""
    return difference(model(IDS, **options).logits[0, -4:], EXPECTED[name])


@pytest.mark.parametrize("layout", ["plain", "levels"])
def test_loads_at_every_budget_and_saves_again_in_the_other_layout(layout, tmp_path):
    load = FlextronForCausalLM.from_pretrained
    whole = load(OLD / layout, dtype=torch.float32)
    save = whole.save_pretrained if layout == "levels" else whole.export
    save(tmp_path)
    for name in BUDGETS:
        assert wrong(whole, name, flextron_budget=value_of(name)) < 1e-4
        for folder in (OLD / layout, tmp_path):
            assert wrong(load(folder, dtype=torch.float32, flextron_budget=value_of(name)), name) < 1e-4, name
    assert [row["loss"] for row in whole.frontier] == [2.0, 2.1, 2.2, 2.6]


def test_a_part_whose_layers_differ_loads_and_saves_again(tmp_path):
    part = FlextronForCausalLM.from_pretrained(OLD / "part", dtype=torch.float32)
    part.save_pretrained(tmp_path)
    for folder in (OLD / "part", tmp_path):
        for name, budget in zip(PART, (None, {"mlp": 12}), strict=True):
            loaded = FlextronForCausalLM.from_pretrained(folder, dtype=torch.float32, flextron_budget=budget)
            assert wrong(loaded, name) < 1e-4
            assert wrong(part, name, flextron_budget=budget) < 1e-4


OWN_CODE = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folder, budgets = sys.argv[1], json.loads(sys.argv[2])
ids = torch.arange(5, 65, 6)[None]
logits = {}
with torch.no_grad():
    for layout, name, budget in budgets:
        options = {"dtype": torch.float32, "trust_remote_code": True}
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/{layout}", flextron_budget=budget, **options)
        logits[f"{layout} {name}"] = model(ids).logits[0, -4:].contiguous()
save_file(logits, f"{folder}/logits.safetensors")
"""


def test_its_own_code_still_runs(tmp_path):
    """In a process that has transformers and not our package."""
    for layout in ("plain", "levels", "part"):
        shutil.copytree(OLD / layout, tmp_path / layout)
        shutil.unpack_archive(OLD / "code.tar.xz", tmp_path / layout)
    cases = [(layout, name, value_of(name)) for layout in ("plain", "levels") for name in BUDGETS]
    cases.append(("part", PART[0], None))
    run_python(OWN_CODE, tmp_path, json.dumps(cases), package=False)
    logits = load_file(tmp_path / "logits.safetensors")
    assert len(logits) == len(cases)
    for layout, name, _ in cases:
        assert difference(logits[f"{layout} {name}"], EXPECTED[name]) < 1e-4, (layout, name)
