"""No code runs unasked: every file of a model's folder that can name code does, and no verb and no function runs it."""

import ast
import contextlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import elastic_of, flextron, parent_of
from peft import LoraConfig, get_peft_model
from planted import plant
from training import arguments, rows
from transformers import AutoProcessor, AutoTokenizer, LlamaForCausalLM

import modeling_flextron
from flextron_trainer import FlextronTrainer, convert, standalone
from flextron_trainer.adapters import from_parent
from flextron_trainer.cli import app
from flextron_trainer.data import load_tokenizer
from flextron_trainer.demo import train_tokenizer
from flextron_trainer.export.dense import export_dense
from flextron_trainer.models import load_elastic, load_stock
from modeling_flextron import FlextronConfig

TEXT = "def main():\n    return 0\n"
TINY = ("--device", "cpu", "--sequence-length", 16)
LOOSE = ("--use_cpu", "--report_to", "none", "--save_strategy", "no", "--sequence-length", 16, "--max_steps", 1)
CASES = {
    "convert": ["parent", "converted", "--calibration", "text", "--max-samples", 4, *TINY],
    "train": ["elastic", "text", "--teacher", "parent", "--output_dir", "run", *LOOSE],
    "evaluate": ["elastic", "text", "--max-samples", 2, "--write", *TINY],
    "teach": ["parent", "text", "cache", "--draws", 4, *TINY],
    "answers": ["parent", "prompts.jsonl", "answers.jsonl", "--max-new-tokens", 2, "--device", "cpu"],
    "transplant": ["elastic", "parent", "carried", "--base", "parent"],
    "sizes": ["elastic", "--device", "cpu"],
    "measure": ["elastic", "--rounds", 1, "--context", 8, "--device", "cpu"],
    "export": ["elastic", "levels"],
    "export --plain": ["elastic", "plain", "--plain"],
    "export --dense": ["elastic", "dense", "--dense", "--budget", "0.6"],
    "export --gguf": ["elastic", "one.gguf", "--gguf"],
    "verify": ["exported"],
    "generate": ["elastic", "def", "--max-new-tokens", 2, "--device", "cpu"],
}  # fmt: skip
ELSEWHERE = {
    "push": "test_hub.py",
    "bench": "test_bench.py",
    "demo": "test_demo.py",
    "ui": "test_space.py",
}  # where they run anyway


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A parent, an elastic model, an export of it and an adapter, all with planted code, and a text."""
    folder = tmp_path_factory.mktemp("untrusted")
    tokenizer = train_tokenizer([TEXT] * 20, vocab_size=300)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    parent = parent_of("gqa-wide-heads", vocab_size=300)
    elastic = elastic_of(
        "gqa-wide-heads", parent, mlp=[1, 0.5], heads=[1, 0.5], hidden=[1], depth=[1], budgets=[1, 0.6]
    )
    parent.save_pretrained(folder / "parent")
    elastic.save_pretrained(folder / "elastic")
    elastic.export(folder / "exported")
    adapted = get_peft_model(parent, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    adapted.save_pretrained(folder / "adapter")
    for name in ("parent", "elastic", "exported", "adapter"):
        tokenizer.save_pretrained(folder / name)
        plant(folder / name, folder / "marker")
    (folder / "adapter" / "config.json").unlink()
    path = folder / "adapter" / "adapter_config.json"
    imports = {"parent_library": "planted", "base_model_class": "Class"}
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": str(folder / "parent")}
    settings |= {"megatron_core": "planted", "megatron_config": {"a": 1}, "auto_mapping": imports}
    path.write_text(json.dumps(settings))
    (folder / "prompts.jsonl").write_text('{"prompt": "def main"}\n')
    (folder / "text").mkdir()
    for i in range(3):
        (folder / "text" / f"{i}.txt").write_text(TEXT * 60)
    return folder


@pytest.fixture
def untouched(work, monkeypatch):
    """The folder, where what lies in the adapter's folder could be imported; afterwards nothing has run."""
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(work / "adapter"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("A question is asked on the terminal."))
    yield work
    assert not (work / "marker").exists()
    sys.modules.pop("planted", None)


def test_no_verb_is_forgotten():
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert verbs == {case.split()[0] for case in CASES} | set(ELSEWHERE)
    for verb, file in ELSEWHERE.items():
        text = (Path(__file__).parent / file).read_text()
        assert "plant(" in text and f'"{verb}", ' in text


def test_every_call_says_who_is_trusted():
    """What is not said is asked on the terminal; by a literal only `standalone.py` trusts, when it is told to."""
    packages = (Path(modeling_flextron.__file__).parent, Path(standalone.__file__).parent)
    for path in (path for folder in packages for path in folder.rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            said = {word.arg: word.value for word in call.keywords}
            called = call.args[0] if ast.unparse(call.func) == "partial" else call.func
            if re.fullmatch(r"Auto(Config|Model|Tokenizer|Processor)\w*\.from_\w+", ast.unparse(called)):
                assert "trust_remote_code" in said, f"{path.name}: {ast.unparse(call)}"
            if path.name != "standalone.py":
                assert ast.unparse(said.get("trust_remote_code", ast.Constant(False))) != "True", path


@pytest.mark.parametrize("case", CASES)
def test_verb(untouched, case):
    if "--gguf" in case:
        pytest.importorskip("gguf")
    flextron(case.split()[0], *CASES[case])
    for path in untouched.rglob("*.json"):  # nor is what was planted handed on
        if not {"parent", "elastic", "exported", "adapter"} & set(path.relative_to(untouched).parts[:1]):
            assert "--planted" not in path.read_text(), path


def trainer(**changes):
    given = {"model": "elastic", "teacher": "parent", **changes}
    return FlextronTrainer(
        given["model"], arguments("run", max_steps=1), teacher=given["teacher"], train_dataset=rows(4)
    )


FUNCTIONS = {
    "convert": lambda: convert("parent", [TEXT] * 20, sequence_length=16),
    "load_tokenizer": lambda: [load_tokenizer(name) for name in ("parent", "elastic", "adapter")],
    "load_elastic": lambda: load_elastic("elastic"),
    "load_stock": lambda: [load_stock(name, "teacher") for name in ("parent", "elastic")],
    "trainer": lambda: trainer().train(),
    "elastic teacher": lambda: trainer(teacher="elastic").train(),
    "dense": lambda: export_dense("elastic", "dense-again", 0.6),
    "an adapter of the parent": lambda: from_parent("adapter", "elastic", "adapter-of-ours"),
    "config": lambda: FlextronConfig.from_pretrained("elastic"),
    "models": lambda: [
        getattr(modeling_flextron, name).from_pretrained("elastic", flextron_budget=0.6)
        for name in ("FlextronModel", "FlextronForCausalLM", "FlextronForSequenceClassification")
    ],
}
REFUSED = {
    "an adapter to convert": lambda: convert("adapter", [TEXT]),
    "an adapter to train": lambda: trainer(model="adapter"),
    "an adapter that teaches": lambda: trainer(teacher="adapter"),
    "an adapter to load": lambda: load_elastic("adapter"),
    "generate": lambda: load_elastic("elastic").generate(custom_generate="elastic"),
    "generate at a budget": lambda: load_elastic("elastic").generate(flextron_budget=0.6, custom_generate="elastic"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(untouched, name):
    FUNCTIONS[name]()


@pytest.mark.parametrize("name", REFUSED)
def test_refused(untouched, name):
    """By a `ValueError`; before anything that it names is imported."""
    with pytest.raises(ValueError):
        REFUSED[name]()


def test_without_this_package(untouched):
    """The program that loads a repo without our package runs the repo's own code, so it wants to be told to."""
    with pytest.raises(SystemExit, match="--trust-remote-code"):
        standalone.main("elastic", "def", "0.6")


CONTROLS = {
    "tokenizer": lambda folder: AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
    "our tokenizer": lambda folder: load_tokenizer(folder, trust_remote_code=True),
    "config": lambda folder: load_stock(folder, trust_remote_code=True),
    "processor": lambda folder: AutoProcessor.from_pretrained(folder, trust_remote_code=True),
    "generate": lambda folder: LlamaForCausalLM.from_pretrained(folder, trust_remote_code=True),
    "convert": lambda folder: flextron(
        "convert", folder, "trusted", "--trust-remote-code", "--calibration", "weights", "--device", "cpu"
    ),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_what_is_planted_would_run(work, tmp_path, monkeypatch, name):
    """Where a user asks for it: so the tests above see what they look for."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name.replace(" ", "-")
    shutil.copytree(work / "parent", folder)
    (folder / "requirements.txt").unlink()
    plant(folder, tmp_path / "marker")
    with contextlib.suppress(ValueError, OSError, AttributeError, ImportError):  # there is no such class in it
        CONTROLS[name](folder)
    assert (tmp_path / "marker").exists()
