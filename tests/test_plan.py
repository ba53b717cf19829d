"""The memory plan: its parts, what it advises, and the peak of a real run."""

import json
from pathlib import Path

import pytest
import torch
from helpers import elastic_of, flextron, parent_of
from training import VARIANT, arguments, trainer

from flextron_trainer.cli.train import set_steps
from flextron_trainer.training.expectations import MEASURED, nearest
from flextron_trainer.training.plan import plan_memory, plan_operations
from modeling_flextron import flops_per_token
from modeling_flextron.frontier import held

RESULTS = Path(__file__).parent.parent / "docs" / "results"
DTYPES = (torch.bfloat16, torch.float32)


def test_weights_gradients_and_moments_are_exact(tmp_path):
    run = trainer(tmp_path)
    plan, weights = run.plan(), sum(p.numel() * p.element_size() for p in run.model.parameters())
    assert plan.parameters == plan.gradients == weights and plan.optimizer == 2 * weights
    held = sum(t.numel() * t.element_size() for t in (*run.teacher.parameters(), *run.teacher.buffers()))
    assert plan.teacher == held + 4 * 4 * 16 * 64  # weights, and the states of 4 rows of 16 tokens
    in_place = trainer(tmp_path, teacher="self").plan()
    assert in_place.teacher == 0
    frozen = trainer(tmp_path, stage="router", router_budgets=[0.5]).plan()
    assert frozen.gradients == frozen.optimizer == 0 and frozen.activations < plan.activations


def test_what_it_depends_on(tmp_path):
    config = elastic_of(VARIANT).config

    def plan(**changes):
        return plan_memory(config, arguments(tmp_path, **changes), 128)

    plain = plan()
    assert plan(per_device_train_batch_size=8).activations == 2 * plain.activations
    assert plan(activation_checkpointing=True).activations < plain.activations / 2
    assert plan(gradient_accumulation_steps=2).total > plain.total and plain.overlap > 0
    assert plan(bf16=True).parameters == 1.5 * plain.parameters
    assert plan(loss_chunk_size=64).logits < plain.logits


def test_adapters_alone_have_gradients_and_moments(tmp_path):
    weighted = {"sampler": "weighted", "sampling_weights": [1, 1, 1, 1]}
    run = trainer(tmp_path, model=elastic_of(VARIANT).bfloat16(), adapter={}, **weighted)
    adapters = sum(p.numel() * p.element_size() for p in run.model.parameters() if p.requires_grad)
    weights, plan = sum(p.numel() * p.element_size() for p in run.model.parameters()), run.plan()
    assert plan.parameters == weights and plan.gradients == adapters and plan.optimizer == 2 * adapters


def test_weights_are_planned_as_they_are_trained(tmp_path):
    half, full = (trainer(tmp_path, model=elastic_of(VARIANT).to(dtype), teacher=None) for dtype in DTYPES)
    assert half.plan() == full.plan()
    kept = trainer(tmp_path, model=elastic_of(VARIANT).bfloat16(), teacher=None, float32_weights=False)
    assert 2 * kept.plan().optimizer == full.plan().optimizer


def test_it_says_what_to_do_when_it_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr("flextron_trainer.training.plan._available", lambda device: 1024)
    assert "activation_checkpointing" in str(plan_memory(elastic_of(VARIANT).config, arguments(tmp_path), 128))


def test_command(tmp_path):
    elastic_of(VARIANT).save_pretrained(tmp_path / "elastic")
    parent_of(VARIANT).save_pretrained(tmp_path / "parent")
    output = tmp_path / "run"
    result = flextron(
        "train", tmp_path / "elastic", "stdlib", "--teacher", tmp_path / "parent", "--output_dir", output, "--use_cpu",
        "--plan", "--sequence-length", 64, "--steps", 10,
    )  # fmt: skip
    assert result["gib"]["total"] >= 0 and {"parameters", "activations", "logits", "available"} <= result["gib"].keys()
    assert not output.exists()
    assert result["steps"] == 10 and result["operations_per_step"] > 0


@pytest.mark.parametrize("teacher", [False, True])
def test_operations_are_those_of_the_passes(tmp_path, teacher):
    config = elastic_of(VARIANT).config
    rows = [flops_per_token(config, row, 32) for row in held(config.frontier).values()]
    whole = arguments(tmp_path, sampler="uniform", subnetworks_per_step=len(rows), gradient_accumulation_steps=2)
    expected = whole.train_batch_size * 2 * 64 * (3 * sum(rows) + teacher * rows[0])
    assert plan_operations(config, whole, 64, teacher) == pytest.approx(expected)


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True, "gradient_accumulation_steps": 2}])
def test_the_peak_of_a_run_is_as_planned(tmp_path, changes):
    from torch.profiler import ProfilerActivity, profile

    parent = parent_of(VARIANT, hidden_size=128, intermediate_size=512, vocab_size=512)
    elastic = elastic_of(VARIANT, parent)
    rows = [{"input_ids": torch.randint(1, 512, (128,))} for _ in range(16)]
    run = trainer(tmp_path, model=elastic, teacher="self", max_steps=2, loss_chunk_size=64, **changes)
    run.train_dataset = rows
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run.train()
    peak = current = sum(p.numel() * p.element_size() for p in run.model.parameters())
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    assert run.plan().total == pytest.approx(peak, rel=0.2), json.dumps(run.plan().gib())


def test_what_tokens_bought_is_what_was_measured():
    for each in MEASURED:
        result = json.loads((RESULTS / f"real-{each.parent.lower()}.json").read_text())
        assert each.parameters == result["parameters"]
        assert {str(tokens): dict(row) for tokens, row in each.above.items()} == result["bought"]
    assert nearest(1).parent == min(MEASURED, key=lambda each: each.parameters).parent
    assert nearest(8_000_000_000).parent == max(MEASURED, key=lambda each: each.parameters).parent


def test_steps_may_be_left_to_the_text(tmp_path):
    settings = arguments(tmp_path, max_steps=-1, num_train_epochs=3)
    set_steps(settings, "auto")
    assert (settings.max_steps, settings.num_train_epochs) == (-1, 1)
    set_steps(settings, "7")
    assert settings.max_steps == 7
    for given in ("8", "auto", "0", "some"):
        with pytest.raises(ValueError, match=f"`steps`='{given}'"):
            set_steps(settings, given)
