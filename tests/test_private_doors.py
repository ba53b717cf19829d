"""The private names of other libraries: all are listed, all are there, and none is listed for nothing."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"modeling_flextron": ROOT, "flextron_trainer": ROOT / "trainer"}
FILES = {path: root for name, root in PACKAGES.items() for path in sorted((root / name).rglob("*.py"))}
ROW = re.compile(r"^\| `(?P<home>[\w.]+)\.(?P<name>\w+)(?:\((?P<keyword>\w+)\))?` \| (?P<files>[^|]+) \|", re.MULTILINE)
DOORS = [match.groupdict() for match in ROW.finditer((ROOT / "docs" / "private-doors.md").read_text())]
LISTED = {door["keyword"] or door["name"]: set(re.findall(r"`(\w+)`", door["files"])) for door in DOORS}


def is_private(name: str | None) -> bool:
    return bool(name) and name.startswith("_") and not name.startswith("__") and name != "_"


def named_here(tree: ast.AST) -> set[str]:
    """Names that a file gives to something of its own."""
    nodes = list(ast.walk(tree))
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return defined | stored | names | {node.arg for node in nodes if isinstance(node, ast.arg)}


def asked_for(tree: ast.AST) -> set[str]:
    """Private names that a file reads of an object, passes as a keyword, or imports."""
    found: set[str | None] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword):
            found.add(node.arg)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
    return {name for name in found if is_private(name)}


def overridden(path: Path, root: Path) -> set[str]:
    """Private names of a library that the classes of a file define anew."""
    module = importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
    found = set()
    for kind in vars(module).values():
        if inspect.isclass(kind) and kind.__module__ == module.__name__:
            for base in kind.__mro__[1:]:
                if base.__module__.split(".")[0] not in {*PACKAGES, "builtins", "typing", "abc"}:
                    found |= {name for name in vars(kind) if is_private(name) and name in vars(base)}
    return found - {"_abc_impl", "_backward_cls"}  # which metaclasses write


@pytest.fixture(scope="module")
def used() -> dict[str, set[str]]:
    """Door -> the files that use it."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    ours = set().union(*map(named_here, trees.values())) - LISTED.keys()
    found: dict[str, set[str]] = {}
    for path, root in FILES.items():
        for name in asked_for(trees[path]) - ours | (overridden(path, root) if path.stem[0] != "_" else set()):
            found.setdefault(name, set()).add(path.stem)
    return found


def test_every_door_is_listed(used):
    assert not {name: files for name, files in used.items() if name not in LISTED}


def test_every_listed_door_is_used_where_the_page_says(used):
    registered = {
        "_auto_class": {"modeling_flextron", "configuration_flextron"}
    }  # written by `register_for_auto_class`
    assert {name: used.get(name, set()) - registered.get(name, set()) for name in LISTED} == LISTED


@pytest.mark.parametrize("door", DOORS, ids=lambda door: f"{door['name']}({door['keyword'] or ''})")
def test_the_installed_library_has_the_door(door):
    *parts, name = (*door["home"].split("."), door["name"])
    for i in range(len(parts), 0, -1):
        try:
            place = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        break
    for part in parts[i:]:
        place = getattr(place, part)
    if door["keyword"] is not None:
        function = inspect.unwrap(getattr(place, name))
        accepts = inspect.signature(function).parameters
        inner = door["keyword"] in inspect.getsource(inspect.getmodule(function))
        assert door["keyword"] in accepts or (any(p.kind == p.VAR_KEYWORD for p in accepts.values()) and inner)
    else:
        # An instance may get it when it is made, as configs and modules do.
        assert hasattr(place, name) or re.search(rf"self\.{name}\b", _sources(place)), door
    assert name in LISTED or door["keyword"] in LISTED


def _sources(kind: type) -> str:
    return "\n".join(inspect.getsource(base) for base in kind.__mro__ if _has_source(base))


def _has_source(kind: type) -> bool:
    try:
        inspect.getsource(kind)
    except (OSError, TypeError):
        return False
    return True
