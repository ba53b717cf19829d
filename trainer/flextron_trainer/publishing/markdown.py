"""Text from outside in Markdown and in Python, so that nothing in it is read as anything else than text.

Names of rows, tasks, devices and parents come from anywhere. They get into a card through `plain` and `code`, and into
its programs through `literal`; none of them can be ended by what it holds.
"""

import re
from collections.abc import Sequence

_HARMLESS = re.compile(r"(?!.*www\.|\d+[.)] |.*\b_|.*_\b)\w[\w%()+,./ -]*")  # no link, list item, or emphasis


def plain(text: str) -> str:
    """Text as it is where nothing in it has a meaning, and nothing is made a link; else as `code`."""
    return text if _HARMLESS.fullmatch(text) else code(text)


def code(text: object) -> str:
    """Text as code in one line, also in a cell of a table."""
    return f"`{_escaped(str(text), '`|') or ' '}`"


def literal(text: str) -> str:
    """Text as a string of Python, in a block of code."""
    return f'"{_escaped(text, chr(34) + chr(92) + chr(96))}"'


def table_of_cells(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of names and numbers."""
    return "\n".join([line_of_cells(heads), "|---|" + "---:|" * (len(heads) - 1), *map(line_of_cells, lines)])


def line_of_cells(cells: Sequence[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def _escaped(text: str, special: str) -> str:
    """Write what is special, or cannot be seen, as Python would."""
    return "".join(c if c.isprintable() and c not in special else _escape(ord(c)) for c in text)


def _escape(number: int) -> str:
    return f"\\x{number:02x}" if number < 2**8 else f"\\u{number:04x}" if number < 2**16 else f"\\U{number:08x}"
