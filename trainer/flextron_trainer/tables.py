"""Tables for people that are as wide as their terminal: what does not fit goes on in a table below."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Values:
    """A column of text; one of numbers is aligned on the right, and its cells stay in one line."""

    head: str
    cells: Sequence[str]
    numbers: bool = True

    def widths(self, limit: int) -> tuple[int, int]:
        """In how few characters its words and numbers stand undivided, and how many it takes without a new line."""
        undivided = [*self.head.split(), *(self.cells if self.numbers else " ".join(self.cells).split())]
        widest = [max(map(cell_len, texts), default=1) for texts in (undivided, [self.head, *self.cells])]
        return min(widest[0], limit), min(widest[1], limit)


@dataclass(frozen=True)
class FittingTable:
    """Columns, the first of which begins every part, so that none is wider than the terminal."""

    columns: Sequence[Values]
    title: str | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        first, *others = self.columns
        part, width = [first], options.max_width
        for column in others:
            if len(part) > 1 and _framed(_least([*part, column], width)) > width:
                yield self._table(part, width)
                part = [first]
            part.append(column)
        yield self._table(part, width)

    def _table(self, columns: Sequence[Values], width: int) -> Table:
        table = Table(title=None if self.title is None else Text(self.title))
        spare = max(0, width - _framed(_least(columns, width)))
        for column in columns:
            least, most = column.widths(_half(width))
            more = min(spare, most - least)
            spare -= more
            justify: Any = "right" if column.numbers else "left"
            table.add_column(Text(column.head), justify=justify, width=least + more, overflow="fold")
        for cells in zip(*(column.cells for column in columns), strict=True):
            table.add_row(*map(Text, cells))  # names are no markup
        return table


def _least(columns: Sequence[Values], width: int) -> list[int]:
    return [column.widths(_half(width))[0] for column in columns]


def _half(width: int) -> int:
    """The most that a column may take, so that there is room for two."""
    return max(1, width // 2 - 4)


def _framed(widths: Sequence[int]) -> int:
    """The width of a table with columns of these widths."""
    return sum(widths) + 3 * len(widths) + 1
