"""Every argument of the base classes is as there, or refused by name: the tables, and what needs a test of its own."""

import inspect
import logging
import re
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import elastic_of
from safetensors.torch import load_file
from training import VARIANT, arguments, losses, rows, trainer
from transformers import Trainer, TrainerCallback, TrainingArguments

from flextron_trainer import FlextronTrainer
from flextron_trainer.data import collator
from flextron_trainer.training.router_stage import TokenRouters
from modeling_flextron import FlextronForCausalLM, FlextronForSequenceClassification

# How an argument is honoured: OWN, with a default or a type of ours; SAME, by the base class alone, on which nothing
# of elastic training depends; or the name of the test that shows it, here or in the file before the colon.
OWN, SAME = "own", "same"
TRAINER = {
    "model": OWN,
    "args": OWN,
    "data_collator": "test_rows_of_any_kind_with_a_collator_for_them",
    "train_dataset": "test_rows_of_any_kind_with_a_collator_for_them",
    "eval_dataset": "test_the_first_of_several_eval_sets_is_what_the_frontier_goes_by",
    "processing_class": "test_rows_of_any_kind_with_a_collator_for_them",
    "model_init": "test_refused",
    "compute_loss_func": "test_refused",
    "compute_metrics": "test_metrics_of_the_current_size",
    "callbacks": "test_an_optimizer_and_callbacks_of_the_user",
    "optimizers": "test_an_optimizer_and_callbacks_of_the_user",
    "optimizer_cls_and_kwargs": "test_an_optimizer_and_callbacks_of_the_user",
    "preprocess_logits_for_metrics": "test_metrics_of_the_current_size",
}
ARGUMENTS = {
    **dict.fromkeys(
        (
            "output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "lr_scheduler_kwargs",
            "warmup_steps", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
            "optim_target_modules", "max_grad_norm", "tf32", "torch_compile_mode", "torch_empty_cache_steps",
            "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter",
            "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
            "trackio_bucket_id", "trackio_static_space_id", "eval_strategy", "eval_steps", "eval_delay",
            "eval_on_start", "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit",
            "enable_jit_checkpoint", "hub_token", "hub_private_repo", "hub_model_id", "hub_always_push",
            "hub_revision", "ignore_data_skip", "restore_callback_states_from_checkpoint", "full_determinism", "seed",
            "data_seed", "use_cpu", "accelerator_config", "dataloader_drop_last", "dataloader_pin_memory",
            "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_in_order", "length_column_name",
            "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_backend", "ddp_timeout", "debug", "skip_memory_metrics",
            "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank", "liger_kernel_config",
        ),
        SAME,
    ),
    **dict.fromkeys(
        (
            "label_smoothing_factor", "use_liger_kernel", "auto_find_batch_size", "deepspeed", "ddp_static_graph",
            "bf16_full_eval", "fp16_full_eval", "optim", "label_names",
            "activation_checkpointing_kwargs",
        ),
        "test_refused",
    ),
    **dict.fromkeys(("learning_rate", "lr_scheduler_type", "include_num_input_tokens_seen"), OWN),
    "gradient_accumulation_steps": "test_trainer.py:test_6_accumulation_is_a_larger_batch",
    "average_tokens_across_devices": "test_processes.py:test_6_two_processes_train_as_one",
    "bf16": "test_trainer.py:test_checkpointing_accumulation_and_bf16_together_train_the_same",
    "fp16": "test_losses.py:test_float16_keeps_small_gradients",
    "activation_checkpointing": "test_checkpoints_are_never_reentrant",
    "gradient_checkpointing": "test_checkpoints_are_never_reentrant",
    "gradient_checkpointing_kwargs": "test_checkpoints_are_never_reentrant",
    "torch_compile": "test_quantized.py:test_the_trainer_compiles_one_graph_for_each_row",
    "torch_compile_backend": "test_quantized.py:test_the_trainer_compiles_one_graph_for_each_row",
    "use_cache": SAME,
    "neftune_noise_alpha": "test_noise_on_embeddings_is_in_what_learns_alone",
    "per_device_eval_batch_size": "test_evaluation.py:test_a_loss_does_not_depend_on_the_batches",
    "prediction_loss_only": "test_metrics_of_the_current_size",
    "eval_do_concat_batches": "test_metrics_of_the_current_size",
    "eval_use_gather_object": "test_metrics_of_the_current_size",
    "eval_accumulation_steps": "test_metrics_of_the_current_size",
    "include_for_metrics": "test_metrics_of_the_current_size",
    "batch_eval_metrics": "test_metrics_of_the_current_size",
    "parallelism_config": "test_a_divided_sequence_is_refused",
    "push_to_hub": "test_hub.py:test_trainer",
    "hub_strategy": "test_hub.py:test_trainer",
    "load_best_model_at_end": "test_trainer.py:test_the_best_model_brings_its_own_losses",
    "metric_for_best_model": "test_trainer.py:test_callbacks_see_one_evaluation_and_best_model_works",
    "greater_is_better": "test_trainer.py:test_callbacks_see_one_evaluation_and_best_model_works",
    "dataloader_num_workers": "test_data.py:test_collator_reaches_workers_of_any_kind",
    "dataloader_multiprocessing_context": "test_data.py:test_collator_reaches_workers_of_any_kind",
    "remove_unused_columns": "test_rows_of_any_kind_with_a_collator_for_them",
    "train_sampling_strategy": "test_rows_in_groups_of_one_length_are_evaluated_once",
    "ddp_find_unused_parameters": "test_processes.py:test_6_two_processes_train_as_one",
    "fsdp": "fsdp2.py:main",
    "fsdp_config": "fsdp2.py:main",
}  # fmt: skip


def test_the_tables_are_whole():
    """A new argument of transformers fails here, until somebody has looked at it."""
    assert TRAINER.keys() == inspect.signature(Trainer.__init__).parameters.keys() - {"self"}
    assert ARGUMENTS.keys() == {field.name for field in fields(TrainingArguments)}


@pytest.mark.parametrize("how", sorted({*TRAINER.values(), *ARGUMENTS.values()} - {OWN, SAME}))
def test_the_tables_name_tests_that_exist(how):
    file, _, name = how.rpartition(":")
    text = (Path(__file__).parent / (file or Path(__file__).name)).read_text()
    assert f"def {name}(" in text


REFUSED = {
    "label_smoothing_factor": (0.1, "no label smoothing"),
    "use_liger_kernel": (True, "Its kernels take the place of layers of stock models"),
    "auto_find_batch_size": (True, "go on from the weights and routers that the failed one left"),
    "deepspeed": ("zero3.json", "Its engine steps after every backward pass"),
    "ddp_static_graph": (True, "Every step trains other sub-networks"),
    "bf16_full_eval": (True, "It rounds the weights that are trained"),
    "fp16_full_eval": (True, "It rounds the weights that are trained"),
    "optim": ("galore_adamw_layerwise", "It changes weights inside of a backward pass"),
    "label_names": (["targets"], "takes its targets as `labels`"),
    "activation_checkpointing_kwargs": ({"use_reentrant": True}, "Reentrant checkpoints lose the gradients of routers"),
    "router_method": ("token", "Stage 'elastic' does not read it. Pass stage='router' as well"),
    "latency_weight": (0.5, "Stage 'elastic' does not read it. Pass stage='router' as well"),
    "router_learning_rate": (0.3, "Stage 'elastic' does not read it. Pass stage='router' as well"),
    "block_inputs": ("parent", "Stage 'elastic' does not read it. Pass stage='blocks' as well"),
    "model_init": (lambda: elastic_of(VARIANT), "An elastic model is not drawn anew"),
    "compute_loss_func": (lambda outputs, labels, **_: outputs.logits.sum(), "never make all logits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"^`{name}`=.* cannot be used\. .*{re.escape(message)}"):
        if name in TRAINER:
            FlextronTrainer(
                args=arguments(tmp_path), train_dataset=rows(2), **{"model": elastic_of(VARIANT), name: value}
            )
        else:
            arguments(tmp_path, **{name: value})


def test_copied_arguments_are_as_before(tmp_path):
    copied = type(arguments(tmp_path))(**arguments(tmp_path).to_dict())
    assert (copied.block_inputs, copied.router_learning_rate) == ("own", 0.1)


def test_refused_without_an_argument(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    with pytest.raises(ValueError, match="`hyperparameter_search`='optuna' cannot be used"):
        run.hyperparameter_search(backend="optuna")
    with pytest.raises(ValueError, match="`model`='NoneType' cannot be used"):
        FlextronTrainer(args=arguments(tmp_path))
    with pytest.raises(ValueError, match=r"`model`='FlextronForSequenceClassification' .* those of a language model"):
        FlextronTrainer(FlextronForSequenceClassification(run.model.config), arguments(tmp_path))
    with pytest.raises(TypeError, match="positional"):  # where the base class has its collator
        FlextronTrainer(elastic_of(VARIANT), arguments(tmp_path), collator())
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="Its engine steps after every backward pass"):
        arguments(tmp_path)


def test_a_divided_sequence_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "get_cp_size", lambda self: 2)
    with pytest.raises(ValueError, match=r"`parallelism_config`=.*needs the one after it"):
        trainer(tmp_path)


# ------------------------------------------------------------------------------------------------- data


class OnePass(torch.utils.data.IterableDataset):
    """A stream that can be read once, like a socket."""

    def __init__(self, items):
        self.items, self.taken = iter(items), 0

    def __iter__(self):
        for item in self.items:
            self.taken += 1
            yield item


def texts():
    return [{"text": " ".join(map(str, row["input_ids"].tolist()))} for row in rows(12)]


def ids_of(batch: list[dict]) -> dict[str, torch.Tensor]:
    """A collator of the user, for rows that have no token ids."""
    return collator()([{"input_ids": list(map(int, row["text"].split()))} for row in batch])


def made_when_read():
    data = datasets.Dataset.from_list(texts())
    data.set_transform(lambda batch: {"input_ids": [list(map(int, text.split())) for text in batch["text"]]})
    return data


DATA = {
    "texts": lambda: {"train_dataset": texts(), "data_collator": ids_of},
    "a stream of texts": lambda: {"train_dataset": OnePass(texts()), "data_collator": ids_of},
    "a stream of ids": lambda: {"train_dataset": OnePass(rows(12))},
    "rows that are made when they are read": lambda: {"train_dataset": made_when_read()},
    "no collator": lambda: {"train_dataset": rows(12), "data_collator": None},
}


def run_on(folder, **data):
    order = {"train_sampling_strategy": "sequential", "remove_unused_columns": False}
    run = FlextronTrainer(elastic_of(VARIANT), arguments(folder, max_steps=2, **order), **data)
    run.train()
    return run


@pytest.mark.parametrize("kind", DATA)
def test_rows_of_any_kind_with_a_collator_for_them(tmp_path, kind):
    """They train as token ids do, from the first row on."""
    assert losses(run_on(tmp_path, **DATA[kind]())) == losses(run_on(tmp_path, train_dataset=rows(12)))


def test_the_plan_reads_nothing(tmp_path):
    stream = OnePass(rows(4))
    run = FlextronTrainer(elastic_of(VARIANT), arguments(tmp_path), train_dataset=stream)
    with pytest.raises(ValueError, match=r"`sequence_length`=None .*left to training"):
        run.plan()
    assert run.plan(16) == trainer(tmp_path, teacher=None).plan() and stream.taken == 0


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (lambda batch: {"input_ids": torch.ones(2, 4, dtype=torch.long)}, "no `labels`"),
        (lambda batch: {"labels": torch.ones(2, 4, dtype=torch.long)}, "no `input_ids`"),
        (lambda batch: {**collator()(batch), "shift_labels": torch.ones(2, 4)}, "shifts `labels` itself"),
    ],
)
def test_batches_that_say_nothing_of_the_next_token(tmp_path, collate, message):
    with pytest.raises(ValueError, match=f"`data_collator`=.*{message}"):
        run_on(tmp_path, train_dataset=rows(4), data_collator=collate)


def test_rows_in_groups_of_one_length_are_evaluated_once(tmp_path):
    plain = trainer(tmp_path)
    grouped = trainer(tmp_path, train_sampling_strategy="group_by_length", max_steps=2, per_device_eval_batch_size=3)
    found, expected = grouped.evaluate(), plain.evaluate()
    assert found["eval_tokens"] == expected["eval_tokens"]
    assert found["eval_loss_0.35"] == pytest.approx(expected["eval_loss_0.35"], rel=1e-6)
    grouped.train()


# ------------------------------------------------------------------------------------------- evaluation


def test_the_first_of_several_eval_sets_is_what_the_frontier_goes_by(tmp_path):
    sets = {"prose": rows(4, seed=5), "code": rows(6, seed=6)}
    run = trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_prose_loss")
    run.eval_dataset = sets
    run.train()
    metrics = run.evaluate()
    for row in run.model.frontier:
        assert row["loss"] == metrics[f"eval_prose_loss_{row['name']}"] != metrics[f"eval_code_loss_{row['name']}"]
        assert row["metrics"]["code/loss"] == metrics[f"eval_code_loss_{row['name']}"]
        assert {(on["text"], on["tokens"]) for on in row["measured"]} == {
            (name, sum(len(one["input_ids"]) - 1 for one in part)) for name, part in sets.items()
        }
    alone = run.evaluate(sets["code"])
    assert alone["eval_loss_0.35"] == pytest.approx(metrics["eval_code_loss_0.35"])
    assert run.model.frontier[0]["loss"] == alone["eval_loss_1"]
    run.evaluate(sets["prose"], metric_key_prefix="other")
    assert run.model.frontier[0]["loss"] == alone["eval_loss_1"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_eval_metrics": True},
        {"include_for_metrics": ["inputs", "loss"]},
        {"eval_accumulation_steps": 1},
        {"eval_use_gather_object": True},
        {"eval_do_concat_batches": False},
        {"prediction_loss_only": True},
    ],
    ids=str,
)
def test_metrics_of_the_current_size(tmp_path, changes):
    """They see the predictions of the current budget, as in any Trainer; losses are those of all tokens anyway."""
    seen = []

    def accuracy(prediction, compute_result=True):
        guesses, labels = prediction.predictions, prediction.label_ids
        pairs = zip(guesses, labels, strict=True) if isinstance(guesses, list) else [(guesses, labels)]
        for guess, label in pairs:
            guess, label = np.asarray(guess)[:, :-1], np.asarray(label)[:, 1:]
            seen.append((guess == label)[label != -100])
        assert (prediction.inputs is not None) == ("include_for_metrics" in changes)
        return {"right": np.concatenate(seen).mean()}

    run = FlextronTrainer(
        elastic_of(VARIANT),
        arguments(tmp_path, per_device_eval_batch_size=3, **changes),
        eval_dataset=rows(9, seed=4),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    run.model.set_budget("0.35")
    metrics = run.evaluate()
    expected = trainer(tmp_path).evaluate()
    assert metrics["eval_loss"] == metrics["eval_loss_0.35"]
    assert metrics["eval_loss_0.35"] == pytest.approx(expected["eval_loss_0.35"], rel=1e-6)
    if "prediction_loss_only" in changes:
        assert not seen and "eval_right" not in metrics
    else:
        assert metrics["eval_right"] == pytest.approx(expected["eval_accuracy_0.35"], abs=1e-6)


def test_predictions_are_those_of_the_base_class(tmp_path):
    run = trainer(tmp_path, per_device_eval_batch_size=3)
    run.model.set_budget("0.35")
    output = run.predict(rows(9, seed=4))
    expected = run.evaluate()
    assert output.predictions.shape == (9, 16, 96) and output.metrics["test_loss"] == expected["eval_loss"]
    assert not any(key.startswith("test_loss_") for key in output.metrics)
    run.data_collator = lambda batch: {"input_ids": torch.ones(len(batch), 4, dtype=torch.long)}
    assert "test_loss" not in run.predict(rows(2)).metrics
    with pytest.raises(ValueError, match="no `labels`"):
        run.evaluate()


def test_nothing_to_evaluate_on_is_refused(tmp_path):
    run = trainer(tmp_path)
    with pytest.raises(ValueError, match=r"`rows`=2 .*None of their tokens is to be foretold"):
        run.evaluate([{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 2)
    with pytest.raises(ValueError, match="It has no rows"):
        run.evaluate([])


# --------------------------------------------------------------------------------------------- training


def weights(run) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in run.model.parameters()])


def test_an_optimizer_and_callbacks_of_the_user(tmp_path):
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, *args, **kwargs):
            self.steps += 1

    expected = run_on(tmp_path, train_dataset=rows(12))  # with Adam
    count, results = Count(), []
    for how in ("optimizers", "optimizer_cls_and_kwargs"):
        model = elastic_of(VARIANT)
        given = {
            "optimizers": (torch.optim.SGD(model.parameters(), 1e-2), None),
            "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-2}),
        }
        options = {how: given[how], "train_dataset": rows(12), "callbacks": [count]}
        order = {"train_sampling_strategy": "sequential", "max_steps": 2}
        run = FlextronTrainer(model, arguments(tmp_path, **order), **options)
        run.train()
        results.append(weights(run))
    assert count.steps == 4 and torch.equal(*results) and not torch.equal(results[0], weights(expected))


def test_noise_on_embeddings_is_in_what_learns_alone(tmp_path):
    runs, taught = [trainer(tmp_path, max_steps=1, neftune_noise_alpha=alpha) for alpha in (None, 5.0)], []
    for run in runs:
        run.teacher.base_model.register_forward_hook(lambda *call: taught.append(call[-1].last_hidden_state))
        run.train()
    assert torch.equal(*taught)
    assert all(a[name] != b[name] for a, b in zip(*map(losses, runs), strict=True) for name in ("loss_1", "loss_0.15"))
    noisy, plain = (run.model for run in runs[::-1])
    noisy.load_state_dict(plain.state_dict())
    assert runs[1].evaluate()["eval_loss"] == runs[0].evaluate()["eval_loss"]


def gradient(folder, hand_made=None, **changes) -> float:
    """Norm of the gradient of token routers, which comes mostly from what the tokens cost."""
    model = elastic_of(VARIANT)
    if hand_made is not None:
        model.activation_checkpointing_enable(hand_made)
    run = trainer(
        folder, model=model, stage="router", router_method="token", router_budgets=[0.6], max_steps=1, teacher=None,
        subnetworks_per_step=2, **changes,
    )  # fmt: skip
    run.train()
    return losses(run)[0]["grad_norm"]


@pytest.fixture
def uncalibrated(monkeypatch):
    """Leave out what routers of tokens take longest for."""
    monkeypatch.setattr(TokenRouters, "finish", lambda *_: None)


@pytest.mark.usefixtures("uncalibrated")
def test_checkpoints_are_never_reentrant(tmp_path):
    expected = gradient(tmp_path)
    for changes in (
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"preserve_rng_state": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"determinism_check": "none"}},
        {"hand_made": {"use_reentrant": True}},
    ):
        assert gradient(tmp_path, **changes) == pytest.approx(expected, rel=1e-4), changes


class TestHalfPrecision:
    """What was loaded in bfloat16 is trained in float32."""

    SAVES = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 2}

    def model(self, dtype=torch.bfloat16):
        model = elastic_of(VARIANT).to(torch.bfloat16).to(dtype)
        model.config.dtype = dtype
        return model

    def test_it_learns_as_float32_does(self, tmp_path):
        half = trainer(tmp_path / "half", model=self.model(), teacher=None, **self.SAVES)
        full = trainer(tmp_path / "full", model=self.model(torch.float32), teacher=None, **self.SAVES)
        half.train(), full.train()
        assert losses(half) == losses(full)
        assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16} == {half.model.config.dtype}
        assert torch.equal(weights(half), weights(full).bfloat16().float())
        saved = load_file(tmp_path / "half" / "checkpoint-2" / "model.safetensors")
        exact = load_file(tmp_path / "full" / "checkpoint-2" / "model.safetensors")
        assert all(torch.equal(saved[name], exact[name]) for name in exact)
        again = trainer(tmp_path / "again", model=self.model(), teacher=None, **self.SAVES)
        again.train(str(tmp_path / "half" / "checkpoint-2"))
        assert torch.equal(weights(again), weights(half))
        half.save_model()
        assert FlextronForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16

    def test_figures_are_those_of_the_rounded_weights(self, tmp_path):
        run = trainer(tmp_path, model=self.model(), max_steps=2, eval_strategy="steps", eval_steps=2)
        run.train()
        assert all(row["loss"] is None for row in run.model.frontier)  # measured before they were rounded

    def test_it_can_be_left_as_it_is_with_a_warning(self, tmp_path, monkeypatch):
        messages = []
        logger = logging.getLogger("flextron_trainer.training.precision")
        monkeypatch.setattr(logger, "warning_once", lambda message: messages.append(message), raising=False)
        run = trainer(tmp_path, model=self.model(), teacher=None, float32_weights=False, max_steps=1)
        before = {p.dtype for p in run.model.parameters()}
        run.train()
        assert {p.dtype for p in run.model.parameters()} == before
        assert any("rounds small steps away" in message for message in messages)

    @pytest.mark.usefixtures("uncalibrated")
    def test_routers_of_tokens(self, tmp_path):
        options = {
            "stage": "router",
            "router_method": "token",
            "router_budgets": [0.6],
            "max_steps": 2,
            "teacher": None,
        }
        run = trainer(tmp_path, model=self.model(), save_strategy="steps", save_steps=1, **options)
        before = weights(run)
        run.train()
        assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}
        saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
        routers = {name for name in saved if ".router." in name}
        assert {name for name in saved if saved[name].dtype == torch.float32} == routers
        assert not torch.equal(weights(run), before)
