"""What `flextron demo` leaves is what the README says that one can do with it."""

import ast
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from helpers import flextron, parent_of
from planted import plant

from flextron_trainer.demo import train_tokenizer
from modeling_flextron import FlextronForCausalLM

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * 30 for i in range(4)]
BUDGETS = [  # of the table of budgets, as printed
    ast.literal_eval(code)
    for cell in re.findall(r"^\| (`.*?) \| ", README.partition("| `flextron_budget` |")[2], re.MULTILINE)
    for code in re.findall(r"`([^`]*)`", cell)
    if cell.startswith(("`0", '`"', "`{", "`["))
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A parent of the layers and neurons of the demo's own one, which knows its text a little."""
    folder = tmp_path_factory.mktemp("demo")
    tokenizer = train_tokenizer(TEXTS, vocab_size=280)
    shape = {"vocab_size": 280, "hidden_size": 32, "intermediate_size": 384, "pad_token_id": tokenizer.pad_token_id}
    parent, ids = parent_of("gqa-wide-heads", **shape), torch.tensor(tokenizer("".join(TEXTS)).input_ids)
    batch, optimizer = ids[: 8 * 64].view(8, 64), torch.optim.AdamW(parent.parameters(), lr=1e-2)
    for _ in range(40):
        parent(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    parent.save_pretrained(folder / "planted")
    tokenizer.save_pretrained(folder / "planted")
    plant(folder / "planted", folder / "marker")
    (folder / "few").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / "few" / f"{i}.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("builtins.input", lambda *_: pytest.fail("A question is asked on the terminal."))
        patch.setattr("flextron_trainer.demo.LATENCY_ROUNDS", 1)
        yield folder


@pytest.fixture(scope="module")
def result(work):
    """All parts of the demo but the training of a parent. Nothing runs of what the files of its parent name."""
    steps = ("--elastic-steps", 2, "--router-steps", 2)
    result = flextron("demo", "--output", "demo", "--dataset", "few", "--parent", "planted", *steps, "--device", "cpu")
    assert not Path("marker").exists()
    assert yaml.safe_load(Path("demo/run.yaml").read_text())["elastic_steps"] == 2
    assert not [path for path in Path("demo").rglob("*.json") if "--planted" in path.read_text()]
    return result


@pytest.mark.slow
def test_what_the_demo_leaves(result):
    assert Path(result["plot"]).stat().st_size > 1000
    assert {"config.json", "model.level0.safetensors", "README.md", "tokenizer.json", "latency"} <= {
        path.name for path in Path(result["repo"]).iterdir()
    }
    assert [row["budget"] for row in result["rows"]] == ["1", "0.75", "0.5", "small"]
    for row in result["rows"]:
        assert row["tokens_per_second"] > 0 and row["bytes"] == 4 * row["parameters"]
        assert all(row[key] > 0 for key in ("parent_loss", "sliced_loss", "repaired_loss", "trained_loss"))
    assert result["rows"][0]["sliced_loss"] == pytest.approx(result["rows"][0]["parent_loss"], rel=1e-4)
    sizes = [row["parameters"] for row in result["rows"]]
    assert sizes == sorted(sizes, reverse=True)
    assert "tokens/s" in (Path(result["repo"]) / "README.md").read_text()


def test_the_table_is_read():
    assert len(BUDGETS) == 13 and 0.5 in BUDGETS and [0.25, 1, "small"] in BUDGETS


@pytest.mark.slow
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_every_row_of_the_table_of_budgets_runs(result, budget):
    ids = torch.arange(1, 25).view(3, 8)
    if budget == "25ms":  # which a busy machine may not have reached when it was measured, in one round
        whole = FlextronForCausalLM.from_pretrained(result["repo"])
        budget = f"{max(25, 2e3 * whole.latency_table.predict(whole.built)):.0f}ms"
    if isinstance(budget, dict) and "thinking" in budget:
        budget |= {"end": 3}  # the demo's tokenizer has no end of thinking
    elif not isinstance(budget, list):
        model = FlextronForCausalLM.from_pretrained(result["repo"], flextron_budget=budget)
        assert model(ids).logits.isfinite().all()
    if isinstance(budget, str) and budget.startswith("fit"):
        return  # of what is not in memory yet
    whole = FlextronForCausalLM.from_pretrained(result["repo"])
    assert whole.generate(ids, max_new_tokens=2, min_new_tokens=2, flextron_budget=budget).shape == (3, 10)


def test_the_demo_trains_a_parent_where_none_is_given(work, monkeypatch):
    """Up to the conversion of it, behind which the demo is the same; of a single document it holds out the end."""
    Path("one.txt").write_text("".join(TEXTS) * 4)
    converted = Mock(side_effect=InterruptedError)
    monkeypatch.setattr("flextron_trainer.demo.convert", converted)
    with pytest.raises(InterruptedError):
        flextron("demo", "--output", "untaught", "--dataset", "one.txt", "--parent-steps", 2, "--device", "cpu")
    teacher, calibration = converted.call_args.args
    assert type(teacher).__name__ == "LlamaForCausalLM" and not teacher.training
    assert not torch.equal(teacher.model.norm.weight, torch.ones(128))  # which it begins with
    assert len(calibration) and len(calibration[0]["input_ids"]) == 128
    assert max(max(row["input_ids"]) for row in calibration) < teacher.config.vocab_size
