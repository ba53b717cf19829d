"""The card: every figure with its text, nothing that a name could plant, only claims that can be checked."""

import copy
import math
import re
import time
from dataclasses import replace
from unittest.mock import Mock

import pytest
import yaml
from helpers import elastic_of
from huggingface_hub import ModelCard, parse_eval_result_entries
from markdown_it import MarkdownIt

from flextron_trainer.evaluation.plots import plot_routing
from flextron_trainer.export.dense import dense_card, export_dense
from flextron_trainer.measuring.latency import entry_of, measure_latency, write_table
from flextron_trainer.publishing.card import plot_frontier, write_model_card
from flextron_trainer.publishing.markdown import literal
from flextron_trainer.training.router_stage import add_token_routers
from modeling_flextron.configuration_flextron import VERSION, FlextronConfig

HOSTILE = [
    "x\n\n# Heading\n\n[link](https://evil.example)",
    "x | y | z |\n|---|---|---|\n| a",
    "```\n# Heading\n```python\nimport os",
    "`x` [link](https://evil.example) ![image](https://evil.example/a.png) <img src=x onerror=alert(1)>",
    "www.evil.example https://evil.example <https://evil.example> @someone a@evil.example",
    'x"); import os; os.system("true") #',
    "x\\",
    "x\n---\nlicense: other\n---\n",
    "{title} %s $\\frac$ &lt;b&gt; __b__ ~~s~~",
    "\u202egpj\u2028\x00\x1b[31m\ud800",
    "../../../home/x",
    "名前 é 🦙",
]


def parsed(text: str) -> tuple[list[str], str]:
    """The structure of a text in Markdown, without what is written in it, and the words that are not code."""
    kinds, words = [], []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        kinds += [token.type + token.tag + token.info]
        for child in token.children or ():
            if child.type in ("text", "code_inline"):
                words += [child.content] if child.type == "text" else []
            else:
                kinds.append(child.type + str(child.attrs))
    return kinds, " ".join(words)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with everything that a card speaks of, and its folder."""
    model, folder = elastic_of("mha"), tmp_path_factory.mktemp("model")
    add_token_routers(model, [0.35])
    model.save_pretrained(folder)
    (folder / "latency").mkdir()
    table = measure_latency(model, context=4, rounds=1, checks=1)
    return model, folder, table


def card_with(names: list[str], saved) -> ModelCard:
    """The card of a model whose every name is given."""
    model, folder, table = saved
    name, before = dict(enumerate(names)), model.config
    model.config = config = copy.deepcopy(before)
    # names that a row can have
    config.frontier = [replace(row, name=f"n{name[i]}n") for i, row in enumerate(config.frontier)]
    figures = {"loss": 2.0, name[4]: 0.5, f"{name[5]}/acc": 0.25, f"{name[5]}/acc_stderr": 0.125}
    rows = {row["name"]: figures for row in config.frontier}
    config.record(rows, text=name[5], split=name[6], tokens=5, version=name[7])
    config.record({"auto:0.35": {"loss": 2.0}}, text=name[5])
    config.parent_name = name[8]
    config.parent_license = {"license": name[9], "license_name": name[9], "license_link": name[9]}
    config.training_runs = [{name[10]: name[10], "nested": {name[10]: [name[10]]}, "steps": 3, "tokens": 5}]
    write_table(replace(table, device=name[11]), folder / "latency" / "t.json")
    config.latency_tables = {"latency/t.json": entry_of(table)}
    config.validate()
    config.to_json_file(folder / "config.json")
    write_model_card(model, folder, "me/elastic", [name[4]])
    model.config = before
    return ModelCard.load(folder / "README.md")


@pytest.fixture(scope="module")
def harmless(saved):
    return card_with([f"n{i}" for i in range(len(HOSTILE))], saved)


@pytest.mark.parametrize("shift", range(len(HOSTILE)))
def test_a_name_plants_nothing(saved, harmless, shift):
    names = HOSTILE[shift:] + HOSTILE[:shift]
    card = card_with(names, saved)
    (kinds, words), (expected, _) = parsed(card.text), parsed(harmless.text)
    assert kinds == expected
    assert not re.search(r"evil|someone|alert|\$|\x1b|\u202e", words)
    programs = re.findall(r"```python\n(.*?)\n```", card.text, re.DOTALL)
    for program in programs:
        compile(program, "card", "exec")
    assert len(programs) == 4 and literal(f"n{names[3]}n") in programs[0] and "evil" not in words
    for name in names:
        assert eval(literal(name)) == name
    front = (saved[1] / "README.md").read_text().split("\n---\n", 1)[0].removeprefix("---\n")
    assert set(yaml.safe_load(front)) == set(harmless.data.to_dict())  # and `safe_load` makes no objects


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_plants_nothing_in_the_card_of_an_export(saved, name):
    config, stock = copy.deepcopy(saved[0].config), saved[0].extract("0.6")
    sizes = config.resolve("0.6")

    def card(text: str) -> str:
        config.record({"0.6": {"loss": 2.0}}, text=text, split=text)
        config.parent_name, config.parent_license = text, {"license": text}
        return dense_card(config, text, text, sizes, stock, "The tokenizer is the parent's.")

    (kinds, words), (expected, _) = parsed(card(name)), parsed(card("harmless"))
    assert kinds == expected and not re.search(r"evil|someone|alert|\x1b|\u202e", words)


def test_scores_of_benchmarks_are_published_by_row(tmp_path):
    """A file a row, with the first score of each task whose data are a dataset of the Hub; stale files go."""
    model = elastic_of("mha")
    config, hostile = model.config, HOSTILE[7]
    config.frontier = [replace(row, name=f"n{i}{hostile}n") for i, row in enumerate(config.frontier)]
    names = [row["name"] for row in model.frontier]
    scores = {"arc_easy/acc": 0.123456, "arc_easy/acc_stderr": 0.01, "arc_easy/acc_norm": 0.5}
    config.record(dict.fromkeys(names[:2], scores), text="arc_easy", version="1 with lm-eval 2", dataset="a/arc")
    config.record({names[0]: {"mine/acc": 0.5}}, text="mine", dataset="json")
    config.record({names[0]: {"loss": 2.0}}, text="wiki")
    model.save_pretrained(tmp_path)
    assert FlextronConfig.from_pretrained(tmp_path).frontier[0].measured_on("arc_easy/acc").dataset == "a/arc"
    write_model_card(model, tmp_path)
    files = sorted((tmp_path / ".eval_results").iterdir())
    assert len(files) == 2 and all(re.fullmatch(r"flextron-[01]-n[A-Za-z0-9.-]*\.yaml", path.name) for path in files)
    for path, name in zip(files, names, strict=False):
        entry = {"dataset": {"id": "a/arc", "task_id": "arc_easy"}, "value": 0.1235}
        notes = f"flextron_budget={name}, arc_easy/acc, by Flextron 1 with lm-eval 2"
        found = yaml.safe_load(path.read_text())
        assert found == [entry | {"date": time.strftime("%Y-%m-%d"), "notes": notes}]
        assert parse_eval_result_entries(found)
    (tmp_path / ".eval_results" / "of-others.yaml").touch()
    config.forget_measurements()
    write_model_card(model, tmp_path)
    assert [path.name for path in (tmp_path / ".eval_results").iterdir()] == ["of-others.yaml"]


def test_two_figures_of_one_text_have_two_heads(tmp_path):
    model = elastic_of("mha")
    model.config.record({"1": {"code/loss": 3.0}}, text="code", tokens=5)  # beside another text
    model.config.record({"1": {"loss": 2.0}}, text="code", tokens=9)  # later, alone
    model.config.frontier[1].metrics["code/loss"] = None  # written by something else
    model.save_pretrained(tmp_path)
    write_model_card(model, tmp_path)
    (head,) = (
        line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| budget | param")
    )
    assert head.split(" | ")[5:] == [
        "loss on code", "perplexity on code", "code/loss on code", "code/perplexity on code |"
    ]  # fmt: skip


def test_every_figure_stands_under_its_text(tmp_path):
    model = elastic_of("mha")
    add_token_routers(model, [0.35])
    names = [row["name"] for row in model.frontier]
    losses = dict(zip(names, (2.0, 2.125, 2.25, 2.5), strict=True))
    figures = {name: {"loss": loss, "accuracy": 0.5} for name, loss in losses.items()} | {"auto:0.35": {"loss": 2.2}}
    model.config.record(figures, text="wiki", split="test", tokens=12345)
    model.config.record({"1": {"accuracy": 0.75}}, text="the training rows")
    model.config.record({"0.6": {"code/loss": 3.0}}, text="code")
    old = model.config.frontier[2]
    old.metrics["arc/acc"] = 0.25  # as older versions wrote it
    model.save_pretrained(tmp_path)
    write_model_card(model, tmp_path)
    text = (tmp_path / "README.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    heads, rows = lines[0], lines[1:5]
    assert heads[5:] == [
        "loss on wiki (test)", "perplexity on wiki (test)", "accuracy on the training rows", "loss on code",
        "perplexity on code", "arc/acc on an unknown text |",
    ]  # fmt: skip
    for row, loss in zip(rows, losses.values(), strict=True):
        assert row[5:7] == [f"{loss:.4f}", f"{math.exp(loss):.2f}"]
    assert [row[7:] for row in rows] == [
        ["0.7500", "not measured", "", "not measured |"],
        ["not measured", "3.0000", "20.09", "not measured |"],
        ["not measured", "not measured", "", "0.2500 |"],
        ["not measured", "not measured", "", "not measured |"],
    ]
    today = time.strftime("%Y-%m-%d")
    assert f"- loss: wiki (test), 12,345 tokens, {today}, by Flextron {VERSION}\n" in text
    assert "- arc/acc: an unknown text\n" in text and "held-out" not in text
    assert "`auto:0.35`, where every token chooses its sizes, has loss 2.2000 on wiki (test)." in text
    claims = [
        (claim.dataset_name, claim.dataset_split, claim.metric_type, claim.metric_value)
        for claim in ModelCard.load(tmp_path / "README.md").data.eval_results
    ]
    assert sorted(claims, key=str) == sorted(
        [
            *[("wiki", "test", "perplexity", round(math.exp(loss), 4)) for loss in losses.values()],
            ("the training rows", None, "accuracy", 0.75),
            ("code", None, "perplexity", round(math.exp(3), 4)),
        ],
        key=str,
    )  # and none of an unknown text


def test_rows_of_a_router_are_off_the_line_of_the_others(tmp_path, monkeypatch):
    model = elastic_of("mha")
    routed = replace(model.config.frontier[2], name="routed-0.35")
    model.config.frontier = sorted([*model.config.frontier, routed], key=lambda row: -row.parameters)
    model.config.record({row.name: {"loss": 2.0} for row in model.config.frontier}, text="wiki")
    model.save_pretrained(tmp_path)
    drawn = Mock(return_value=False)
    monkeypatch.setattr("flextron_trainer.publishing.card.plot_frontier", drawn)
    write_model_card(model, tmp_path)
    assert "frontier.png" not in (tmp_path / "README.md").read_text()  # as where matplotlib is not installed
    curves = drawn.call_args.args[0]
    assert {name.partition(",")[2]: len(points) for name, points in curves.items()} == {
        " on wiki": 4, " routed, on wiki": 1
    }  # fmt: skip


def test_the_plot_takes_names_with_a_formula_in_them(tmp_path):
    assert plot_frontier({"$\\frac$ _x": [(1, 2.0), (2, 1.0)]}, tmp_path / "plot.png", "$\\frac$")
    plot_routing(
        ["$\\frac$", "\\$"], {"mlp": [[0.5, 1.0]], "heads": [[0.5, 1.0]]}, tmp_path / "routing.png", "$\\frac$"
    )


def test_the_card_of_an_export_says_what_its_loss_was_measured_on(tmp_path):
    model = elastic_of("mha")
    model.config.record({"0.6": {"loss": 2.5}}, text="www.evil.example")
    model.save_pretrained(tmp_path / "elastic")
    export_dense(tmp_path / "elastic", tmp_path / "dense", "0.6")
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "| loss | 2.5000 nats per token on `www.evil.example`, measured before the export |" in card
    assert "| budget | `0.6` |" in card
