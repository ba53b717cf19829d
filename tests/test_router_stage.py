"""Stages `router` and `joint` of the trainer."""

import copy
import functools
import tempfile

import pytest
import torch
from helpers import difference, elastic_of
from training import VARIANT, losses, train, trainer

from flextron_trainer import FlextronTrainingArguments
from flextron_trainer.measuring.latency import entry_of, file_of, write_table
from flextron_trainer.training.router_stage import FILE
from modeling_flextron import FlextronForCausalLM, LatencyTable, count_parameters
from modeling_flextron.latency import device_name, shape_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
METHODS = ("surrogate", "gumbel", "token")
BUDGETS = [0.6, 0.35]


@pytest.fixture(autouse=True)
def fewer_updates(monkeypatch):
    """Of scores at the end of a run; how well they learn is in test_routers.py."""
    monkeypatch.setattr("flextron_trainer.routers.surrogate.FINAL_UPDATES", 50)


@functools.cache
def trained() -> FlextronForCausalLM:
    """A model for which more is better, which random weights are not. Copied, never changed."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"sampler": "random", "per_device_train_batch_size": 16, "logging_steps": 80}
        run = trainer(folder, max_steps=80, teacher=None, **options)
        run.train()
    return run.model.eval()


def router_run(output, method="surrogate", stage="router", **changes):
    changes = {"max_steps": 12, "router_budgets": BUDGETS, "teacher": None, **changes}
    if method == "surrogate":
        changes.setdefault("subnetworks_per_step", 4)  # enough for it to be trusted
    changes.setdefault("per_device_eval_batch_size", 64)  # token routers are calibrated on one batch, not eight
    changes.setdefault("model", copy.deepcopy(trained()))
    return trainer(output, stage=stage, router_method=method, **changes)


def values(run) -> torch.Tensor:
    """What the routers of a run learned, of a fresh optimizer."""
    return torch.cat([p.detach().flatten() for p in run.routers.parameters()])


def weights(run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for n, p in run.model.named_parameters() if ".router." not in n])


def choices(run) -> list:
    config = run.model.config
    if config.token_routing is not None:
        return [(entry["target"], round(entry["offset"], 3)) for entry in config.token_routing["targets"]]
    return [config.resolve(budget) for budget in (0.6, 0.5, 0.35, 0.25)]


@pytest.mark.parametrize("method", METHODS)
def test_routers_learn_and_frozen_weights_do_not(method, tmp_path):
    run = router_run(tmp_path, method, subnetworks_per_step=4, max_steps=16, per_device_train_batch_size=8)
    before, routers = weights(run), values(run).clone()
    seen = []
    step = run.routers.draws if method != "surrogate" else run.routers.learner.objective

    def watched(*args):
        seen.append([p.grad is not None for n, p in run.model.named_parameters() if ".router." not in n])
        return step(*args)

    if method != "surrogate":
        run.routers.draws = watched
    else:
        run.routers.learner.objective = watched
    run.train()
    assert torch.equal(weights(run), before) and not any(map(any, seen)) and seen
    assert not torch.equal(values(run), routers) and values(run).isfinite().all()
    assert all(p.requires_grad for p in run.model.parameters())
    metrics = run.evaluate()
    config = run.model.config
    names = [row["name"] for row in config.frontier]
    if method == "token":
        assert config.static_router is None and names == ["1", "0.6", "0.35", "0.15"]
        for entry in config.token_routing["targets"]:
            assert 0.97 * entry["target"] <= entry["cost"] <= entry["target"]
            assert entry["loss"] == metrics[f"eval_loss_auto-{entry['target']:g}"]
        return
    assert {"routed-0.6", "routed-0.35", "0.6", "0.35"} <= set(names)
    for row in config.frontier:
        assert row["loss"] == metrics[f"eval_loss_{row['name']}"]
        if row["name"].startswith("routed"):
            share = row["non_embedding_parameters"] / config.parent_size()
            assert 0.94 * float(row["name"][7:]) <= share <= float(row["name"][7:])  # the choices are few


@pytest.mark.parametrize("method", ["gumbel", "token"])
def test_joint_trains_routers_and_weights_and_always_the_full_network(method, tmp_path):
    run = router_run(tmp_path, method, "joint", subnetworks_per_step=2)
    before, routers = weights(run), values(run).clone()
    run.train()
    assert not torch.equal(weights(run), before) and not torch.equal(values(run), routers)
    logs = [set(log) for log in losses(run)]
    assert all("loss_full" in log for log in logs)
    group = run.optimizer.param_groups[-1]
    assert len(group["params"]) == len(run.routers.parameters())
    assert group["lr"] == {"gumbel": 0.1, "token": 0.01}[method]


def test_the_static_router_is_where_joint_begins(tmp_path):
    first = router_run(tmp_path / "a")
    first.train()
    second = router_run(tmp_path / "b", "gumbel", "joint", model=first.model)
    assert difference(values(second), values(first)) < 1e-4


def test_a_uniform_router_gives_rows_that_export(tmp_path):
    run = router_run(tmp_path, router_uniform=True)
    run.train()
    other = router_run(tmp_path, model=run.model)
    other.train()
    names = [row["name"] for row in other.model.config.frontier]
    assert {"uniform-0.35", "routed-0.35"} <= set(names)
    rows = {row["name"]: row["subnetwork"] for row in other.model.config.frontier}
    assert other.model.resolve_budget(rows["uniform-0.35"]).uniform
    stock = other.model.extract("uniform-0.35")
    assert stock.num_parameters() == count_parameters(other.model.config, other.model.resolve_budget("uniform-0.35"))


def test_a_surrogate_that_was_never_trusted_writes_nothing(tmp_path):
    """Neither do checkpoints of the run. It has seen too few networks, or predicts them badly."""
    for steps, count, error in ((1, 20, "inf"), (2, 40, "0.93")):
        changes = {"subnetworks_per_step": 20, "save_strategy": "steps", "save_steps": 1}
        run = router_run(tmp_path, max_steps=steps, model=elastic_of(VARIANT), **changes)
        run.routers.learner.surrogate.error = lambda *_: 0.93
        before = copy.deepcopy(run.model.config.frontier)
        with pytest.raises(ValueError, match=f"losses of {count} networks, and its error .* is {error} of that of"):
            run.train()
        assert run.model.config.static_router is None and run.model.config.frontier == before
        config = FlextronForCausalLM.from_pretrained(tmp_path / f"checkpoint-{steps}").config
        assert config.static_router is None and [row["name"] for row in config.frontier] == ["1", "0.6", "0.35", "0.15"]


def table_of(config) -> LatencyTable:
    """A made-up table in which every layer takes some time whatever its sizes, and heads more than neurons."""
    costs = {
        str(hidden): {
            "rest": 1e-3,
            "layer": 1e-3,
            "mlp": {str(size): 1e-3 + 1e-6 * hidden * size / 64 for size in config.choices("mlp")},
            "heads": {str(size): 1e-3 + 1e-4 * size for size in config.choices("heads")},
        }
        for hidden in config.choices("hidden")
    }
    conditions = {"kind": "cpu", "dtype": "float32", "batch": 1, "context": 16}
    return LatencyTable(device_name("cpu"), conditions, shape_of(config), {"decode": costs, "prefill": costs})


def test_a_stream_that_can_be_read_once_calibrates_no_token_routers(tmp_path):
    run = router_run(tmp_path, "token", max_steps=1)
    with pytest.raises(
        ValueError, match=r"gave none when it was read again\. Pass one that can be read more than once"
    ):
        run.routers.calibrate([])


def test_a_router_for_latency(tmp_path):
    model = copy.deepcopy(trained())
    table = table_of(model.config)
    model.config.latency_tables = {file_of(table): entry_of(table)}
    write_table(table, tmp_path / "m" / file_of(table))
    model.config.name_or_path = str(tmp_path / "m")
    run = router_run(tmp_path / "run", router_cost="latency", model=model, router_budgets=[0.8])
    run.train()
    (row,) = [row for row in model.config.frontier if row["name"] == "routed-latency-0.8"]
    full = table.predict(model.config.built)
    assert 0.7 * full < table.predict(model.resolve_budget(row["subnetwork"])) <= 0.8 * full
    limit = 0.85 * full
    assert 0.75 * full < table.predict(model.resolve_budget(f"{1e3 * limit}ms")) <= limit
    run.save_model(tmp_path / "saved")
    again = FlextronForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.resolve_budget(f"{1e3 * limit}ms") == model.resolve_budget(f"{1e3 * limit}ms")


@pytest.mark.parametrize(("method", "stage"), [("surrogate", "router"), ("gumbel", "joint"), ("token", "router")])
def test_resuming_gives_the_same_choices(method, stage, tmp_path):
    # Adam would turn the rounding of a gradient that should be 0 into a step of full size.
    options = {"save_strategy": "steps", "save_steps": 6, "optim": "sgd"}
    whole = router_run(tmp_path / "whole", method, stage, **options)
    whole.train()
    later = router_run(tmp_path / "later", method, stage, **options)
    later.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert difference(values(whole), values(later)) < 1e-6 and difference(weights(whole), weights(later)) < 1e-6
    assert choices(whole) == choices(later)
    for expected, found in zip(losses(whole), losses(later), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)
    if method != "token":
        (tmp_path / "whole" / "checkpoint-6" / FILE).unlink()
        with pytest.raises(ValueError, match=FILE):
            router_run(tmp_path / "x", method, stage).train(str(tmp_path / "whole" / "checkpoint-6"))


@pytest.mark.parametrize("method", METHODS)
def test_one_large_batch_is_several_small_ones(method, tmp_path):
    same = {"max_steps": 6, "optim": "sgd", "subnetworks_per_step": 3}
    large = router_run(tmp_path, method, per_device_train_batch_size=8, **same)
    small = router_run(tmp_path, method, per_device_train_batch_size=2, gradient_accumulation_steps=4, **same)
    found = []
    for run in (large, small):
        train(run)
        found.append(run.routers.learner.losses if method == "surrogate" else values(run))
    tolerance = 1e-2 if method == "token" else 1e-3  # |cost - target| is that of each batch
    assert found[0].abs().max() > 1e-3 and difference(*found) < tolerance


def arguments(**changes):
    return FlextronTrainingArguments("x", use_cpu=True, report_to="none", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_method": "search"}, "surrogate, gumbel, token"),
        ({"router_cost": "energy"}, "parameters, latency"),
        ({"router_budgets": [1.2]}, "fractions of the full cost"),
        ({"router_budgets": [0.5, 0.5]}, "repeated"),
        ({"router_budgets": []}, "fractions of the full cost"),
        ({"stage": "joint"}, "frozen weights"),
        ({"router_method": "token", "router_uniform": True}, "router_uniform"),
        ({"router_method": "token", "router_cost": "latency"}, "router_cost"),
        ({"latency_weight": -1}, "latency_weight"),
    ],
)
def test_contradicting_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(**{"stage": "router", **changes})


def test_budgets_that_nothing_meets(tmp_path):
    with pytest.raises(ValueError, match="smallest sub-network costs"):
        router_run(tmp_path, router_budgets=[0.01])
    with pytest.raises(ValueError, match=r"`router_cost`='latency' .*no latency table"):
        router_run(tmp_path, router_cost="latency")
    with pytest.raises(ValueError, match="no row that is called"):
        model = elastic_of("gqa-wide-heads", budgets={"all": 1, "little": 0.4})
        router_run(tmp_path, router_budgets=None, model=model)
