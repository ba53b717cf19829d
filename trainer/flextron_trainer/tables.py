"""Tables for people that are as wide as their terminal: what does not fit goes on in a table below."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Values:
    """A column of text.

    Args:
        head: Of the column.
        cells: One for each row.
        numbers: Aligned on the right, each in one line.
        group: What the column has in common with those beside it, such as the text that was measured on.
    """

    head: str
    cells: Sequence[str]
    numbers: bool = True
    group: str = ""

    def widths(self, limit: int) -> tuple[int, int]:
        """In how few characters its words and numbers stand undivided, and how many it takes without a new line."""
        undivided = [*self.head.split(), *(self.cells if self.numbers else " ".join(self.cells).split())]
        widest = [max(map(cell_len, texts), default=1) for texts in (undivided, [self.head, *self.cells])]
        return min(widest[0], limit), min(widest[1], limit)


@dataclass(frozen=True)
class FittingTable:
    """Columns, of which the first begins every part; columns of a group stay together where they can."""

    columns: Sequence[Values]
    title: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        width, part = options.max_width, list[Values]()
        for _, group in groupby(self.columns[1:], lambda column: column.group):
            columns = list(group)
            if part and not self._fits([*part, *columns], width):
                yield self._table(part, width)
                part = []
            for column in columns:
                if part and not self._fits([*part, column], width):
                    yield self._table(part, width)
                    part = []
                part.append(column)
        yield self._table(part, width)

    def _shown(self, part: Sequence[Values]) -> tuple[str, list[Values]]:
        """The title of a part and its columns; a group that is alone is told by the title, and others by the heads."""
        groups = {column.group for column in part}
        if len(groups) == 1 and (group := groups.pop()):
            return f"{self.title}: {group}", [self.columns[0], *part]
        named = (replace(c, head=f"{c.group}/{c.head}") if c.group else c for c in part)
        return self.title, [self.columns[0], *named]

    def _fits(self, part: Sequence[Values], width: int) -> bool:
        return _framed(self._shown(part)[1], width) <= width

    def _table(self, part: Sequence[Values], width: int) -> Table:
        title, columns = self._shown(part)
        table, spare = Table(title=Text(title)), max(0, width - _framed(columns, width))
        for column in columns:
            least, most = column.widths(_half(width))
            more = min(spare, most - least)
            spare -= more
            justify: Any = "right" if column.numbers else "left"
            table.add_column(Text(column.head), justify=justify, width=least + more, overflow="fold")
        for cells in zip(*(column.cells for column in columns), strict=True):
            table.add_row(*map(Text, cells))  # names are no markup
        return table


def _half(width: int) -> int:
    """The most that a column may take, so that there is room for two."""
    return max(1, width // 2 - 4)


def _framed(columns: Sequence[Values], width: int) -> int:
    """The least width of a table with these columns."""
    return sum(column.widths(_half(width))[0] for column in columns) + 3 * len(columns) + 1
