"""The wheel holds what it needs and works from a foreign folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import run_forked

from modeling_flextron.configuration_flextron import VERSION

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    code = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("modeling_flextron", "trainer/flextron_trainer"):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(ROOT)).removeprefix("trainer/") in names
    assert "flextron_trainer/space/app.py" in names
    assert not [name for name in names if name.startswith(("trainer/", "tests/", "hub_configs/"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "flextron = flextron_trainer.cli:main" in zipfile.ZipFile(wheel).read(entry).decode()


@pytest.mark.slow
def test_use_from_a_foreign_folder(wheel, tmp_path):
    """Unpacked beside a `trainer.py` of the user, with this checkout out of reach."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "trainer.py").write_text("MINE = True\n")
    sources = ["", *(str(ROOT / folder) for folder in (".", "trainer", "tests"))]
    code = f"""
import sys
sys.path[:] = [path for path in sys.path if path not in {sources!r}]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path[:0] = [{str(tmp_path)!r}, {str(tmp_path / "site")!r}]
import torch, trainer
assert trainer.MINE
from transformers import LlamaConfig, LlamaForCausalLM
import flextron_trainer, modeling_flextron
for package in (flextron_trainer, modeling_flextron):
    assert package.__file__.startswith({str(tmp_path)!r})
from flextron_trainer import FlextronTrainer, FlextronTrainingArguments, convert
from flextron_trainer.publishing.card import write_model_card
parent = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=4))
elastic = convert(parent, torch.randint(0, 50, (8, 16)))
arguments = FlextronTrainingArguments("run", max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
FlextronTrainer(elastic, arguments, teacher=parent, train_dataset=[{{"input_ids": list(range(9))}}] * 8).train()
elastic.save_pretrained("saved")
write_model_card(elastic, "saved")
print("DONE")
"""
    done = run_forked(code, [], 240, tmp_path)
    assert done.returncode == 0 and "DONE" in done.stdout, done.stderr[-2000:]
    assert (tmp_path / "saved" / "modeling_flextron.py").is_file()


@pytest.mark.parametrize("folder", ["trainer", "tests", "docs", "benchmarks", "examples"])
def test_source_roots_are_not_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_code_in_a_repo_has_the_version_of_the_package():
    assert f'version = "{VERSION}"' in (ROOT / "pyproject.toml").read_text()
