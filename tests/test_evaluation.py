"""Loss, perplexity and accuracy; the plot; the card."""

import math
import re

import pytest
import torch
from helpers import all_sizes, elastic_of, parent_of
from huggingface_hub import ModelCard
from training import arguments, rows

from flextron_trainer.data import collator
from flextron_trainer.evaluation import NextToken, evaluate_frontier, evaluate_model
from modeling_flextron import (
    FlextronConfig,
    FlextronForCausalLM,
    FlextronForSequenceClassification,
    FlextronModel,
    LatencyTable,
)
from modeling_flextron.levels import row_bytes
from modeling_flextron.model_card import TASKS, frontier_table, plot_frontier, write_model_card


def test_metric_by_hand():
    metric = NextToken()
    metric.add_batch(predictions=[[1, 2, 3]], references=[[1, 9, -100]], nll=[[0.5, 1.5, 99.0]])
    metric.add_batch(predictions=[[4]], references=[[4]], nll=[[1.0]])
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
    table = LatencyTable.measure(elastic, context=4, rounds=1, checks=1)
    table.save(tmp_path / table.file_name)
    elastic.config.latency_tables = {table.file_name: table.summary}
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
