"""`benchmarks/bench_real.py` in small: every kind of line, tasks and times, from their weights to the tables."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import parent_of

from flextron_trainer.demo import train_tokenizer
from flextron_trainer.evaluation.quality import evaluate_model

STARTS = ["slices", "repaired slices"]
LINES = ["parent", *STARTS, "elastic", "elastic, uniform", "routed", "singles", "lora, singles", "control"]


def test_every_line_with_tasks_and_times(tmp_path, monkeypatch, capsys):
    """Of lm-eval there is a stand-in whose score is the loss: that of a loaded model must be the one that was noted."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import bench_real
    import study

    text, texts = tmp_path / "text.txt", [f"def f{i}(x):\n    return x + {i}\n" for i in range(400)]
    text.write_text("".join(texts))
    tokenizer = train_tokenizer(texts, 300)
    tokenizer.save_pretrained(tmp_path / "parent")
    parent = parent_of("gqa-wide-heads", vocab_size=300, max_position_embeddings=256, num_hidden_layers=2)
    parent.save_pretrained(tmp_path / "parent")
    block = bench_real.text_blocks(text, tokenizer, bench_real.LENGTH)[0]

    def simple_evaluate(model, tasks, task_manager, limit):
        loss = evaluate_model(model, [{"input_ids": block.tolist()}])["loss"]
        return {"results": {tasks[0]: {"acc,none": loss, "acc_stderr,none": 0.01 * limit}}, "group_subtasks": {}}

    manager = SimpleNamespace(TaskManager=lambda include_path: SimpleNamespace(task_index=["ours"]))
    harness = SimpleNamespace(HFLM=lambda pretrained, **options: pretrained)
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", manager)
    monkeypatch.setitem(sys.modules, "lm_eval.models", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", harness)

    def run():
        given = {
            "train": text, "test": text, "budgets": 0.6, "tokens": 2048, "rates": 1e-3, "test-blocks": 1,
            "calibration-blocks": 2, "work": tmp_path / "work", "results": tmp_path, "tasks": "ours", "task-limit": 3,
            "rounds": 1,
        }  # fmt: skip
        options = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "parent"), *options, "--times", "--lines", *LINES])
        bench_real.main()
        return json.loads((tmp_path / "real-parent.json").read_text())["seeds"]["0"]

    seed = run()
    elastic, control = seed["elastic 2048 0.001"], seed["control 1 2048 0.001"]
    single, lora = seed["singles 0.6 2048 0.001"], seed["lora, singles 0.6 2048 0.001"]
    for each in (single, lora):  # at the cost of the elastic run, but for half a step
        assert control["flops"] < each["flops"] and each["tokens"] % 1024 == 0
        assert elastic["flops"] == pytest.approx(each["flops"], abs=512 * each["flops"] / each["tokens"])
    assert lora["tokens"] > single["tokens"] > 2048  # what is frozen costs less
    assert len({each["0.6"]["text"] for each in (elastic, single, lora, seed["repaired slices"])}) == 4
    frontier = json.loads((tmp_path / "work" / "0" / "slices" / "config.json").read_text())["frontier"]
    size = next(row["non_embedding_parameters"] for row in frontier if row["name"] == "0.6")
    assert 0.9 < seed["routed 2048 0.001"]["0.6"]["parameters"] / size <= 1

    measured = {key.removesuffix(", ours"): scores for key, scores in seed.items() if key.endswith(", ours")}
    without = {"routed 2048 0.001"}  # it keeps no weights
    assert set(measured) == {key for key, value in seed.items() if "0.6" in value or "1" in value} - without - {
        f"{key}, ours" for key in measured
    }
    for key, scores in measured.items():
        names = {"0.6"} if key in STARTS else {"1", "0.6"} & set(seed[key])
        assert scores == {"limit": 3} | {
            name: {"ours/acc": pytest.approx(seed[key][name]["text"], abs=1e-5), "ours/acc_stderr": 0.03}
            for name in names
        }

    for start, reference in (("slices", "native"), ("repaired slices", "loaded")):
        timed = seed[f"{start}, times"]
        assert [(row["budget"], row["what"], row["reference"]) for row in timed] == [
            ("0.6", "prefill", reference), ("0.6", "decode", reference)
        ]  # fmt: skip
        assert all({"control", "loaded", "family", "parent"} <= set(row) for row in timed)
        assert all(("padded" in row) == (reference == "loaded") for row in timed)

    shown = capsys.readouterr().out
    heads = "| routed - elastic, uniform |", "| ours (3) | mean - parent's |", "| repaired slices | 0.6 | decode |"
    assert all(head in shown for head in heads)
    monkeypatch.setattr(study, "FlextronTrainer", None)  # all is there: nothing is made a second time
    monkeypatch.setattr(bench_real, "evaluate_tasks", None)
    assert run() == seed
