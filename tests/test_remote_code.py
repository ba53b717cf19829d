"""The rules that let transformers copy `modeling_flextron/` into a Hub repo and run it from there."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "modeling_flextron"
FILES = sorted(path for path in FOLDER.glob("*.py") if path.name != "__init__.py")
ENTRIES = ("configuration_flextron.py", "modeling_flextron.py")
RELATIVE = re.compile(r"^\s*(?:from\s+\.(\S*)\s+import|import\s+\.)", re.MULTILINE)


def relative_imports(path: Path) -> list[ast.ImportFrom]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]


def test_one_flat_folder():
    assert not [path for path in FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
class TestImports:
    def test_relative_imports_name_a_file_beside(self, path):
        for node in relative_imports(path):
            assert node.level == 1 and node.module and "." not in node.module
            assert (FOLDER / f"{node.module}.py").is_file()

    def test_no_text_looks_like_a_relative_import(self, path):
        """The copier is a regular expression over the whole file, docstrings included."""
        assert len(RELATIVE.findall(path.read_text())) == len(relative_imports(path))

    def test_third_party_imports_are_those_that_every_user_has(self, path):
        allowed = {"torch", "transformers", "huggingface_hub", "safetensors"} | sys.stdlib_module_names
        tree = ast.parse(path.read_text())
        optional = {child for node in ast.walk(tree) if isinstance(node, ast.Try) for child in ast.walk(node)}
        for node in set(ast.walk(tree)) - optional:  # transformers skips those, too
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in allowed


@functools.cache
def reached(path: Path) -> set[str]:
    direct = {f"{node.module}.py" for node in relative_imports(path)}
    return direct.union(*(reached(FOLDER / name) for name in direct)) if direct else set()


def test_every_file_is_reached_from_an_entry():
    found = set(ENTRIES).union(*(reached(FOLDER / entry) for entry in ENTRIES))
    assert found == {path.name for path in FILES}


def test_configs_are_not_told_apart_by_class():
    """From a local folder, config and model come from two copies of the code, whose classes differ."""
    for path in FILES:
        assert "isinstance(config, FlextronConfig" not in path.read_text()
