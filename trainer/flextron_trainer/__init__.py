"""Convert, train, evaluate and publish elastic models.

Names are imported when they are used, so that `flextron --help` waits for no library.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion.convert import convert
    from .conversion.transplant import transplant
    from .training.arguments import FlextronTrainingArguments
    from .training.teach import teach
    from .training.trainer import FlextronTrainer

_HOMES = {
    "FlextronTrainer": ".training.trainer",
    "FlextronTrainingArguments": ".training.arguments",
    "convert": ".conversion.convert",
    "teach": ".training.teach",
    "transplant": ".conversion.transplant",
}
__all__ = ["FlextronTrainer", "FlextronTrainingArguments", "convert", "teach", "transplant"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
