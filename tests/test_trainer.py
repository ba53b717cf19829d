"""`FlextronTrainer`: what it trains, what it logs, and that everything else is the ordinary Trainer."""

import functools
import json
import logging
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from helpers import difference, elastic_of, parent_of, run_python
from kinds import KINDS
from safetensors.torch import load_file
from training import VARIANT, arguments, losses, rows, trainer, with_adapter
from transformers import Trainer, TrainerCallback, TrainingArguments

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments
from flextron_trainer.data import collator
from modeling_flextron import FlextronConfig, FlextronForCausalLM

SCRIPT = Path(__file__).parent / "training.py"


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def full_only(variant):
    """An elastic model whose frontier is the full network alone."""
    return elastic_of(variant, budgets=[1])


class TestAgainstThePlainTrainer:
    def plain(self, variant, folder, **changes):
        changes = {**arguments(folder, **changes).to_dict()}
        ours = set(FlextronTrainingArguments.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__)
        kept = {
            "max_steps", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "logging_steps",
            "gradient_accumulation_steps", "max_grad_norm", "optim",
        } - ours  # fmt: skip
        plain = TrainingArguments(
            str(folder), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
            **{key: changes[key] for key in kept},
        )  # fmt: skip
        run = Trainer(full_only(variant), plain, train_dataset=rows(), data_collator=collator())
        run.train()
        return run

    @pytest.mark.parametrize(
        ("variant", "accumulation", "optim"),
        [
            *((variant, 1, "sgd") for variant in KINDS),
            (VARIANT, 4, "sgd"),
            *((VARIANT, n, "adamw_torch") for n in (1, 4)),
        ],
    )
    def test_8_full_network_without_distillation_is_the_plain_trainer(self, tmp_path, variant, accumulation, optim):
        changes = {"gradient_accumulation_steps": accumulation, "optim": optim}
        plain = self.plain(variant, tmp_path, **changes)
        model = full_only(variant)
        ours = trainer(tmp_path, teacher=None, model=model, sampler="uniform", subnetworks_per_step=1, **changes)
        ours.train()
        for a, b in zip(losses(plain), losses(ours), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["step"] == b["step"]
            assert a["learning_rate"] == b["learning_rate"]
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        # Adam divides by the size of a gradient, however small, so rounding moves its weights further.
        assert difference(weights(plain), weights(ours)) < {"sgd": 1e-6, "adamw_torch": 1e-3}[optim]


def test_the_plain_trainer_smooths_labels_as_for_the_parent(tmp_path):
    """It shifts them for classes that it knows by name."""
    plain = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    parent, elastic = (
        Trainer(model, plain, eval_dataset=rows(8), data_collator=collator()).evaluate()["eval_loss"]
        for model in (parent_of(VARIANT), elastic_of(VARIANT))
    )
    assert elastic == pytest.approx(parent, rel=1e-5)


@pytest.mark.parametrize(
    ("variant", "teacher", "sampler"),
    [
        *((VARIANT, "parent", sampler) for sampler in ("sandwich", "uniform")),
        *((VARIANT, teacher, "random") for teacher in ("self", None)),
        *((variant, "parent", "random") for variant in KINDS),
    ],
)
def test_6_accumulation_is_a_larger_batch(tmp_path, variant, teacher, sampler):
    """Batch 1 with accumulation 8 trains as batch 8, rows of unequal length included."""
    results = []
    for batch, accumulation in ((8, 1), (1, 8)):
        run = trainer(
            tmp_path, variant=variant, teacher=teacher, sampler=sampler, max_steps=3, ce_weight=0.3, optim="sgd",
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        run.train()
        results.append(run)
    for a, b in zip(losses(results[0]), losses(results[1]), strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6) for key in a if key != "grad_norm")
    assert difference(weights(results[0]), weights(results[1])) < 1e-6


@pytest.mark.parametrize(
    ("sampler", "teacher"),
    [*((sampler, "parent") for sampler in ("sandwich", "uniform", "weighted", "random")), ("random", "self")],
)
def test_every_sampler_and_teacher_learns(tmp_path, sampler, teacher):
    weights = [0.4, 0.2, 0.2, 0.2] if sampler == "weighted" else None
    run = trainer(tmp_path, teacher=teacher, sampler=sampler, max_steps=30, sampling_weights=weights, ce_weight=0.1)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    smallest = run.model.config.frontier[-1]["name"]
    assert after[f"eval_loss_{smallest}"] < before[f"eval_loss_{smallest}"] - 0.1


@pytest.mark.parametrize("sampler", ["sandwich", "weighted"])
def test_checkpointing_accumulation_and_bf16_together_train_the_same(tmp_path, sampler):
    settings = {"sampler": sampler, "max_steps": 2, "optim": "sgd", "max_grad_norm": 1e9}
    settings["sampling_weights"] = [0.4, 0.2, 0.2, 0.2] if sampler == "weighted" else None
    runs = []
    for bf16, checkpointed, batch in ((False, False, 8), (False, True, 2), (True, True, 2)):
        run = trainer(
            tmp_path, bf16=bf16, activation_checkpointing=checkpointed, per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch, **settings,
        )  # fmt: skip
        run.train()
        runs.append(run)
    plain, whole, half = ([log["grad_norm"] for log in losses(run)] for run in runs)
    assert difference(weights(runs[0]), weights(runs[1])) < 1e-6 and whole == pytest.approx(plain, rel=1e-4)
    assert weights(runs[2]).isfinite().all() and half == pytest.approx(plain, rel=0.05)
    moved = weights(runs[0]) - weights(trainer(tmp_path))
    assert (weights(runs[2]) - weights(runs[0])).norm() < 0.1 * moved.norm()


def test_memory_is_that_of_one_subnetwork(tmp_path):
    """A backward pass runs before the next sub-network runs forward."""
    order = []
    run = trainer(tmp_path, max_steps=1)
    model_forward, backward = run.model.forward, run.accelerator.backward

    def spy(name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            order.append(name)
            return function(*args, **kwargs)

        return call

    run.model.forward, run.accelerator.backward = spy("forward", model_forward), spy("backward", backward)
    run.train()
    assert order == ["forward", "backward"] * 3


def test_the_teacher_runs_once_for_each_batch_and_gets_no_gradient(tmp_path):
    run = trainer(tmp_path, max_steps=2)
    calls = []
    run.teacher.base_model.register_forward_hook(lambda *_: calls.append(1))
    run.train()
    assert len(calls) == 2
    assert all(p.grad is None for p in run.teacher.parameters())


def test_the_teacher_can_be_a_folder_or_another_elastic_model(tmp_path, ids):
    parent_of(VARIANT).save_pretrained(tmp_path / "parent")
    by_name = trainer(tmp_path, teacher=str(tmp_path / "parent"), max_steps=2)
    by_name.train()
    by_model = trainer(tmp_path, max_steps=2)
    by_model.train()
    assert torch.equal(weights(by_name), weights(by_model))
    elastic = elastic_of(VARIANT)
    elastic.set_budget("0.35")
    run = trainer(tmp_path, teacher=elastic, max_steps=1)
    state = run._teach({"input_ids": ids})
    expected = elastic(ids).logits
    assert difference(state.hidden_states @ state.weight.T, expected) < 1e-5


def test_in_place_the_full_network_teaches_with_the_states_of_its_own_step(tmp_path):
    run = trainer(tmp_path, teacher="self", max_steps=1, sampler="uniform", subnetworks_per_step=1)
    assert run.draws(0)[0].subnetwork == run.model.built
    assert run.teacher is None
    run.train()
    logged = {key for key in losses(run)[0] if key.startswith("loss_")}
    assert "loss_1" in logged and logged == {f"loss_{draw.name}" for draw in run.draws(0)}


def test_in_place_the_others_learn_from_the_full_network(tmp_path):
    """The first step's losses: cross entropy for the full network, KL to it for the smallest."""
    run = trainer(tmp_path, teacher="self", max_steps=1, subnetworks_per_step=2, per_device_train_batch_size=64)
    model, batch = run.model, run.data_collator([run.train_dataset[i] for i in range(64)])
    labels, inputs = batch.pop("labels")[:, 1:], dict(batch)
    with torch.no_grad():
        full, small = (model(**inputs, flextron_budget=name).logits[:, :-1] for name in ("1", "0.15"))
    counts = labels != -100
    entropy = torch.nn.functional.cross_entropy(full[counts], labels[counts])
    kl = torch.nn.functional.kl_div(
        small[counts].log_softmax(-1), full[counts].log_softmax(-1), log_target=True, reduction="batchmean"
    )
    run.train()
    log = losses(run)[0]
    assert log["loss_1"] == pytest.approx(entropy.item(), rel=1e-3)
    assert log["loss_0.15"] == pytest.approx(kl.item(), rel=1e-3)


class TestLogs:
    def test_losses_in_the_frontier_are_those_of_the_weights(self, tmp_path):
        run = trainer(tmp_path, max_steps=2)
        run.evaluate()
        assert run.model.frontier[0]["loss"] is not None
        run.train()
        assert all(row["loss"] is None for row in run.model.frontier)

    def test_the_best_model_brings_its_own_losses(self, tmp_path):
        run = trainer(
            tmp_path, max_steps=4, learning_rate=5.0, eval_strategy="steps", eval_steps=1, save_strategy="steps",
            save_steps=1, load_best_model_at_end=True,
        )  # fmt: skip
        run.train()
        assert run.state.best_global_step < 4  # at this learning rate it got worse
        found = {row["name"]: row["loss"] for row in run.model.frontier}
        measured = run.evaluate()
        for name, loss in found.items():
            assert loss == pytest.approx(measured[f"eval_loss_{name}"], rel=1e-5)

    def test_a_loss_that_is_no_number_is_not_written(self, tmp_path):
        run = trainer(tmp_path)
        with torch.no_grad():
            run.model.model.norm.weight.fill_(float("inf"))
        run.evaluate()
        run.save_model(tmp_path / "saved")
        assert all(row["loss"] is None for row in run.model.frontier)

    def test_every_size_has_its_own_loss(self, tmp_path):
        run = trainer(tmp_path, subnetworks_per_step=4)
        run.train()
        for log in losses(run):
            parts = [log[key] for key in log if key.startswith("loss_")]
            assert {"loss_1", "loss_0.15"} <= set(log) and len(parts) >= 3
            draws = [drawn.name for drawn in run.draws(log["step"] - 1)]
            assert log["loss"] == pytest.approx(sum(log[f"loss_{name}"] for name in draws) / 4, rel=1e-3)

    def test_evaluation_covers_and_fills_the_frontier(self, tmp_path, ids):
        run = trainer(tmp_path)
        names = [row["name"] for row in run.model.config.frontier]
        metrics = run.evaluate()
        assert {f"eval_loss_{name}" for name in names} <= set(metrics)
        assert metrics["eval_loss"] == metrics["eval_loss_1"]
        for row in run.model.config.frontier:
            assert row["loss"] == metrics[f"eval_loss_{row['name']}"]
        assert run.model.subnetwork == run.model.built
        run.save_model(tmp_path / "saved")
        again = FlextronForCausalLM.from_pretrained(tmp_path / "saved")
        assert [row["loss"] for row in again.frontier] == [row["loss"] for row in run.model.frontier]
        assert again.resolve_budget(f"loss<={metrics['eval_loss_1'] + 10}") is not None

    def test_eval_loss_is_that_of_the_current_budget(self, tmp_path):
        run = trainer(tmp_path)
        run.model.set_budget("0.35")
        metrics = run.evaluate()
        assert metrics["eval_loss"] == metrics["eval_loss_0.35"] != metrics["eval_loss_1"]
        assert run.model.subnetwork == run.model.resolve_budget("0.35")

    def test_callbacks_see_one_evaluation_and_best_model_works(self, tmp_path):
        class Count(TrainerCallback):
            seen = 0

            def on_evaluate(self, args, state, control, metrics, **kwargs):
                self.seen += 1
                assert "eval_loss_0.15" in metrics

        count = Count()
        run = trainer(
            tmp_path, callbacks=[count], max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps",
            save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss_0.15", greater_is_better=False,
        )  # fmt: skip
        run.train()
        assert count.seen == 2 and run.state.best_model_checkpoint is not None

    def test_tensorboard_names(self, tmp_path):
        from transformers.integrations.integration_utils import rewrite_logs

        run = trainer(tmp_path, max_steps=1)
        run.train()
        assert "train/loss_0.15" in rewrite_logs(losses(run)[0])

    @pytest.fixture
    def warned(self, monkeypatch):
        messages = []
        logger = logging.getLogger("flextron_trainer.training.checks")
        monkeypatch.setattr(logger, "warning", lambda message, *args: messages.append(message))
        return messages

    def test_it_warns_when_the_full_size_is_not_trained(self, tmp_path, warned):
        trainer(tmp_path)
        assert not warned
        trainer(tmp_path, sampler="random")
        trainer(tmp_path, sampler="weighted", sampling_weights=[0, 1, 1, 1])
        assert len(warned) == 2 and all("full network" in message for message in warned)


def test_a_non_finite_loss_stops_with_step_and_subnetwork(tmp_path):
    run = trainer(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
    step = run.training_step

    def poison(*args, **kwargs):
        if run.state.global_step == 3:
            with torch.no_grad():
                run.model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
        return step(*args, **kwargs)

    run.training_step = poison
    with pytest.raises(FloatingPointError, match=r"sub-network '1' .* at step 3"):
        run.train()
    again = FlextronForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert all(p.isfinite().all() for p in again.parameters())


def test_nothing_that_was_saved_is_a_pickle_of_arguments(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.train()
    run.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert "training_args.json" in names and "training_args.bin" not in names
    assert json.loads((tmp_path / "training_args.json").read_text())["sampler"] == "sandwich"


def test_what_is_saved_does_not_say_that_training_had_no_cache(tmp_path, ids):
    """The base class sets `use_cache` to False in the config of what it trains; nobody else's decoding is meant."""
    run = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    seen, forward = [], run.model.model.forward

    def watched(*args, **kwargs):
        output = forward(*args, **kwargs)
        seen.append(output.past_key_values is not None)
        return output

    run.model.model.forward = watched
    run.train()
    run.evaluate()
    run.predict(rows(4))
    assert len(seen) > 6 and not any(seen)  # nor do training and evaluation build one
    run.model.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "checkpoint-1", tmp_path / "saved"):
        loaded = FlextronForCausalLM.from_pretrained(folder)
        assert loaded(ids).past_key_values.get_seq_length() == ids.shape[1]
    assert run.model.extract()(ids).past_key_values.get_seq_length() == ids.shape[1]
    without = elastic_of(VARIANT)
    without.config.use_cache = False  # as its owner wants it
    assert trainer(tmp_path, model=without).model.config.use_cache is False


@pytest.mark.parametrize("adapter", [False, True], ids=["model", "adapter"])
def test_a_push_in_the_background_is_of_the_weights_at_the_call(adapter, tmp_path, monkeypatch):
    """What happens to the model, and to the folder of the run, after the call is not pushed."""
    from flextron_trainer import hub
    from flextron_trainer.publishing import push

    go, pushed = threading.Event(), {}

    def commit(repo_id, operations, **kwargs):
        assert go.wait(60) and repo_id == "me/model" and kwargs["commit_message"] == "now"
        for operation in operations:
            path = Path(operation.path_or_fileobj)
            content = load_file(path) if path.suffix == ".safetensors" else path.read_text(errors="replace")
            pushed[operation.path_in_repo] = content
        return "committed"

    class Repo:
        repo_id = "me/model"

    monkeypatch.setattr(hub, "create_commit", commit)
    monkeypatch.setattr(hub, "list_repo_files", lambda *args, **kwargs: [])
    monkeypatch.setattr(push, "create_repo", lambda *args, **kwargs: Repo)
    model = elastic_of(VARIANT)
    run = trainer(tmp_path, model=with_adapter(model, init_lora_weights=False) if adapter else model, max_steps=1)
    run.hub_model_id = "me/model"
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    job = run.push_to_hub("now", blocking=False)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()
    run.save_model()
    assert not job.done()
    go.set()
    assert job.result(60) == "committed" and "README.md" in pushed
    tensors = {name: t for content in pushed.values() if isinstance(content, dict) for name, t in content.items()}
    assert tensors and all(t.abs().sum() > 0 for t in tensors.values())
    if adapter:
        assert "adapter_config.json" in pushed and "config.json" not in pushed
    else:
        assert torch.equal(tensors["model.norm.weight[0:32]"], before["model.norm.weight"][:32])
    place = Path(hub.tempfile.gettempdir())
    assert not [path for path in place.glob("flextron-push-*")]  # nothing is left behind


class TestResume:
    SAVES = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}

    @pytest.fixture(scope="class")
    def uninterrupted(self, tmp_path_factory):
        run = trainer(tmp_path_factory.mktemp("whole"), sampler="random", **self.SAVES)
        run.train()
        return run

    def resume(self, folder):
        run = trainer(folder, sampler="random", **self.SAVES)
        run.train(resume_from_checkpoint=True)
        return run

    def test_from_a_checkpoint(self, uninterrupted, tmp_path):
        first = trainer(tmp_path, sampler="random", **{**self.SAVES, "max_steps": 6})
        first.add_callback(StopAt(4))
        first.train()
        run = self.resume(tmp_path)
        assert losses(run) == losses(uninterrupted)
        assert torch.equal(weights(run), weights(uninterrupted))

    @pytest.mark.slow
    @pytest.mark.parametrize("when", [{"kill_at": 5}, {"kill_in_save": "weights"}, {"kill_in_save": "state"}])
    def test_killed(self, uninterrupted, tmp_path, when):
        """SIGKILL while training and while saving: resuming gives the uninterrupted run."""
        changes = json.dumps({"sampler": "random", **self.SAVES, **when})
        done = run_python(SCRIPT.read_text(), tmp_path, changes, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        folders = {path.name for path in tmp_path.glob("checkpoint-*")}
        assert "checkpoint-2" in folders
        if when.get("kill_in_save") == "state":
            assert "checkpoint-4" in folders  # half-written, and must be passed over
        run = self.resume(tmp_path)
        assert losses(run) == losses(uninterrupted)
        assert torch.equal(weights(run), weights(uninterrupted))

    def test_nothing_to_resume_from(self, tmp_path):
        with pytest.raises(ValueError, match="no complete checkpoint"):
            trainer(tmp_path).train(resume_from_checkpoint=True)


def test_tokens_of_every_run_are_counted_once(tmp_path):
    """Without padding, in checkpoints too; a resumed run is the same run, another one is another."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "seed": 1}
    first = trainer(tmp_path, **settings)
    first.train()
    tokens = first.state.num_input_tokens_seen
    run = {**first.args.changed(), "steps": 4, "tokens": tokens}
    assert 4 * 4 * 14 < tokens < 4 * 4 * 16 and first.model.config.training_runs == [run]
    half = FlextronConfig.from_pretrained(tmp_path / "checkpoint-2").training_runs
    assert [(entry["steps"], 0 < entry["tokens"] < tokens) for entry in half] == [(2, True)]
    loaded = FlextronForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    for model, checkpoint in ((first.model, 2), (loaded, 2), (None, 4)):  # the last one has nothing left to do
        again = trainer(tmp_path / "again", model=model, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
        assert again.model.config.training_runs == [run]
    second = trainer(tmp_path / "second", model=again.model, **settings)
    second.train()
    assert second.model.config.training_runs == [run, run]
    second.model.config.training_runs.append({"stage": "router", "steps": 1000, "tokens": 1_230_000})
    second.save_model()
    second.create_model_card()
    card = (tmp_path / "second" / "README.md").read_text()
    assert card.count(f"`FlextronTrainer` on {tokens:,} tokens in 4 steps") == 2
    assert "on 1.2 M tokens in 1,000 steps" in card
    assert f"The weights were trained on {2 * tokens:,} tokens in all." in card


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def environment():
    root = Path(__file__).parent.parent
    path = ":".join(map(str, (root, root / "trainer", root / "tests")))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_ordinary_trainer_on_a_model_at_a_budget(tmp_path):
    """A model that was loaded at a budget is an ordinary model to the ordinary Trainer."""
    elastic = elastic_of(VARIANT)
    elastic.save_pretrained(tmp_path / "elastic")
    part = FlextronForCausalLM.from_pretrained(tmp_path / "elastic", flextron_budget="0.35")
    plain = TrainingArguments(
        str(tmp_path / "run"), max_steps=20, learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    run = Trainer(part, plain, train_dataset=rows(), eval_dataset=rows(8, seed=4), data_collator=collator())
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    run.save_model(tmp_path / "tuned")
    again = FlextronForCausalLM.from_pretrained(tmp_path / "tuned")
    assert again.num_parameters() == part.num_parameters() and again.built == part.built


def test_a_model_can_be_given_as_a_folder(tmp_path):
    elastic_of(VARIANT).save_pretrained(tmp_path / "elastic")
    run = FlextronTrainer(str(tmp_path / "elastic"), arguments(tmp_path, max_steps=1), train_dataset=rows())
    run.train()
