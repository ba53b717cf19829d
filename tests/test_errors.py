"""What goes wrong at the command line is one line that says what, and exit code 2."""

import json
import shutil
import sys
import warnings

import pytest
import torch
from helpers import elastic_of, parent_of
from safetensors import SafetensorError
from training import trainer

from flextron_trainer import cli
from flextron_trainer.demo import train_tokenizer
from flextron_trainer.models import load_stock
from modeling_flextron import FlextronConfig, FlextronForCausalLM

DEEP = "[" * 100_000 + "]" * 100_000
CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A parent, and an elastic model plain and in levels, each with a tokenizer."""
    folder = tmp_path_factory.mktemp("errors")
    tokenizer = train_tokenizer(["def main():\n    return 0\n"] * 20, vocab_size=300)
    parent = parent_of("mha", vocab_size=300)
    few = {"mlp": [1, 0.5], "heads": [1, 0.5], "hidden": [1], "depth": [1], "budgets": [1, 0.6]}
    elastic = elastic_of("mha", parent, **few)
    parent.save_pretrained(folder / "parent")
    elastic.save_pretrained(folder / "elastic")
    elastic.export(folder / "levels")
    for name in ("parent", "elastic", "levels"):
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("def main():\n    return 0\n" * 60)
    return folder


@pytest.fixture
def work(saved, tmp_path, monkeypatch):
    """A copy of it, to work in and to damage."""
    shutil.copytree(saved, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def refused(monkeypatch, capfd):
    """Run the command as a user does; the one line that it ends with."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["flextron", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capfd.readouterr()
        assert ended.value.code == 2 and said.out == "" and "Traceback" not in said.err
        lines = said.err.splitlines()
        assert lines[-1].startswith("Error: ") and sum(line.startswith("Error: ") for line in lines) == 1
        return lines[-1]

    return run


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
DAMAGED = {  # file -> what it says instead, and what the message names
    "no config": (None, "`config`='elastic' cannot be used. There is no config.json"),
    "a list": ("[1]", "`config`='elastic' cannot be used. There is no config.json, or it names no `model_type`"),
    "a number": ("3", "`config`='elastic' cannot be used. Its config.json is none of a model"),
    "nothing": ("", "config.json' is not a valid JSON file"),
    "half of it": ('{"model_type": "flex', "config.json' is not a valid JSON file"),
    "deep": (DEEP, "Its config.json is none of a model (RecursionError"),
    "deep field": (f'{{"model_type": "flextron", "a": {DEEP}}}', "Its config.json is none of a model (RecursionError"),
    "activation": ({"hidden_act": "magic"}, "`hidden_act`='magic' cannot be used"),
    "kind of activation": ({"hidden_act": ["silu"]}, "`hidden_act`=['silu'] cannot be used"),
    "theta": ({"rope_parameters": {**ROPE, "rope_theta": "x"}}, "`rope_parameters['rope_theta']`='x' cannot be used"),
    "no theta": ({"rope_parameters": {**ROPE, "rope_theta": 0}}, "`rope_parameters['rope_theta']`=0 cannot be used"),
    "kind of positions": ({"rope_parameters": {**ROPE, "rope_type": "magic"}}, "Its `rope_type` is one of default"),
    "half of the positions": ({"rope_parameters": {**ROPE, "rope_type": "yarn"}}, "Missing required keys"),
    "positions": ({"rope_parameters": [1]}, "`config`='elastic' cannot be used. One of its fields"),
    "dtype": ({"dtype": "float99"}, "module 'torch' has no attribute 'float99'"),
    "dtype of integers": ({"dtype": "int64"}, "`dtype`=torch.int64 cannot be used"),
    "dtype as number": ({"dtype": 7}, "`dtype`=7 cannot be used"),
    "end": ({"eos_token_id": "x"}, "`eos_token_id`='x' cannot be used"),
    "padding": ({"pad_token_id": "x"}, "`pad_token_id`='x' cannot be used"),
    "another model": ({"model_type": "llama"}, "`model_type`='llama' cannot be used"),
    "code": ({"auto_map": 7}, "`config`='elastic' cannot be used. One of its fields"),
    "attention": ({"attn_implementation": "magic"}, "magic"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_configs(work, refused, case):
    content, message = DAMAGED[case]
    path = work / "elastic" / "config.json"
    if content is None:
        path.unlink()
    elif isinstance(content, str):
        path.write_text(content)
    else:
        edit(path, **content)
    assert message in refused("generate", "elastic", "def", *CPU)
    with pytest.raises((ValueError, OSError)):  # not the rarer kinds that libraries raise
        FlextronForCausalLM.from_pretrained("elastic")


PARENTS = {
    "a list": "[1]",
    "a number": "3",
    "deep": DEEP,
    "activation": {"hidden_act": "magic"},
    "kind of activation": {"hidden_act": 3},
    "theta": {"rope_parameters": {**ROPE, "rope_theta": "x"}},
    "kind of positions": {"rope_parameters": {**ROPE, "rope_type": "magic"}},
    "dtype": {"dtype": "float99"},
    "dtypes": {"dtype": ["float32"]},
    "type": {"model_type": ["llama"]},
    "code": {"auto_map": 7},
}


@pytest.mark.parametrize("case", PARENTS)
def test_damaged_parents(work, refused, case):
    path = work / "parent" / "config.json"
    path.write_text(PARENTS[case]) if isinstance(PARENTS[case], str) else edit(path, **PARENTS[case])
    convert = ("convert", "parent", "out", "--calibration", "text.txt", "--sequence-length", 8, *CPU)
    assert "parent" in refused(*convert) and not (work / "out").exists()
    with pytest.raises(ValueError, match="parent"):
        load_stock("parent", "teacher")


def test_a_folder_without_a_config_builds_no_model(work, monkeypatch):
    """The base class would make the default one, of 7 billion parameters."""
    (work / "elastic" / "config.json").unlink()
    monkeypatch.setattr(FlextronForCausalLM, "__init__", lambda *_: pytest.fail("A model is built."))
    for read in (FlextronForCausalLM, FlextronConfig):
        with pytest.raises(ValueError, match=r"^`config`='elastic' cannot be used\. There is no config\.json"):
            read.from_pretrained("elastic")


@pytest.mark.parametrize("names", [7, ["Nobody"], ["AutoModelForCausalLM"], [["FlextronModel"]]])
def test_architectures_that_are_none_of_ours(work, refused, names):
    edit(work / "levels" / "config.json", architectures=names)
    for arguments in (("verify", "levels"), ("push", "levels", "me/x")):
        assert "`architectures`=" in refused(*arguments)


def test_files_that_are_cut_short(work, refused):
    for folder, file in (("elastic", "model.safetensors"), ("levels", "model.level0.safetensors")):
        path = work / folder / file
        path.write_bytes(path.read_bytes()[:-100])
        for verb in (("generate", folder, "def"), ("export", folder, "out"), ("evaluate", folder, "text.txt")):
            message = refused(*verb, *([] if verb[0] == "export" else CPU))
            assert folder in message and "flextron verify" in message, message
    assert "level0.safetensors has" in refused("verify", "levels")
    (work / "levels" / "model.level0.safetensors.index.json").write_text(DEEP)
    assert "model.level0.safetensors.index.json is no complete JSON" in refused("verify", "levels")
    path = work / "parent" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    message = refused("convert", "parent", "out", "--calibration", "weights", *CPU)
    assert message.startswith("Error: `parent`='parent' cannot be used. Reading it ended in SafetensorError")


def test_a_flipped_bit_is_noticed_by_verify(work, refused):
    """Nothing that loads reads every byte twice; what it says of other damage points to the verb that does."""
    path = work / "levels" / "model.level0.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 16
    path.write_bytes(content)
    FlextronForCausalLM.from_pretrained("levels")
    assert "model.level0.safetensors is damaged: its hash is not" in refused("verify", "levels")
    assert "flextron export" in refused("verify", "elastic")  # which has no hashes


def test_a_full_disk(work, refused, monkeypatch):
    """What was there before stays, and nothing that is half-written does."""
    before = {path: path.read_bytes() for path in (work / "elastic").rglob("*") if path.is_file()}

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    assert "No space left on device" in refused("export", "elastic", "out", "--plain")
    assert "No space left on device" in refused("export", "elastic", "dense", "--dense")
    convert = ("convert", "parent", "elastic", "--calibration", "weights", *CPU)
    assert "No space left on device" in refused(*convert)
    left = {path: path.read_bytes() for path in (work / "elastic").rglob("*") if path.is_file()}
    assert left == before and not [p for p in work.iterdir() if p.name in ("out", "dense") or p.name.startswith(".")]


def test_prompts_and_tokenizers(work, refused):
    assert "`prompt`='' cannot be used" in refused("generate", "elastic", "", *CPU)
    for content in (DEEP, "{}", "[1]", '{"model": 3}'):
        (work / "elastic" / "tokenizer.json").write_text(content)
        assert "`tokenizer`='elastic' cannot be used" in refused("generate", "elastic", "def", *CPU)


def test_arguments(work, refused):
    train = ("train", "elastic", "text.txt", "--output_dir", "run")
    assert "--max_steps" in refused(*train, "--max_steps", "x") and "--bogus" in refused(*train, "--bogus", 1)
    assert "`output_dir`=None cannot be used" in refused(*train[:3], "--max_steps", 1)
    assert "`mlp`='1,x' cannot be used" in refused(
        "convert", "parent", "out", "--calibration", "weights", "--mlp", "1,x"
    )
    assert "`flextron_budget`='0.01' cannot be used" in refused("generate", "elastic", "x", "--budget", "0.01", *CPU)
    (work / "mine.json").write_text(DEEP)
    assert "mine.json" in refused("convert", "parent", "out", "--preset", "mine.json")
    assert "`folder`='nowhere'" in refused("push", "nowhere", "me/x")
    for verb, *rest in (("verify",), ("bench", *CPU), ("generate", "x", *CPU), ("export", "out")):
        assert "nowhere/at-all" in refused(verb, "nowhere/at-all", *rest)
        assert "`model`='./nowhere' cannot be used. There is no such folder" in refused(verb, "./nowhere", *rest)
        message = refused(verb, "elastci", *rest)  # might be one on the Hub
        assert "`model`='elastci' cannot be used. There is no such folder, and it cannot be read from" in message
        assert "did you mean 'elastic'?" in message
    convert = ("out", "--calibration", "weights", *CPU)
    assert "`parent`='parnet' cannot be used. There is no such folder, and" in refused("convert", "parnet", *convert)
    assert "`teacher`='parnet' cannot be used. There is" in refused(*train, "--teacher", "parnet", "--use_cpu")
    assert "`parent`='/nowhere' cannot be used. There is no such folder" in refused("convert", "/nowhere", *convert)
    assert "`model`='text.txt' cannot be used. It is a file, and a model is a folder" in refused("sizes", "text.txt")
    for verb, *others in (("convert",), ("transplant", "parent"), ("export",)):
        source = "parent" if verb == "convert" else "elastic"
        message = "`output`='text.txt' cannot be used. There is a file of this name."
        assert message in refused(verb, source, *others, "text.txt")


def test_a_whole_error(work, monkeypatch, capfd):
    """`--traceback`, wherever it stands."""
    (work / "elastic" / "model.safetensors").write_bytes(b"")
    for arguments in (["--traceback", "generate", "elastic", "def"], ["generate", "elastic", "def", "--traceback"]):
        monkeypatch.setattr(sys, "argv", ["flextron", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capfd.readouterr().err
        assert ended.value.code == 2 and "Traceback (most recent call last)" in said and "SafetensorError" in said
    monkeypatch.setattr(sys, "argv", ["flextron", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--traceback" in capfd.readouterr().out


def test_what_nobody_foresaw(monkeypatch, refused):
    """Is one line, too, with its kind, and how to see all of it."""

    def break_down(*_, **__):
        raise ZeroDivisionError("of\n a kind")

    monkeypatch.setattr("flextron_trainer.cli.verify.local_folder", break_down)
    assert refused("verify", "x") == "Error: ZeroDivisionError: of a kind (`--traceback` shows where it comes from.)"


def test_a_warning_is_one_line(work, monkeypatch, capfd):
    """Without the path and the line of code that it comes from."""
    monkeypatch.setattr(
        "flextron_trainer.cli.verify.local_folder", lambda _: warnings.warn("of\n a kind", stacklevel=1)
    )
    monkeypatch.setattr(sys, "argv", ["flextron", "verify", "x"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capfd.readouterr().err.splitlines()[0] == "Warning: of a kind"


def test_a_checkpoint_with_a_missing_tensor_is_not_resumed(tmp_path):
    from safetensors.torch import load_file, save_file

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "teacher": None}
    trainer(tmp_path, **settings).train()
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    whole, lost = load_file(path), "model.layers.1.mlp.down_proj.weight"
    save_file({name: tensor for name, tensor in whole.items() if name != lost}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"^`resume_from_checkpoint`=.* missing tensors: {lost}"):
        trainer(tmp_path, **settings).train(resume_from_checkpoint=str(path.parent))
    save_file({**whole, "more": torch.ones(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has unexpected tensors: more"):
        trainer(tmp_path, **settings).train(resume_from_checkpoint=str(path.parent))
