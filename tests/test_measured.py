"""What figures were measured on: written once, erased once, never mixed."""

import time

import pytest
from helpers import elastic_of
from training import rows, train, trainer

from flextron_trainer.evaluation.quality import evaluate_frontier, name_of
from flextron_trainer.training.router_stage import add_token_routers
from modeling_flextron import FlextronConfig
from modeling_flextron.configuration_flextron import VERSION
from modeling_flextron.measured import Measured

TODAY = time.strftime("%Y-%m-%d")


@pytest.fixture
def config():
    return elastic_of("mha").config


def losses(config) -> list:
    return [row["loss"] for row in config.frontier]


def test_a_figure_carries_what_it_was_measured_on(config, tmp_path):
    config.record({"1": {"loss": 2.0, "accuracy": 0.5}}, text="wiki", split="test", tokens=100)
    config.record({"1": {"arc/acc": 0.25}}, text="arc", version="9")
    config.save_pretrained(tmp_path)
    row = FlextronConfig.from_pretrained(tmp_path).frontier[0]
    assert row["loss"] == 2.0 and row["metrics"] == {"accuracy": 0.5, "arc/acc": 0.25}
    for name in ("loss", "accuracy"):
        assert row.measured_on(name) == Measured("wiki", "test", 100, TODAY, VERSION)
    assert row.measured_on("arc/acc") == Measured("arc", date=TODAY, version="9")


def test_a_column_is_of_one_text(config):
    config.record({"1": {"loss": 2.0, "accuracy": 0.5}, "0.6": {"loss": 2.2, "accuracy": 0.4}}, text="wiki")
    config.record({"1": {"loss": 1.0}}, text="code")
    assert losses(config) == [1.0, None, None, None]  # that of the other text is not left beside it
    assert [row["metrics"] for row in config.frontier[:2]] == [{"accuracy": 0.5}, {"accuracy": 0.4}]
    assert config.frontier[0].measured_on("loss").text == "code"
    assert config.frontier[0].measured_on("accuracy").text == "wiki"
    config.record({"0.6": {"loss": 1.5}}, text="code")  # the same text in parts
    assert losses(config) == [1.0, 1.5, None, None]
    config.record({"0.6": {"loss": float("nan")}}, text="code")
    assert losses(config) == [1.0, None, None, None] and len(config.frontier[1]["measured"]) == 1


def test_only_what_the_weights_hold_is_written(config):
    narrow = config.narrowed(config.resolve("0.35"))
    for name in ("0.6", "auto:0.5", "0.5"):
        with pytest.raises(ValueError, match=f"`figures`='{name}' cannot be used.*measured are .*0.35, 0.15"):
            narrow.record({name: {"loss": 1.0}}, text="wiki")


def test_rows_of_older_checkpoints_are_of_an_unknown_text(config, tmp_path):
    values = config.to_dict()
    for row in values["frontier"]:
        row["loss"], row["metrics"] = 2.0, {"accuracy": 0.5}
        del row["measured"]
    old = FlextronConfig.from_dict(values)
    assert losses(old) == [2.0] * 4 and old.frontier[0].measured_on("accuracy") == Measured()
    old.record({"1": {"loss": 1.0}}, text="wiki")
    assert losses(old) == [1.0, None, None, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measured": {}}, r"`frontier\[0\]\['measured'\]`="),
        ({"measured": [{"text": "wiki"}]}, r"`frontier\[0\]\['measured'\]`=.*config.record"),
        ({"measured": [{**vars(Measured(text=3)), "figures": []}]}, r"\['measured'\]\['text'\]`=3"),
        ({"measured": [{**vars(Measured(tokens="9")), "figures": []}]}, r"\['measured'\]\['tokens'\]`='9'"),
        ({"measured": [{**vars(Measured()), "figures": "loss"}]}, r"\['measured'\]\['figures'\]`='loss'"),
        ({"metrics": {3: 1.0}}, r"\['metrics'\]`="),
        ({"loss": "2"}, r"\['loss'\]`='2'"),
    ],
)
def test_what_is_no_figure_is_refused(config, changes, message):
    values = config.to_dict()
    values["frontier"][0] |= changes
    with pytest.raises(ValueError, match=message):
        FlextronConfig.from_dict(values)


def test_another_vocabulary_makes_other_losses():
    model = elastic_of("mha")
    model.config.record({"1": {"loss": 2.0}}, text="wiki")
    model.resize_token_embeddings(model.config.vocab_size)
    assert model.frontier[0]["loss"] == 2.0
    model.resize_token_embeddings(model.config.vocab_size + 8)
    assert model.frontier[0]["loss"] is None


def test_evaluation_names_its_text(tmp_path):
    model = elastic_of("mha")
    results = evaluate_frontier(model, rows(4), text="wiki", split="test")
    assert results["1"]["tokens"] > 0
    for row in model.frontier:
        assert row.measured_on("loss") == Measured("wiki", "test", results["1"]["tokens"], TODAY, VERSION)
    (tmp_path / "secret").mkdir()
    assert name_of(str(tmp_path / "secret")) == "secret" and name_of("them/text") == "them/text"


def test_the_trainer_says_which_rows_it_measured(tmp_path):
    run = trainer(tmp_path)
    run.eval_text = "mine"
    run.evaluate()
    assert run.model.frontier[0].measured_on("loss").text == "mine"
    run.evaluate(rows(2))
    assert run.model.frontier[0].measured_on("loss").text is None
    run.evaluate(run.train_dataset)
    assert run.model.frontier[0].measured_on("loss").text == "the training rows"
    before = losses(run.model.config)
    run.evaluate(rows(2), metric_key_prefix="other")
    assert losses(run.model.config) == before


@pytest.mark.parametrize(
    ("stage", "method", "rows_stay"),
    [
        ("elastic", "surrogate", False),
        ("joint", "gumbel", False),
        ("joint", "token", False),
        ("router", "surrogate", True),  # which learns scores alone
        ("router", "gumbel", True),
        ("router", "token", True),
    ],
)
def test_a_stage_that_changes_weights_erases_all_figures_of_them(tmp_path, stage, method, rows_stay):
    model, targets = elastic_of("mha"), [0.35, 0.6]
    add_token_routers(model, targets)
    config = model.config
    names = [row["name"] for row in config.frontier] + [f"auto:{target}" for target in targets]
    config.record({name: {"loss": 2.0, "accuracy": 0.5} for name in names}, text="wiki")
    config.record({name: {"arc/acc": 0.5} for name in names}, text="arc")
    settings = {"stage": stage, "router_method": method, "router_budgets": targets if stage != "elastic" else None}
    run = trainer(tmp_path, model=model, teacher=None, max_steps=1, **settings)
    run.train_dataset = rows(4)
    train(run)
    for row in config.frontier:
        if row["name"] in names:
            assert (row["loss"] is not None) == (len(row["metrics"]) == 2) == (len(row["measured"]) == 2) == rows_stay
    kept = rows_stay and method != "token"  # whose routers are weights of these sizes alone
    for entry in config.token_routing["targets"]:
        assert (entry["loss"] is not None) == (len(entry["metrics"]) == 2) == (len(entry["measured"]) == 2) == kept
