"""Several processes train what one does: every sampler, stage and router, sharded (FSDP2) or not, and across a resume.

All cases run in one `accelerate launch` of two processes on gloo with the config file of the examples (`processes.py`),
each against one process with the global batch.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import difference, elastic_of, run_forked
from hub_server import HubServer
from safetensors.torch import load_file
from test_corrections import corrected
from test_trainer import environment
from training import VARIANT, losses, train, trainer

from modeling_flextron import FlextronForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
STEPS = 3
ROUTERS = {"teacher": None, "router_budgets": [0.6, 0.35], "per_device_eval_batch_size": 64}
RUNS = {
    "sandwich": {"ce_weight": 0.2},
    "weighted": {
        "sampler": "weighted",
        "sampling_weights": [1, 2, 0, 1],
        "teacher": None,
        "activation_checkpointing": True,
    },
    "random": {"sampler": "random"},
    "self": {"sampler": "random", "teacher": "self"},
    "accumulated": {"sampler": "uniform", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "corrected": {"family": "corrected", "sampler": "uniform", "gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "surrogate": {"stage": "router", **ROUTERS},
    "gumbel": {"stage": "router", "router_method": "gumbel", **ROUTERS},
    "token": {"stage": "router", "router_method": "token", **ROUTERS},
    "joint-gumbel": {"stage": "joint", "router_method": "gumbel", **ROUTERS},
    "joint-token": {"stage": "joint", "router_method": "token", **ROUTERS},
}
# Every stage, router and teacher, and what is passed over in between; which sizes are drawn does not meet the shards.
SHARDED = ("weighted", "random", "accumulated", "surrogate", "token", "joint-gumbel")
ADAPTER = {"target_modules": ["up_proj"], "layers_to_transform": [3]}
ADAPTED = {
    "one-adapted": {"adapter": ADAPTER, "sampler": "uniform", "subnetworks_per_step": 1, "max_steps": 6},
    "last-not-adapted": {"adapter": ADAPTER, "subnetworks_per_step": 2, "gradient_accumulation_steps": 2},
    "few-adapted": {"adapter": ADAPTER, "sampler": "random", "subnetworks_per_step": 2, "max_steps": 12},
}
SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "sampler": "random"}


def save_families(folder):
    """What the runs begin with."""
    elastic_of(VARIANT).save_pretrained(folder / "begin")
    corrected(VARIANT).save_pretrained(folder / "corrected")


def options(folder, family="begin", **changes):
    return {
        "begin": str(folder / family),
        "max_steps": STEPS,
        "optim": "sgd",
        "per_device_train_batch_size": 4,
        **changes,
    }


def alone(folder, changes):
    """The same run in one process: twice the batch."""
    return trainer(folder, **{**changes, "per_device_train_batch_size": 2 * changes["per_device_train_batch_size"]})


def launch(config: str) -> list:
    """The command that runs cases in two processes by a config file of the examples; the folder comes next."""
    file = Path(__file__).parents[1] / "examples" / "accelerate" / f"{config}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", "2"]
    return [*command, "--mixed_precision", "no", Path(__file__).parent / "processes.py"]


def in_levels(folder):
    """Write a checkpoint in levels, and the logits that it gives whole and at a budget."""
    model, ids = elastic_of(VARIANT), torch.arange(1, 13)[None]
    model.export(folder)
    with torch.no_grad():
        expected = {budget: model(ids, flextron_budget=budget or "1").logits for budget in (None, "0.35")}
    torch.save(expected, folder / "expected.pt")
    return folder


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder in which two processes ran every case."""
    folder = tmp_path_factory.mktemp("processes")
    save_families(folder)
    cases = {name: options(folder, **changes) for name, changes in RUNS.items()}
    cases |= {f"sharded-{name}": {**cases[name], "sharded": True} for name in SHARDED}
    cases["sharded-random"]["hub_model_id"] = "me/sharded"
    if importlib.util.find_spec("peft"):
        cases |= {name: options(folder, **changes) for name, changes in ADAPTED.items()}
    alone(folder / "one", options(folder, **SAVES)).train()
    cases["saves"] = options(folder, **SAVES)
    cases["resumes"] = options(folder, **SAVES, resume=str(folder / "one" / "checkpoint-2"))
    cases["traffic"] = options(folder, gradient_accumulation_steps=2, traffic=True)
    cases["tensor-parallel"] = {"begin": str(folder / "begin")}
    cases["levels"] = {"begin": str(in_levels(folder / "levels"))}
    (folder / "cases.json").write_text(json.dumps(cases))
    with HubServer() as hub:
        variables = environment() | hub.environment(folder / "home")
        code = f"import os; os.environ.update({variables!r}); from accelerate.commands.launch import main; main()"
        done = run_forked(code, [str(part) for part in (*launch("ddp")[3:], folder)], 1200, Path.cwd())
        for name, content in (hub.files("me/sharded") if "me/sharded" in hub.repos else {}).items():
            (folder / "pushed" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "pushed" / name).write_bytes(content)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-5000:]
    return folder


def history(folder, name, rank=0):
    return json.loads((folder / f"{name}-{rank}.json").read_text())


def same_curve(expected, found):
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=2e-5), key


@pytest.mark.parametrize("name", RUNS)
def test_6_two_processes_train_as_one(launched, tmp_path, name):
    """Loss of every size, gradient norms, weights and losses of the frontier, within rounding."""
    run = alone(tmp_path, options(launched, **RUNS[name]))
    train(run)
    metrics = run.evaluate()
    for case in (name, f"sharded-{name}")[: 1 + (name in SHARDED)]:
        first, second = history(launched, case), history(launched, case, 1)
        assert first["draws"] == second["draws"] == [[str(draw) for draw in run.draws(step)] for step in range(6)]
        same_curve(losses(run), first["losses"])
        assert {key for key in metrics if "loss" in key} <= set(first["metrics"])
        for key in (key for key in metrics if "loss" in key):
            assert metrics[key] == pytest.approx(first["metrics"][key], rel=1e-3), key
        final = FlextronForCausalLM.from_pretrained(launched / case / "final")
        found = dict(final.named_parameters())
        assert max(difference(p, found[n]) for n, p in run.model.named_parameters()) < 1e-5
        assert {row["name"]: row["subnetwork"] for row in final.config.frontier} == {
            row["name"]: row["subnetwork"] for row in run.model.config.frontier
        }


def test_a_step_sends_each_gradient_once(launched):
    """However many sub-networks and batches it has; without the flags of who used what."""
    run = alone(launched / "counted", options(launched, gradient_accumulation_steps=2))
    model = sum(parameter.numel() * 4 for parameter in run.model.parameters())
    assert history(launched, "traffic")["sent"] == history(launched, "traffic", 1)["sent"] == STEPS * model


@pytest.mark.parametrize("name", ADAPTED)
def test_a_size_that_skips_all_adapted_layers(launched, tmp_path, name):
    """It has a loss and no gradient in any process; sizes before it, and the steps after it, learn."""
    peft = pytest.importorskip("peft")
    run = alone(tmp_path, options(launched, **ADAPTED[name]))
    run.train()
    learns = [tuple(3 in draw.subnetwork.layers for draw in run.draws(step)) for step in range(run.args.max_steps)]
    expected = {
        "one-adapted": {(True,), (False,)},
        "last-not-adapted": {(True, False)},
        "few-adapted": {(True, True), (True, False), (False, True), (False, False)},
    }
    assert set(learns) == expected[name] and True in learns[-1] + learns[-2]
    same_curve(losses(run), history(launched, name)["losses"])
    found = load_file(launched / name / "final" / "adapter_model.safetensors")
    for key, tensor in peft.get_peft_model_state_dict(run.model).items():
        assert difference(tensor, found[key]) < 1e-6, key


def test_what_sharded_training_saves_is_remote_code_of_ours(launched):
    """`fully_shard` changes the class of a model, which must not reach the saved config or its code."""
    files = {case: {path.name for path in (launched / case / "final").glob("*.py")} for case in ("random", "begin")}
    files["begin"] = {path.name for path in (launched / "begin").glob("*.py")}
    assert {path.name for path in (launched / "sharded-random" / "final").glob("*.py")} == files["begin"]
    maps = [
        json.loads((folder / "config.json").read_text())["auto_map"]
        for folder in (launched / "begin", launched / "sharded-random" / "final")
    ]
    assert maps[0] == maps[1]


def test_what_sharded_training_pushes_is_whole(launched):
    """One process cannot gather what all of them hold."""
    final = FlextronForCausalLM.from_pretrained(launched / "sharded-random" / "final")
    pushed = FlextronForCausalLM.from_pretrained(launched / "pushed")
    assert pushed.config.levels and (launched / "pushed" / "README.md").exists()
    for name, parameter in final.named_parameters():
        assert torch.equal(parameter, pushed.get_parameter(name)), name


def test_a_tensor_parallel_model_has_one_size(launched):
    """Which is right, whole or loaded at a budget, trained too; a smaller one would take parts of parts."""
    for rank in (0, 1):
        result = history(launched, "tensor-parallel", rank)
        assert result.pop("same text") and all(result.pop(name) < 1e-5 for name in ("loaded", "loss", "gradients"))
        assert "divided among processes. `save_pretrained`" in result.pop("extract")
        assert "sizes that such a plan cannot switch to" in result.pop("train")
        for call, message in result.items():
            assert "Under a tensor-parallel plan each process holds a part" in message, call


def test_two_processes_load_their_shards_of_levels(launched):
    """FSDP2 and tensor parallelism read parts of parts."""
    for rank in (0, 1):
        found = history(launched, "levels", rank)
        assert len(found) == 4 and max(found.values()) < 1e-5, found


class TestResume:
    @pytest.fixture(scope="class")
    def whole(self, launched):
        return json.loads((launched / "one" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]

    def curve(self, whole):
        timed = ("epoch", "train_runtime", "train_tokens_per_second")
        return [{key: log[key] for key in log if key not in timed} for log in whole if "loss" in log]

    def test_from_one_process_to_two(self, launched, whole):
        same_curve(self.curve(whole), history(launched, "resumes")["losses"])

    def test_from_two_processes_to_one(self, launched, whole, tmp_path):
        run = alone(tmp_path, options(launched, **SAVES))
        run.train(resume_from_checkpoint=str(launched / "saves" / "checkpoint-2"))
        same_curve(self.curve(whole), losses(run))
        final = FlextronForCausalLM.from_pretrained(launched / "one" / "checkpoint-4")
        assert difference(torch.nn.utils.parameters_to_vector(final.parameters()),
                          torch.nn.utils.parameters_to_vector(run.model.parameters())) < 1e-5  # fmt: skip
