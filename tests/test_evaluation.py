"""Loss, perplexity and accuracy; the plot; the card."""

import math
import re

import pytest
import torch
from helpers import all_sizes, elastic_of, parent_of
from huggingface_hub import ModelCard
from test_losses import peak_bytes
from training import arguments, rows, trainer, with_adapter

from flextron_trainer.conversion.rows import mean_loss
from flextron_trainer.data import collator
from flextron_trainer.evaluation.quality import NextToken, evaluate_frontier, evaluate_model
from flextron_trainer.measuring.latency import entry_of, file_of, measure_latency, write_table
from flextron_trainer.publishing.card import TASKS, frontier_table, plot_frontier, write_model_card
from flextron_trainer.publishing.levels import row_bytes
from modeling_flextron import (
    FlextronConfig,
    FlextronForCausalLM,
    FlextronForSequenceClassification,
    FlextronModel,
)


def test_metric_by_hand():
    metric = NextToken()
    metric.add_batch(nats=[2.0, 0.0], right=[1, 0], tokens=[2, 0])
    metric.add_batch(nats=[1.0], right=[1], tokens=[1])
    result = metric.compute()
    assert result["tokens"] == 3 and result["loss"] == pytest.approx(1.0)
    assert result["perplexity"] == pytest.approx(math.e) and result["accuracy"] == pytest.approx(2 / 3)


def test_loss_is_the_models_own():
    parent = parent_of("mha")
    data = rows(6)
    batch = collator()(data)
    expected = parent(**batch).loss.item()
    for batch_size in (1, 4, 6):
        found = evaluate_model(parent, data, batch_size)
        assert found["loss"] == pytest.approx(expected, rel=1e-4)
        assert found["tokens"] == (batch["labels"][:, 1:] != -100).sum().item()


def masked(count: int = 7) -> list[dict]:
    """Rows of unequal length with masked prompts, so that few of their tokens count, and not equally many."""
    data = [{"input_ids": row["input_ids"][: 16 - 2 * i]} for i, row in enumerate(rows(count))]
    return [
        row | {"labels": [-100] * (2 + i % 3) + row["input_ids"][2 + i % 3 :].tolist()} for i, row in enumerate(data)
    ]


def by_hand(model, data, budget) -> tuple[float, float, int]:
    """Loss, accuracy and tokens of all rows together, from the logits of each row alone."""
    nats, right, tokens = 0.0, 0, 0
    for row in data:
        ids, labels = row["input_ids"][None], torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(ids, flextron_budget=budget).logits[0, :-1]
        counts = labels != -100
        nats += torch.nn.functional.cross_entropy(logits[counts], labels[counts], reduction="sum").item()
        right, tokens = right + (logits.argmax(-1) == labels)[counts].sum().item(), tokens + counts.sum().item()
    return nats / tokens, right / tokens, tokens


def test_a_loss_does_not_depend_on_the_batches(tmp_path):
    """In the trainer, in `evaluate_frontier` and in `evaluate_model`: every token counts alike."""
    data, model = masked(), elastic_of("gqa-wide-heads")
    expected = {row["name"]: by_hand(model, data, row["name"]) for row in model.frontier}
    for size in (1, 3, 8):
        run = trainer(tmp_path, model=model, teacher=None, per_device_eval_batch_size=size)
        run.eval_dataset = data
        metrics, found = run.evaluate(), evaluate_frontier(model, data, size)
        for name, (loss, accuracy, tokens) in expected.items():
            alone = evaluate_model(model, data, size, name)
            for result in (found[name], alone):
                assert result["loss"] == pytest.approx(loss, rel=1e-5) and result["tokens"] == tokens
                assert result["accuracy"] == pytest.approx(accuracy)
            assert metrics[f"eval_loss_{name}"] == pytest.approx(loss, rel=1e-5)
            assert metrics[f"eval_accuracy_{name}"] == pytest.approx(accuracy) and metrics["eval_tokens"] == tokens


def test_rows_of_the_frontier_are_chosen_by_the_same_loss():
    data, model = masked(), elastic_of("gqa-wide-heads")
    batches = [row["input_ids"][None] for row in data]
    whole = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in data]
    assert mean_loss(model, model.built, batches) == pytest.approx(evaluate_model(model, whole, 8, model.built)["loss"])


def test_evaluation_never_makes_all_logits(tmp_path):
    """And the memory plan says what it takes."""
    parent = parent_of("gqa-wide-heads", vocab_size=4096)
    data = [{"input_ids": torch.randint(1, 4096, (64,))} for _ in range(16)]
    run = trainer(tmp_path, model=elastic_of("gqa-wide-heads", parent), teacher=None, loss_chunk_size=64)
    run.eval_dataset = run.train_dataset = data
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run.evaluate()
    peak, logits = peak_bytes(profile), 4 * 4096 * 8 * 64
    assert 0.25 * logits < peak < 0.6 * logits
    assert run.plan().evaluation == pytest.approx(peak, rel=0.25)
    run.compute_metrics = len
    assert run.plan().evaluation > 2 * logits and run.plan().total > run.plan().parameters + 2 * logits


def test_an_adapted_output_layer_is_measured():
    model = with_adapter(elastic_of("gqa-wide-heads"), ["lm_head"], init_lora_weights=False)
    expected = by_hand(model, masked(), "0.35")
    assert evaluate_model(model, masked(), 3, "0.35")["loss"] == pytest.approx(expected[0], rel=1e-5)


def test_every_row_is_measured_and_written():
    elastic = elastic_of("gqa-wide-heads")
    data = rows(4)
    results = evaluate_frontier(elastic, data)
    for row in elastic.frontier:
        alone = evaluate_model(elastic.extract(row["name"]), data)
        assert results[row["name"]]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert row["loss"] == results[row["name"]]["loss"]
        assert row["metrics"]["accuracy"] == alone["accuracy"]
    elastic.config.validate()


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows to evaluate"):
        evaluate_model(parent_of("mha"), [])
    with pytest.raises(ValueError, match=r"`budget`=0.5 .*A stock model has one size"):
        evaluate_model(parent_of("mha"), rows(2), budget=0.5)


def test_plot(tmp_path):
    from PIL import Image

    curves = {"sliced": [(10, 5.0), (20, 4.0)], "trained": [(10, 3.0), (20, 2.5)], "parent": [(20, 2.4)]}
    plot_frontier(curves, tmp_path / "frontier.png")
    image = Image.open(tmp_path / "frontier.png")
    assert image.width > 600 and len(set(image.convert("RGB").getdata())) > 50


def test_card(tmp_path):
    elastic = elastic_of("mha")
    evaluate_frontier(elastic, rows(2), text="wiki")
    elastic.config.training_runs = [arguments(tmp_path, sampler="uniform").changed()]
    elastic.config.parent_name, elastic.config.parent_license = "them/parent", {"license": "apache-2.0"}
    elastic.save_pretrained(tmp_path)
    write_model_card(elastic, tmp_path, "me/elastic", ["mine"])
    card = ModelCard.load(tmp_path / "README.md")
    downloads = row_bytes(tmp_path, FlextronConfig.from_pretrained(tmp_path))
    assert frontier_table(elastic, downloads) in card.text
    for row in elastic.frontier:
        assert f"`{row['name']}` | {row['parameters']:,}" in card.text and f"{row['loss']:.4f}" in card.text
    assert "- `sampler`: `uniform`" in card.text and "output_dir" not in card.text and "2406.10260" in card.text
    assert card.data.base_model == "them/parent" and card.data.license == "apache-2.0" and "mine" in card.data.tags
    found = [(result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert [value for metric, value in found if metric == "perplexity"] == [
        pytest.approx(math.exp(row["loss"]), abs=1e-4) for row in elastic.frontier
    ]
    assert [value for metric, value in found if metric == "accuracy"] == [
        pytest.approx(row["metrics"]["accuracy"], abs=1e-4) for row in elastic.frontier
    ]
    assert (tmp_path / "frontier.png").stat().st_size > 5000


def test_card_of_what_was_not_measured(tmp_path):
    elastic = elastic_of("mha")
    elastic.save_pretrained(tmp_path)
    write_model_card(elastic, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None and "not measured" in card.text and "Not trained" in card.text
    assert not (tmp_path / "frontier.png").exists()


@pytest.mark.parametrize("head", [FlextronForCausalLM, FlextronForSequenceClassification, FlextronModel])
def test_snippets_run_for_every_head_without_a_tokenizer(tmp_path, monkeypatch, head):
    model = head(elastic_of("mha").config)
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")
    write_model_card(model, tmp_path / "saved")
    card, space = ModelCard.load(tmp_path / "saved" / "README.md"), {}
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        exec(code, space)
    assert type(space["model"]) is head and card.data.pipeline_tag == TASKS[head._auto_class]
    assert (tmp_path / "saved-0.15").is_dir() == (head is FlextronForCausalLM)


def test_speed_in_the_card(tmp_path):
    elastic = elastic_of("mha")
    elastic.save_pretrained(tmp_path)
    table = measure_latency(elastic, context=4, rounds=1, checks=1)
    write_table(table, tmp_path / file_of(table))
    elastic.config.latency_tables = {file_of(table): entry_of(table)}
    write_model_card(elastic, tmp_path)
    speed = 1 / table.predict(elastic.resolve_budget("1"))
    assert f"tokens/s, {table.device}, float32" in (text := (tmp_path / "README.md").read_text())
    assert f" {speed:,.1f} |" in text


def test_non_default_arguments(tmp_path):
    assert arguments(tmp_path, learning_rate=1e-4, lr_scheduler_type="cosine").changed().keys() <= {
        "max_steps", "per_device_train_batch_size", "logging_steps", "save_strategy", "dataloader_pin_memory",
    }  # fmt: skip


def test_heterogeneous_rows_are_shown_as_ranges(tmp_path):
    elastic = elastic_of("mha")
    mixed = next(sub for sub in all_sizes(elastic, 20) if len(set(sub.mlp)) > 1)
    elastic.config.frontier.append(elastic.config.row("mixed", mixed))
    elastic.save_pretrained(tmp_path)
    write_model_card(elastic, tmp_path)
    assert f"| {min(mixed.mlp)}-{max(mixed.mlp)} |" in (tmp_path / "README.md").read_text()
    assert torch.is_tensor(elastic(torch.ones(1, 2, dtype=torch.long), flextron_budget="mixed").logits)
