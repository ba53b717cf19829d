"""What the README and the examples print is what runs."""

import re
import subprocess
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest
from helpers import parent_of, run_python
from transformers import AutoModelForCausalLM

from flextron_trainer import convert
from flextron_trainer.demo import train_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## What is where")[2].split("```")[1]
ROOTS = ("modeling_flextron/", "trainer/", "benchmarks/", "examples/")
TEXT = ["def main():\n    return 0\n", "class Example:\n    pass\n"] * 20


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as `make demo` leaves it, with random weights, and a parent with its tokenizer."""
    folder = tmp_path_factory.mktemp("readme")
    parent = parent_of("gqa-wide-heads", vocab_size=300, intermediate_size=192)
    tokenizer = train_tokenizer(TEXT, vocab_size=300)
    elastic = convert(parent, TEXT, tokenizer=tokenizer, sequence_length=16)
    for saved, name in ((elastic, "flextron-demo/elastic"), (parent, "parent")):
        saved.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("".join(TEXT) * 8)
    return folder


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readme_is_short_and_complete():
    for text in snippets():
        assert len([line for line in text.splitlines() if line.strip()]) <= 12
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    programs = [path for path in tracked if path.startswith(ROOTS) and path.endswith(".py")]
    names = Counter(Path(path).name for path in programs if not path.endswith("/__init__.py"))
    told = Counter(re.findall(r"\w+\.py", TREE)) - Counter(["__init__.py"])
    assert told == names, "the tree of docs/architecture.md has other files"
    for target in ("make demo", "make test"):
        assert target in README


def test_every_result_is_told_of():
    """A file of figures that no page names was left behind, or has no command beside it."""
    pages = [README, *(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))]
    names = set(re.findall(r"[\w*.-]+\.(?:json|png)|results/[\w/-]+\.md", "\n".join(pages)))
    found = subprocess.run(["git", "ls-files", "docs/results"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert [path for path in found if not any(fnmatch(path, f"*{name}") for name in names)] == []


@pytest.mark.slow
def test_lines_for_users_run_as_printed(workplace):
    run_python(snippets()[0], folder=workplace)
    dense = AutoModelForCausalLM.from_pretrained(workplace / "llama-half")
    assert type(dense).__name__ == "LlamaForCausalLM"


@pytest.mark.slow
def test_lines_for_training_run_as_printed(workplace):
    """With the ids of the README replaced by a parent and a text that exist here."""
    text = snippets()[1].replace("meta-llama/Llama-3.2-1B", "parent").replace("./text", "text.txt")
    text = text.replace("max_steps=1000", "max_steps=2, use_cpu=True, report_to='none'").replace("512", "16")
    run_python(text, folder=workplace)
    assert (workplace / "run" / "config.json").is_file()


@pytest.mark.slow
def test_example_runs(workplace):
    arguments = ["--output_dir", "trained", "--max_steps", "2", "--use_cpu", "--report_to", "none"]
    script = (ROOT / "examples" / "convert_and_train.py").read_text()
    script = script.replace("SEQUENCE_LENGTH = 512", "SEQUENCE_LENGTH = 16")
    assert "eval_loss_0.5" in run_python(script, "parent", "text.txt", *arguments, folder=workplace).stdout
    assert (workplace / "trained" / "README.md").is_file()
