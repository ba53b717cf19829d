"""Scores of lm-eval at every size. Where lm-eval is installed its own results are what ours are compared with."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import elastic_of, flextron
from huggingface_hub import ModelCard

from flextron_trainer.demo import train_tokenizer
from flextron_trainer.evaluation.harness import evaluate_tasks, flat_scores, task_manager
from flextron_trainer.publishing.card import write_model_card
from modeling_flextron.configuration_flextron import VERSION

FOUND = {
    "results": {
        "mc": {"name": "mc", "alias": "mc", "sample_len": 4, "acc,none": 0.5, "acc_stderr,none": 0.25},
        "math": {"exact_match,strict": 1, "exact_match_stderr,strict": "N/A", "exact_match,loose": float("nan")},
        "group": {"acc,none": 0.75},
        "member": {"acc,none": 0.25},
    },
    "group_subtasks": {"group": ["member"]},
}
SCORES = {"mc/acc": 0.5, "mc/acc_stderr": 0.25, "math/strict/exact_match": 1.0, "group/acc": 0.75}


def test_scores_have_flat_names():
    assert flat_scores(FOUND) == SCORES


def test_scores_are_in_the_card(tmp_path):
    elastic = elastic_of("mha")
    for task in ("mc", "math", "group"):
        scores = {name: value for name, value in SCORES.items() if name.startswith(task)}
        elastic.config.record({row["name"]: scores for row in elastic.frontier[:2]}, text=task)
    elastic.save_pretrained(tmp_path)
    write_model_card(elastic, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "| acc on mc | strict/exact_match on math | acc on group |" in card.text
    assert card.text.count("| 0.5000 ± 0.2500 | 1.0000 | 0.7500 |") == 2
    assert card.text.count("| not measured | not measured | not measured |") == 2 and "- acc: mc, " in card.text
    results = {
        (result.dataset_name, result.metric_type, result.metric_name): result.metric_value
        for result in card.data.eval_results
    }
    assert len(results) == 6  # no standard errors
    assert results["math/strict", "exact_match", "exact_match at flextron_budget=0.6"] == 1.0
    assert results["mc", "acc", "acc at flextron_budget=1"] == 0.5


def test_scores_carry_their_task_its_split_and_what_ran_it(monkeypatch):
    """With a stand-in for lm-eval, which is an optional package."""
    runs = []

    def simple_evaluate(harness, tasks, task_manager, limit):
        runs.append(model.subnetwork)
        return FOUND | {"configs": {"mc": {"test_split": None, "validation_split": "val"}, "math": {"test_split": "t"}}}

    stand_in = SimpleNamespace(simple_evaluate=simple_evaluate)
    monkeypatch.setitem(sys.modules, "lm_eval", stand_in)
    monkeypatch.setitem(sys.modules, "lm_eval.models", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", SimpleNamespace(HFLM=lambda **options: options))
    monkeypatch.setattr("importlib.metadata.version", lambda package: "7.0")
    model = elastic_of("mha")
    assert evaluate_tasks(model, None, ["mc", "math", "group"], None, budgets={"x": 0.6}) == {"x": SCORES}
    assert all(row["metrics"] == {} for row in model.frontier)
    evaluate_tasks(model, None, ["mc", "math", "group"], None)
    assert runs[1:] == [model.resolve_budget(row["name"]) for row in model.frontier]
    for row in model.frontier:
        assert row["metrics"] == SCORES
        on = {name: row.measured_on(name) for name in SCORES}
        assert [(each.text, each.split) for each in on.values()] == [
            ("mc", "val"), ("mc", "val"), ("math", "t"), ("group", None)
        ]  # fmt: skip
        assert {each.version for each in on.values()} == {f"{VERSION} with lm-eval 7.0"}


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r'`pip install "lm-eval\[hf\]"`'):
        task_manager(["arc_easy"])


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with an elastic model and its tokenizer, text, and two tasks on this machine."""
    texts = [path.read_text() for path in sorted(Path(__file__).parent.glob("test_*.py"))]
    tokenizer = train_tokenizer(texts, vocab_size=300)
    elastic = elastic_of("mha-tied-biased", budgets=[1, 0.5])
    elastic.resize_token_embeddings(300)
    elastic.save_pretrained(tmp_path / "elastic")
    tokenizer.save_pretrained(tmp_path / "elastic")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(texts[0])
    (tmp_path / "tasks").mkdir()
    kinds = {
        "ours_mc": {
            "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{label}}", "metric_list": [{"metric": "acc"}],
        },
        "ours_ppl": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{context}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    }  # fmt: skip
    lines = [{"context": text[i : i + 60], "choices": ["def", "class"], "label": i % 2} for i, text in enumerate(texts)]
    data = tmp_path / "tasks" / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, kind in kinds.items():
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps(task | {"test_split": "test"} | kind))
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMAND = ("evaluate", "elastic", "--include-path", "tasks", "--device", "cpu", "--lm-eval")


def test_every_row_gets_the_scores_of_lm_eval(work):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    result = flextron(*COMMAND, "ours_mc,ours_ppl", "--write")
    names = {"ours_mc/acc", "ours_mc/acc_stderr", "ours_ppl/bits_per_byte"}
    frontier = json.loads((work / "elastic" / "config.json").read_text())["frontier"]
    assert {row["name"]: row["metrics"] for row in frontier} == result["results"]
    assert all(set(row["metrics"]) == names and row["loss"] is None for row in frontier)
    assert (
        "| acc on ours_mc (test) | bits_per_byte on ours_ppl (test) |" in (work / "elastic" / "README.md").read_text()
    )
    manager = TaskManager(include_path="tasks", include_defaults=False)
    for name, scores in result["results"].items():
        model_args = {"pretrained": "elastic", "dtype": "float32", "trust_remote_code": True, "flextron_budget": name}
        found = lm_eval.simple_evaluate(
            "hf", model_args=model_args, tasks=["ours_mc", "ours_ppl"], task_manager=manager, device="cpu", batch_size=8
        )
        assert scores == pytest.approx(flat_scores(found), rel=1e-5)
    values = [scores["ours_ppl/bits_per_byte"] for scores in result["results"].values()]
    assert abs(values[0] - values[1]) > 1e-3
    both = flextron(*COMMAND[:2], "text", *COMMAND[2:], "ours_mc", "--budget", 0.5, "--sequence-length", 32)
    assert {"loss", "accuracy", "ours_mc/acc"} <= set(both["results"]["0.5"])
    assert both["results"]["0.5"]["ours_mc/acc"] == result["results"]["0.5"]["ours_mc/acc"]


def test_what_cannot_be_scored_is_refused(work):
    for arguments, message in (
        (COMMAND[:2], "nothing to measure"),
        ((*COMMAND, "ours_mc", "--plot", "x.png"), "measured on text"),
        ((*COMMAND, "ours_mc", "--lm-eval-limit", 4, "--write"), "part of a task"),
    ):
        with pytest.raises(ValueError, match=message):
            flextron(*arguments)
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="no task of this name"):
        flextron(*COMMAND, "ours_mc,nothing_like_it")
