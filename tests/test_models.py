"""What is read is whole, and is what was asked for, or is refused by name."""

import shutil

import pytest
import torch
from helpers import difference, elastic_of, flextron, parent_of
from safetensors.torch import load_file, save_file
from training import trainer
from transformers import AutoTokenizer

from flextron_trainer import convert
from flextron_trainer.demo import train_tokenizer
from flextron_trainer.models import load_elastic, load_stock

LOST, ADDED, RESHAPED = "model.layers.1.mlp.down_proj.weight", "model.layers.9.extra.weight", "model.norm.weight"
CHANGES = {
    "missing": (lambda tensors: tensors.pop(LOST), LOST),
    "unexpected": (lambda tensors: tensors.update({ADDED: torch.zeros(3)}), ADDED),
    "mismatched": (lambda tensors: tensors.update({RESHAPED: torch.zeros(63)}), RESHAPED),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    parent = parent_of("gqa-wide-heads", vocab_size=300)
    few = {"mlp": [1, 0.5], "heads": [1, 0.5], "hidden": [1], "depth": [1], "budgets": [1, 0.6]}
    parent.save_pretrained(folder / "parent")
    elastic_of("gqa-wide-heads", parent, **few).save_pretrained(folder / "elastic")
    train_tokenizer(["def main():\n    return 0\n"] * 20, vocab_size=300).save_pretrained(folder / "elastic")
    return folder


def changed(source, target, problem):
    """A copy of a folder with a tensor too few, too many, or of another shape."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    CHANGES[problem][0](tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("problem", CHANGES)
def test_only_whole_models_are_read(saved, tmp_path, monkeypatch, problem):
    """By every verb that reads one, in both places of the trainer, and at every budget that needs the tensor."""
    monkeypatch.chdir(tmp_path)
    elastic, parent = (changed(saved / name, tmp_path / name, problem) for name in ("elastic", "parent"))
    ours = [
        lambda: load_elastic(elastic),
        lambda: trainer(tmp_path / "run", model=str(elastic), teacher=None),
        lambda: flextron("export", elastic, "levels"),
        lambda: flextron("export", elastic, "dense", "--dense", "--budget", "0.6"),
        lambda: flextron("generate", elastic, "def", "--device", "cpu"),
        lambda: flextron("generate", elastic, "def", "--device", "cpu", "--budget", "0.6"),
        lambda: flextron("push", elastic, "me/elastic"),
        lambda: flextron("measure", elastic, "--device", "cpu"),
    ]
    theirs = [lambda: load_stock(parent, "parent"), lambda: convert(parent, torch.ones(4, 8, dtype=torch.long))]
    for read in (*ours, *theirs):
        with pytest.raises(ValueError) as caught:
            read()
        assert CHANGES[problem][1] in str(caught.value)
        assert f"has {problem} tensors" in str(caught.value) or "of it, and this model needs" in str(caught.value)
    with pytest.raises(ValueError, match=f"^`teacher`=.* has {problem} tensors"):
        trainer(tmp_path / "run", model=str(saved / "elastic"), teacher=str(parent))
    assert not [path for path in tmp_path.iterdir() if path.name in ("levels", "dense")]


def test_what_is_whole_is_read(saved):
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = load_stock(saved / "parent")(ids).logits
        assert difference(load_elastic(saved / "elastic")(ids).logits, expected) < 1e-5
        assert load_elastic(saved / "elastic", flextron_budget=0.6).num_parameters() < 0.8 * 200_000


def test_the_tokenizer_and_the_card_are_those_of_the_revision(saved, tmp_path):
    """`convert` hands `revision` and `cache_dir` to everything that it reads: here the main branch has neither."""
    repo = tmp_path / "models--them--parent"
    for sha, branch in (("1" * 40, "main"), ("2" * 40, "dev")):
        shutil.copytree(saved / "parent", repo / "snapshots" / sha)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / branch).write_text(sha)
    AutoTokenizer.from_pretrained(saved / "elastic").save_pretrained(repo / "snapshots" / ("2" * 40))
    (repo / "snapshots" / ("2" * 40) / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    where = {"cache_dir": tmp_path, "local_files_only": True}
    elastic = convert("them/parent", ["def main"] * 9, sequence_length=8, revision="dev", **where)
    assert elastic.config.parent_license == {"license": "apache-2.0"}
    with pytest.raises(ValueError, match="Text needs a tokenizer"):
        convert("them/parent", ["def main"] * 9, sequence_length=8, **where)


def test_token(saved, monkeypatch):
    """And `token` to the reader of the tokenizer, who alone could leave it out."""
    seen = {}
    monkeypatch.setattr("flextron_trainer.data.load_tokenizer", lambda source, **hub: seen.update(hub))
    with pytest.raises(ValueError, match="Text needs a tokenizer"):
        convert(str(saved / "parent"), ["def main"], token="hf_mine")
    assert seen == {"trust_remote_code": False, "token": "hf_mine"}
