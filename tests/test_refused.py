"""docs/refused.md is true: every entry has a message of the code and a test that asks for the refusal."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split(" | ")]
    for line in (ROOT / "docs" / "refused.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and "::" in line
]


@functools.cache
def messages() -> str:
    """All strings of the two packages, of those with values in them the parts between."""
    files = [*(ROOT / "modeling_flextron").glob("*.py"), *(ROOT / "trainer" / "flextron_trainer").rglob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


@functools.cache
def functions(file: str) -> dict[str, str]:
    """The functions of a file of tests, by name."""
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return {node.name: "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno]) for node in nodes}


def test_there_are_entries():
    assert len(ROWS) > 3 and all(len(row) == 5 for row in ROWS), [row for row in ROWS if len(row) != 5]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[-1].strip("`"))
def test_an_entry_has_a_message_and_a_test(row):
    *_, words, test = row
    words = words[2:-2].strip() if words.startswith("``") else words.strip("`")
    assert len(words) > 7 and words in messages()
    file, name = test.strip("`").split("::")
    assert name in functions(file), f"{file} has no {name}"
    asks = r"raises|refuse|in message|in str\(error\)|check\("  # some are raised in other processes
    assert re.search(asks, functions(file)[name])
