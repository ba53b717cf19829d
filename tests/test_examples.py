"""The script of a whole real run, with small settings."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers import SHAPES, flextron, parent_of
from transformers import AutoModelForCausalLM

from flextron_trainer.demo import train_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_real_run_in_small(tmp_path, monkeypatch):
    """What the script would run is written down by a `flextron` of our own, and then run in this process."""
    monkeypatch.chdir(tmp_path)
    texts = [f"def f{i}(x):\n    return x + {i}\n" for i in range(400)]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": part}) + "\n" for part in texts))
    tokenizer = train_tokenizer(texts, 300)
    heads = SHAPES["mha"]
    parent_of("mha", vocab_size=len(tokenizer), **heads).save_pretrained(tmp_path / "parent")
    tokenizer.save_pretrained(tmp_path / "parent")
    small = {
        "PARENT": tmp_path / "parent", "TEXT": text, "OUT": tmp_path / "out", "STEPS": 3, "ROUTER_STEPS": 4,
        "LENGTH": 32, "BATCH": 2, "ACCUMULATION": 2, "SAMPLES": 8, "SAVE": 2,
        "MORE": "--use_cpu --report_to none", "METHOD": "gumbel",  # a surrogate wants more steps
        "CONVERT": "--mlp 1,0.75,0.5,0.25 --heads 1,0.5 --budgets 1,0.75,0.5",
        "FLEXTRON": "bash flextron.sh",
    }  # fmt: skip
    Path("flextron.sh").write_text('printf "%s\\n" "$@" "" >> calls.txt\n')
    variables = {**os.environ, **{name: str(value) for name, value in small.items()}}
    subprocess.run(["bash", EXAMPLES / "llama_1b.sh"], env=variables, check=True)
    calls = [call.split("\n") for call in Path("calls.txt").read_text().strip().split("\n\n")]
    assert [call[0] for call in calls] == ["convert", "train", "train", "train", "evaluate", "export"]
    results = [flextron(*call) for call in calls]
    assert any("gib" in result for result in results) and (tmp_path / "out" / "frontier.png").exists()
    names = [row["name"] for row in json.loads((tmp_path / "out" / "routed" / "config.json").read_text())["frontier"]]
    assert {"1", "0.75", "0.5", "routed-0.5"} <= set(names)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "half")).__name__ == "LlamaForCausalLM"


def test_accelerate_reads_its_configs():
    from accelerate.commands.config.config_args import load_config_from_file

    for path in (EXAMPLES / "accelerate").glob("*.yaml"):
        assert load_config_from_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """With a small parent of ours, in a kernel of its own."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    texts = [path.read_text() for path in sorted((EXAMPLES / "space").iterdir())]
    tokenizer = train_tokenizer(texts, 300)
    parent_of("gqa-wide-heads", vocab_size=300).save_pretrained(tmp_path / "parent")
    tokenizer.save_pretrained(tmp_path / "parent")
    (tmp_path / "text").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    settings = {"PARENT": "parent", "TEXT": "text", "STEPS": 2, "LENGTH": 16}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join(map(str, (EXAMPLES.parent, EXAMPLES.parent / "trainer")))
        + os.pathsep
        + os.environ.get("PYTHONPATH", ""),
    )
    notebook = nbformat.read(EXAMPLES / "elastic_in_ten_minutes.ipynb", as_version=4)
    client.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "elastic" / "modeling_flextron.py").is_file()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
