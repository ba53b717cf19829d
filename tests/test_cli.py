"""Every verb of the `flextron` command, on tiny models and this checkout's own text."""

import io
import json
import math
import os
import re
import shlex
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from helpers import flextron, parent_of, run_python
from transformers import AutoTokenizer
from typer.testing import CliRunner

from flextron_trainer.cli import app
from flextron_trainer.cli.options import as_datasets, json_output, print_result
from flextron_trainer.data import load_text
from flextron_trainer.demo import train_tokenizer
from flextron_trainer.files import write_json
from modeling_flextron import count_parameters

ROOT = Path(__file__).parent.parent
VERBS = (
    "convert", "train", "teach", "answers", "measure", "bench", "evaluate", "export", "verify", "push", "generate",
    "sizes", "transplant", "demo", "ui",
)  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a parent, its tokenizer and a text."""
    folder = tmp_path_factory.mktemp("cli")
    texts = [path.read_text()[:3_000] for path in sorted((ROOT / "modeling_flextron").glob("*.py"))[:12]]
    tokenizer = train_tokenizer(texts, vocab_size=300)
    parent = parent_of("gqa-wide-heads", vocab_size=300, pad_token_id=tokenizer.pad_token_id)
    parent.save_pretrained(folder / "parent")
    tokenizer.save_pretrained(folder / "parent")
    (folder / "text").mkdir()
    for i, text in enumerate(texts):
        (folder / "text" / f"{i}.txt").write_text(text)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def elastic(work):
    result = flextron(
        "convert", "parent", "elastic", "--calibration", "text", "--mlp", "1,0.5,0.25", "--heads", "1,0.5",
        "--budgets", "1,0.6,0.45", "--max-samples", 16, "--sequence-length", 32, "--device", "cpu", "--keep-moments",
        "--offload",
    )  # fmt: skip
    assert [row["name"] for row in result["frontier"]] == ["1", "0.6", "0.45"]
    assert not list(work.glob(".weights-*")) and list((work / "elastic" / "moments").iterdir())
    kept = json.loads((work / "elastic" / "config.json").read_text())["conversion"]
    assert kept["planned"] == result["planned"] and kept["measured"] == result["measured"]
    assert f"in the order `{kept['order']}`" in (work / "elastic" / "README.md").read_text()
    planned, measured = result["planned"], result["measured"]
    tokens = planned["forward_tokens"]
    assert tokens["importance"] == 16 * 32 and tokens["search"] == tokens["corrections"] == 0
    assert tokens["orders"] == 16 * 32 + 4 * 3 * 2 * 32  # the moments, and slices of four orders on an eighth
    assert planned["peak_gib"] >= 0 and planned["seconds"] >= 0 and measured["seconds"] > 0
    names = {path.name for path in (work / "elastic").iterdir()}
    assert {"config.json", "importance.safetensors", "README.md", "tokenizer.json", "modeling_flextron.py"} <= names
    return work / "elastic"


def test_datasets_are_typed_as_they_are_read():
    assert as_datasets(["a"]) == ["a"] and as_datasets(["a", "b", "c"]) == ["a", "--dataset", "b", "--dataset", "c"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb):
    done = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 0 and f"Example: flextron {verb}" in done.stdout.replace("`", "")


def test_all_verbs_are_listed():
    for flag in ("--help", "-h"):
        out = CliRunner().invoke(app, [flag], env={"COLUMNS": "200"}).stdout
        assert all(verb in out for verb in VERBS) and "Example: flextron convert" in out


def test_rows_that_need_not_nest(work, monkeypatch):
    from flextron_trainer.conversion import convert

    choose, asked = convert.choose_rows, []
    monkeypatch.setattr(convert, "choose_rows", lambda *given: asked.append(given[3:4]) or choose(*given))
    for flags in ((), ("--no-nested",)):
        flextron("convert", "parent", "rows", "--calibration", "weights", "--mlp", "1,0.5", *flags, "--device", "cpu")
    assert [nested for nested in asked if nested] == [(True,), (False,)]


def test_scores_of_another_conversion(work, elastic, monkeypatch):
    read = Mock(side_effect=InterruptedError)
    monkeypatch.setattr("flextron_trainer.conversion.convert.read_or_measure", read)
    arguments = ("convert", "parent", "again", "--calibration", "weights", "--device", "cpu", "--importance")
    with pytest.raises(InterruptedError):
        flextron(*arguments, "elastic/importance.safetensors")
    assert read.call_args.args[0] == Path("elastic/importance.safetensors")
    with pytest.raises(ValueError, match=r"`importance`='elsatic/importance.safetensors' .*Its folder does not exist"):
        flextron(*arguments, "elsatic/importance.safetensors")


def test_help_and_version_import_no_library():
    """Nor is PEFT, which finds the target modules of a LLaMA also where it is imported after us."""
    code = f"""
import importlib.metadata, sys
from typer.testing import CliRunner
import flextron_trainer
from flextron_trainer.cli import app
for arguments in (["--version"], ["-h"], *([verb, "-h"] for verb in {VERBS})):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert arguments != ["--version"] or done.output == importlib.metadata.version("flextron") + chr(10)
heavy = {{"torch", "transformers", "peft", "datasets", "matplotlib", "modeling_flextron"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert {{"FlextronTrainer", "FlextronTrainingArguments", "convert"}} <= set(dir(flextron_trainer))
from flextron_trainer import convert
import modeling_flextron, flextron_trainer.evaluation.harness, flextron_trainer.export.dense, flextron_trainer.presets
assert callable(convert) and "peft" not in sys.modules
import peft
shape = {{"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}}
model = modeling_flextron.FlextronForCausalLM(modeling_flextron.FlextronConfig(**shape))
adapted = peft.get_peft_model(model, peft.LoraConfig(r=2))
assert set(adapted.peft_config["default"].target_modules) == {{"q_proj", "v_proj"}}, adapted.peft_config
"""
    run_python(code, env={})  # an interpreter in which nothing is imported yet


def test_people_get_a_table_and_the_next_command(elastic):
    """And programs one line, wherever `--json` stands; underscores are as good as hyphens in every name."""
    common = ("text", "--sequence_length", "32", "--max_samples", "2", "--batch-size", "2", "--device", "cpu")
    done = CliRunner().invoke(app, ["evaluate", "elastic", *common], env={"COLUMNS": "120"}, catch_exceptions=False)
    lines = [[word.strip() for word in line.split("│")] for line in done.stdout.splitlines()]
    rows = {cells[1]: cells for cells in lines if len(cells) > 4}
    assert {"1", "0.6", "0.45"} <= set(rows) and done.stdout.splitlines()[-1].startswith("next: flextron ")
    done = CliRunner().invoke(app, ["evaluate", "--json", "elastic", *common], catch_exceptions=False)
    (line,) = done.stdout.splitlines()
    assert f"{json.loads(line)['results']['0.6']['loss']:,.4g}" in rows["0.6"]


def test_a_run_is_repeated_from_its_configuration(elastic):
    """The command line wins over the file, and a name that nobody knows is refused with those that it may be."""
    shared = {"model": "elastic", "dataset": "text", "report-to": "none", "save_strategy": "no", "bf16": True}
    Path("mine.yaml").write_text(yaml.safe_dump(shared) + "max_steps: 5\nsequence_length: 32\nlearning_rate: 1e-3\n")
    batch = ("--per-device-train-batch-size", 2)
    first = flextron("train", "--config", "mine.yaml", "--max-steps", 1, "--output-dir", "once", *batch)
    kept = yaml.safe_load(Path("once/run.yaml").read_text())
    assert (kept["max_steps"], kept["seed"], kept["learning_rate"]) == (1, 42, 1e-3) and "hub_token" not in kept
    assert kept["bf16"]  # on this CPU, too
    again = flextron("train", "--config", "once/run.yaml", "--output_dir", "twice")
    assert again["eval_loss_0.6"] == first["eval_loss_0.6"]
    for verb, name, near in (("train", "max_stepz", "max_steps"), ("evaluate", "max-sampels", "max_samples")):
        Path("bad.yaml").write_text(f"{name}: 1\n")
        with pytest.raises(ValueError, match=rf"There is no such option\. Did you mean {near}"):
            flextron(verb, "elastic", "text", "--config", "bad.yaml")
    for content in ("- 1", "a: [", "\0"):
        Path("bad.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"`config`='bad\.yaml' cannot be used"):
            flextron("evaluate", "elastic", "text", "--config", "bad.yaml")


CPU = ("--device", "cpu")
SHORT = ("--sequence-length", 32, *CPU)
WRITING = {  # the options that are kept, and the call that they are of
    "convert": ("again/run.yaml", "parent", "again", "--calibration", "text", "--preset", "small.json", *SHORT),
    "transplant": ("carried/run.yaml", "elastic", "parent", "carried", "--base", "parent"),
    "teach": ("cache/run.yaml", "parent", "text", "cache", "--dataset", "one.txt", "--draws", 4, "--max-samples", 4,
              *SHORT),
    "answers": ("said/.a.jsonl.run.yaml", "parent", "asked.jsonl", "said/a.jsonl", "--max-new-tokens", 2, "--sample",
                *CPU),
    "export": ("small/run.yaml", "elastic", "small", "--budget", '{"mlp": 48}', "--dense"),
    "evaluate": (".line.png.run.yaml", "elastic", "text", "--max-samples", 2, "--plot", "line.png", "--budget", "0.6",
                 "--budget", "1", *SHORT),
    "evaluate --write": ("elastic/.evaluate.run.yaml", "elastic", "text", "--max-samples", 2, *SHORT),
    "measure": ("elastic/latency/.*.run.yaml", "elastic", "--rounds", 1, "--context", 8, *CPU),
}  # fmt: skip


@pytest.fixture(scope="module")
def read(elastic):
    """What calls of `WRITING` read beside the models."""
    tokenizer = AutoTokenizer.from_pretrained("parent")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained("parent")
    Path("asked.jsonl").write_text('{"prompt": "def main"}\n')
    Path("one.txt").write_text("x = 1\n" * 60)
    preset = json.loads((ROOT / "hub_configs" / "llama-3.2-1b.json").read_text())
    preset["config"] |= json.loads(Path("parent/config.json").read_text())
    preset["convert"] = {"mlp": [1, 0.5], "heads": [1], "budgets": [1, 0.8], "max_samples": 4, "order": "norms"}
    Path("small.json").write_text(json.dumps(preset))


@pytest.mark.parametrize("case", WRITING)
def test_a_call_is_repeated_from_what_it_keeps_beside_its_output(read, case):
    """Every option is kept, also those of a preset, which may be gone."""
    verb, *flags = case.split()
    pattern, *arguments = WRITING[case]
    first = flextron(verb, *arguments, *flags)
    (kept,) = Path().glob(pattern)
    Path("kept.yaml").write_text(text := kept.read_text())
    assert text.startswith(f"# flextron {verb} --config {kept.name}\n")
    shutil.rmtree(kept.parent) if kept.name == "run.yaml" else kept.unlink()
    Path("said/a.jsonl").unlink(missing_ok=True)
    again = flextron(verb, "--config", "kept.yaml")
    assert kept.read_text() == text
    timed = ("measured", "planned", "decode_ms", "error")
    assert {key: first[key] for key in first if key not in timed} == {
        key: again[key] for key in again if key not in timed
    }
    assert verb != "answers" or len(load_text("said")) == 1  # nothing beside them is taken for data
    options = yaml.safe_load(text)
    assert verb != "convert" or (options["max_samples"], options["mlp"], options["seed"]) == (4, [1, 0.5], 0)


def test_every_verb_that_writes_keeps_its_options():
    """`train` does before it begins; the others say what they wrote."""
    verbs = (command.callback.__wrapped__ for command in app.registered_commands)
    writing = {verb.__name__ for verb in verbs if verb.__annotations__["return"] is not None}
    assert writing == {case.split()[0] for case in WRITING} | {"bench", "demo"}  # in test_bench.py and test_demo.py


def test_no_file_of_others_is_replaced_by_the_options_of_a_call(read):
    """Nor is any written where a call fails."""
    Path("theirs").mkdir()
    Path("theirs/run.yaml").write_text(theirs := "# flextron and I\na: 1\n")
    call = ("export", "elastic", "theirs", "--budget", "0.6")
    done = CliRunner().invoke(app, call, catch_exceptions=False)
    assert "theirs/run.yaml stays as it is" in done.stderr and Path("theirs/run.yaml").read_text() == theirs
    with pytest.raises(ValueError, match="budget"):
        flextron("export", "elastic", "failed", "--budget", "0.01")
    assert not Path("failed").exists()


def test_wide_tables_fit_a_narrow_terminal(monkeypatch):
    """Every word of a head and every number is there in one piece, and each part begins with the names of the rows."""
    texts = ("", "you/ultrachat_200k, answers only/", "a-file-with-quite-a-long-name-of-its-own.jsonl/")
    figures = {f"{text}{name}": 2.5 for text in texts for name in ("loss", "perplexity", "accuracy", "tokens")}
    figures |= {"arc_easy/acc_norm": 0.4321, "arc_easy/acc_norm_stderr": 0.0123}
    rows = {str(i): {name: value + i for name, value in figures.items()} for i in range(3)}
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    with redirect_stdout(stream):
        print_result("then", results=rows, model="a" * 100)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in stream.getvalue()
    bodies = [line for line in lines if line.startswith("│ 0 ")]
    assert "results: you/ultrachat_200k, answers only" in stream.getvalue()
    assert len(bodies) > 2 and sum(line.count(" 2.5 ") for line in bodies) == 12
    assert "0.4321 ± 0.0123" in stream.getvalue() and stream.getvalue().count("perplexity") == 3
    monkeypatch.setenv("COLUMNS", "400")
    with redirect_stdout(stream):
        print_result(results=rows)
    assert sum(line.startswith("│ 0 ") for line in stream.getvalue().splitlines()) == len(bodies) + 1


def test_json_is_strict(tmp_path):
    """No reader but Python's takes NaN for JSON."""
    value = {"a": [float("nan"), 1.5, -math.inf], "b": {"c": math.inf, "d": "NaN"}}
    write_json(tmp_path / "a.json", value)
    line = io.StringIO()
    before = json_output.set(line)
    print_result(**value)
    json_output.reset(before)
    for text in (line.getvalue(), (tmp_path / "a.json").read_text()):
        assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, 1.5, None], "b": {"c": None, "d": "NaN"}}


def test_evaluate_writes_and_plots(elastic):
    (elastic / "errors.py").write_text("# of an older version")
    result = flextron(
        "evaluate", "elastic", "text", "--write", "--plot", "frontier.png", "--sequence-length", 32,
        "--max-samples", 8, "--device", "cpu",
    )  # fmt: skip
    config = json.loads((elastic / "config.json").read_text())
    assert [row["loss"] for row in config["frontier"]] == [entry["loss"] for entry in result["results"].values()]
    assert Path("frontier.png").stat().st_size > 1000
    assert "older" not in (elastic / "errors.py").read_text()  # a config lies beside the code that reads it
    card = (elastic / "README.md").read_text()
    assert all(f"{row['loss']:.4f}" in card for row in config["frontier"]) and "(frontier.png)" in card
    assert "- loss, accuracy: text, 248 tokens, " in card  # 8 rows of 32, whose first tokens nothing foretells
    one = flextron(
        "evaluate", "elastic", "text", "--budget", "0.45", "--budget", '{"mlp": 24}', "--sequence-length", 32,
        "--max-samples", 8, "--device", "cpu",
    )  # fmt: skip
    assert one["results"]["0.45"] == pytest.approx(result["results"]["0.45"])
    assert set(one["results"]) == {"0.45", '{"mlp": 24}'}


@pytest.mark.slow
def test_train(elastic):
    result = flextron(
        "train", "elastic", "text", "--teacher", "parent", "--sequence-length", 32, "--output_dir", "run",
        "--max_steps", 3, "--sampler", "uniform", "--use_cpu", "--report_to", "none", "--save_strategy", "no",
    )  # fmt: skip
    assert {"eval_loss", "eval_loss_0.45", "output"} <= set(result)
    assert "- `sampler`: `uniform`" in Path("run/README.md").read_text()
    written = flextron("generate", "run", "def main(", "--budget", "0.45", "--max-new-tokens", 3, "--device", "cpu")
    assert written["text"].startswith("def main(")


@pytest.mark.slow
def test_train_on_a_stream(elastic):
    common = ("train", "elastic", "text", "--streaming", "--output_dir", "streamed", "--use_cpu", "--report_to", "none")
    common += ("--save_strategy", "no", "--sampler", "uniform", "--sequence-length", 32, "--document-boundaries")
    result = flextron(*common, "--max_steps", 2, "--per_device_train_batch_size", 2)
    assert {"eval_loss", "eval_loss_0.45"} <= set(result)
    assert json.loads(Path("streamed/config.json").read_text())["training_runs"][0]["tokens"] == 2 * 2 * 32
    Path("short.txt").write_text(Path("text/0.txt").read_text()[:2000])
    for arguments, message in (
        (common, "`max_steps`=-1 cannot be used"),
        ((*common, "--max_steps", 2, "--num-proc", 2), "tokenized as it is read"),
        ((*common[:2], "short.txt", *common[3:], "--max_steps", 2), "none is left to train on"),
    ):
        with pytest.raises(ValueError, match=message):
            flextron(*arguments)


@pytest.mark.slow
def test_routers(elastic):
    """A static router, then token routers beside it, and the picture of what tokens chose."""
    common = ("--sequence-length", 32, "--use_cpu", "--report_to", "none", "--save_strategy", "no", "--stage", "router")
    static = ("train", "elastic", "text", "--output_dir", "routed", "--max_steps", 3, "--router_budgets", 0.6, 0.5)
    with pytest.raises(ValueError, match="no router is written"):
        flextron(*static, *common)
    assert not Path("routed/config.json").exists()
    first = flextron(*static, *common, "--router_method", "gumbel")
    assert {"eval_loss_routed-0.6", "eval_loss_routed-0.5", "eval_loss_0.45"} <= set(first)
    second = flextron(
        "train", "routed", "text", "--output_dir", "tokens", "--max_steps", 2, "--router_method", "token",
        "--router_budgets", 0.6, 0.5, *common,
    )  # fmt: skip
    assert {"eval_loss_auto-0.6", "eval_loss_auto-0.5", "eval_loss_routed-0.5"} <= set(second)
    result = flextron(
        "evaluate", "tokens", "text", "--budget", "auto:0.5", "--routing-report", "tokens.png",
        "--sequence-length", 32, "--max-samples", 4, "--device", "cpu",
    )  # fmt: skip
    assert result["results"]["auto:0.5"]["loss"] > 0 and Path("tokens.png").stat().st_size > 10_000
    whole = flextron(
        "evaluate", "tokens", "text", "--write", "--sequence-length", 32, "--max-samples", 4, "--device", "cpu"
    )
    assert {"auto:0.6", "routed-0.6"} <= set(whole["results"])
    config = json.loads(Path("tokens/config.json").read_text())
    assert all(entry["loss"] > 0 for entry in config["token_routing"]["targets"])
    with pytest.raises(ValueError, match="no token routers"):
        flextron("evaluate", "routed", "text", "--routing-report", "no.png", "--sequence-length", 32, "--device", "cpu")
    assert not Path("no.png").exists()
    written = flextron(
        "generate", "tokens", "def main(", "--budget", "auto:0.5", "--max-new-tokens", 3, "--device", "cpu"
    )
    assert written["text"].startswith("def main(")


def test_export(elastic):
    from transformers import AutoModelForCausalLM

    small = flextron("export", "elastic", "small", "--budget", "0.45")
    dense = flextron("export", "elastic", "dense", "--dense", "--budget", "0.45")
    assert small["parameters"] == dense["parameters"]
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in ("small", "dense")]
    assert [type(model).__name__ for model in models] == ["FlextronForCausalLM", "LlamaForCausalLM"]
    ids = torch.randint(0, 300, (1, 9))
    torch.testing.assert_close(models[0](ids).logits, models[1](ids).logits, atol=1e-5, rtol=1e-5)
    assert not list(Path("dense").glob("*.py")) and Path("dense/tokenizer.json").is_file()


def test_what_follows_a_dense_export_runs(elastic, capsys):
    """The command that it ends with needs only what is installed."""
    done = CliRunner().invoke(app, ["export", "elastic", "with space", "--dense", "--budget", "0.45"])
    python, flag, code = shlex.split(done.stdout.splitlines()[-1].removeprefix("next: "))
    assert (python, flag) == ("python", "-c")
    exec(code, {})
    assert "'generated_text': 'Once upon a time" in capsys.readouterr().out


def test_export_of_sizes_that_need_padding(elastic):
    from transformers import AutoModelForCausalLM

    layers = '{"mlp": [96, 48, 24, 48]}'
    padded = flextron("export", "elastic", "padded", "--dense", "--pad", "--budget", layers)
    small = flextron("export", "elastic", "layers", "--budget", layers)
    assert padded["parameters"] > small["parameters"]
    ids = torch.randint(0, 300, (1, 9))
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in ("padded", "layers")]
    torch.testing.assert_close(models[0](ids).logits, models[1](ids).logits, atol=1e-5, rtol=1e-5)
    assert models[0].num_parameters() == padded["parameters"]
    for extra, message in (
        ([], r"nearest sub-network that fits is .*With `pad=True`"),
        (["--pad"], "for a stock class alone"),
        (["--snap"], "for a stock class alone"),
        (["--dense", "--pad", "--snap"], "Pass one of them"),
        (["--dense", "--gguf"], "Pass --dense or --gguf"),
    ):
        with pytest.raises(ValueError, match=message):
            flextron("export", "elastic", "refused", *(extra or ["--dense"]), "--budget", layers)
    assert not Path("refused").exists()


def test_export_of_sizes_that_are_snapped(elastic):
    """The stock model is the sub-network that the message and the card name, and costs no more than was asked for."""
    from transformers import AutoModelForCausalLM

    from modeling_flextron import FlextronForCausalLM

    layers = {"mlp": [96, 48, 24, 48]}
    result = flextron("export", "elastic", "snapped", "--dense", "--snap", "--budget", json.dumps(layers))
    family = FlextronForCausalLM.from_pretrained("elastic")
    asked, ids = family.resolve_budget(layers), torch.randint(0, 300, (1, 9))
    stock = AutoModelForCausalLM.from_pretrained("snapped")
    card = Path("snapped/README.md").read_text()
    sizes = json.loads(re.search(r"sizes \| `(.*)`", card)[1])
    assert "mlp [96, 48, 24, 48] -> " in result["changed"] and result["changed"] in card
    assert stock.num_parameters() == result["parameters"] <= count_parameters(family.config, asked)
    torch.testing.assert_close(stock(ids).logits, family(ids, flextron_budget=sizes).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stock(ids).logits, family.extract(layers, snap=True)(ids).logits, atol=1e-5, rtol=1e-5)


def test_an_export_is_written_for_other_readers(elastic):
    from flextron_trainer.export.dense import for_other_readers, tokenizer_for_other_readers

    flextron("export", "elastic", "read", "--dense", "--budget", "0.45")
    config = json.loads(Path("read/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert json.loads(Path("read/tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert {"generation_config.json", "README.md"} <= {path.name for path in Path("read").iterdir()}
    assert for_other_readers({"model_type": "gpt2", "n_positions": 8})["n_ctx"] == 8
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    assert for_other_readers({"model_type": "llama", "rope_parameters": rope})["rope_scaling"] == rope
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    neox = for_other_readers({"model_type": "gpt_neox", "rope_parameters": rope})
    assert (neox["rotary_emb_base"], neox["rotary_pct"]) == (1e4, 0.25)
    tokenizer = tokenizer_for_other_readers({"extra_special_tokens": ["<x>"]})
    assert tokenizer == {"additional_special_tokens": ["<x>"]}


@pytest.mark.parametrize("budget", ["0.45", '{"mlp": [96, 48, 24, 48], "heads": [8, 4, 4, 8]}'])
def test_a_gguf_file_holds_the_weights(elastic, budget):
    """Read back with the reader of the package; llama.cpp itself runs in `make interop`."""
    gguf = pytest.importorskip("gguf")
    from modeling_flextron import FlextronForCausalLM

    result = flextron("export", "elastic", "small.gguf", "--gguf", "--budget", budget)
    reader = gguf.GGUFReader("small.gguf")
    assert result["architecture"] == ("deci" if "[" in budget else "llama")
    model = FlextronForCausalLM.from_pretrained(
        "elastic", flextron_budget=json.loads(budget) if "[" in budget else budget
    )
    assert sum(tensor.n_elements for tensor in reader.tensors) == model.num_parameters()
    down = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
    expected = model.permutation.to_parent(model.model.layers[1].mlp.down_proj.weight, ("hidden", "mlp"), 1)
    assert torch.equal(torch.tensor(down.data), expected)


def test_presets_are_defaults(work):
    preset = json.loads((ROOT / "hub_configs" / "llama-3.2-1b.json").read_text())
    preset["config"] |= json.loads((work / "parent" / "config.json").read_text())
    preset["convert"] |= {"mlp": [1, 0.5], "heads": [1, 0.5], "hidden": [1], "depth": [1], "budgets": [1, 0.8]}
    preset["stages"]["elastic"] |= {"sequence_length": 32, "max_steps": 2, "bf16": False, "report_to": "none"}
    Path("mine.json").write_text(json.dumps(preset))
    arguments = ("convert", "parent", "by-preset", "--preset", "mine.json", "--calibration", "weights")
    result = flextron(*arguments, "--heads", "1", "--device", "cpu")
    config = json.loads(Path("by-preset/config.json").read_text())
    assert config["elastic"]["mlp"] == [96, 48] and config["elastic"]["heads"] == [8]
    assert [row["name"] for row in result["frontier"]] == ["1", "0.8"]
    for verb, folder in (("convert", "parent"), ("train", "by-preset")):
        with pytest.raises(ValueError, match="`base_model_type=gpt2`, not llama"):
            flextron(verb, folder, "refused", "--preset", "gpt2", *(["--output_dir", "x"] if verb == "train" else []))
    assert not Path("refused").exists()
    run = ("--preset", "mine.json", "--output_dir", "preset-run", "--use_cpu", "--per_device_train_batch_size", 2)
    flextron(
        "train", "by-preset", "text", *run, "--gradient_accumulation_steps", 1, "--ce-weight", 1,
        "--num-train-epochs=0.001", "--lr_scheduler_type", "linear",
    )  # fmt: skip
    card = Path("preset-run/README.md").read_text()
    assert "`num_train_epochs`: `0.001`" in card and "`adam_beta2`: `0.98`" in card and "max_steps" not in card


@pytest.mark.slow
def test_an_error_is_one_message(elastic):
    """Of the module, run as a program; more of them are in test_errors.py."""
    code = 'import runpy; runpy.run_module("flextron_trainer", run_name="__main__")'
    done = run_python(code, "generate", "elastic", "x", "--budget", "0.01", check=False, folder=elastic.parent)
    assert done.returncode == 2
    assert "`flextron_budget`='0.01' cannot be used" in done.stderr and "Traceback" not in done.stderr
