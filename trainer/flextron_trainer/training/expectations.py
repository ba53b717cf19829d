"""Says what training tokens bought on real parents: `flextron train --steps auto`, and `--plan`.

Nothing is read between or beyond measured points, as nobody knows what lies there. They are the line "elastic" of
`benchmarks/bench_real.py` (docs/results/real-*.json), on the first of its texts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log


@dataclass(frozen=True)
class Measured:
    """Elastic runs on a real parent.

    Args:
        parent: Its name.
        parameters: How many it has.
        above: Tokens of training -> budget -> nats per token above the parent; 0 tokens: converted, with corrections.
    """

    parent: str
    parameters: int
    above: Mapping[int, Mapping[str, float]]

    def text(self) -> str:
        """All of it in sentences, shortest run first."""
        runs = [
            f"after {tokens:,} tokens " + ", ".join(f"{value:+.2f} at {budget}" for budget, value in row.items())
            for tokens, row in self.above.items()
        ]
        return f"Measured on {self.parent} (held-out text, nats above the parent): {'; '.join(runs)}."


MEASURED: tuple[Measured, ...] = (
    Measured(
        "SmolLM2-135M",
        134515008,
        {
            0: {"1": 0.0, "0.75": 0.549, "0.5": 1.429, "0.35": 3.066},
            10240: {"1": -0.01, "0.75": 0.436, "0.5": 1.221, "0.35": 1.941},
            40960: {"1": -0.016, "0.75": 0.329, "0.5": 0.861, "0.35": 1.486},
        },
    ),
    Measured(
        "stories260K",
        260032,
        {
            0: {"1": 0.0, "0.75": 1.326, "0.5": 2.426, "0.35": 2.942},
            40960: {"1": 0.166, "0.75": 0.587, "0.5": 1.134, "0.35": 1.489},
            163840: {"1": 0.12, "0.75": 0.324, "0.5": 0.66, "0.35": 0.913},
        },
    ),
)


def nearest(parameters: int) -> Measured:
    """The measured parent that is nearest in size, by ratio."""
    return min(MEASURED, key=lambda each: abs(log(each.parameters / parameters)))
