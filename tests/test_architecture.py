"""The drawings of docs/architecture.md are the imports of the code, and arrows only go down."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL, TRAINER = ROOT / "modeling_flextron", ROOT / "trainer" / "flextron_trainer"
DRAWINGS = re.findall(r"```mermaid\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)


def home(path: Path, root: Path) -> str:
    """The node of a file: its folder below `root`, or its own name."""
    first, *rest = path.relative_to(root).parts
    return first if rest else path.stem


def imports(root: Path) -> dict[str, set[str]]:
    """Node -> the nodes that its files import, wherever in them."""
    found: dict[str, set[str]] = {}
    for path in root.rglob("*.py"):
        node = home(path, root)
        if node in ("__init__", "__main__"):
            continue
        targets = found.setdefault(node, set())
        for statement in ast.walk(ast.parse(path.read_text())):
            if isinstance(statement, ast.ImportFrom) and statement.level:
                base = path.parents[statement.level - 1].joinpath(*(statement.module or "").split("."))
                modules = [base] if statement.module else [base / alias.name for alias in statement.names]
                targets |= {home(module, root) for module in modules if module != root}
        targets.discard(node)
    return found


def below(graph: dict[str, set[str]], node: str) -> set[str]:
    """All that a node reaches."""
    reached: set[str] = set()
    todo = [node]
    while todo:
        for target in graph[todo.pop()] - reached:
            reached.add(target)
            todo.append(target)
    return reached


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that do not follow from others."""
    return {
        node: {t for t in targets if not any(t in below(graph, other) for other in targets - {t})}
        for node, targets in graph.items()
    }


@pytest.mark.parametrize(("root", "number"), [(MODEL, 0), (TRAINER, 1)], ids=["model", "trainer"])
def test_a_drawing_is_the_imports(root, number):
    graph = imports(root)
    circles = [node for node in graph if node in below(graph, node)]
    assert not circles
    drawn = {tuple(arrow) for arrow in re.findall(r"^ *(\w+) --> (\w+)$", DRAWINGS[number], re.MULTILINE)}
    assert drawn == {(node, target) for node, targets in reduced(graph).items() for target in targets}
