"""One form for every complaint about an argument: what was given, the rule it breaks, the way out."""

import math
import reprlib
from collections.abc import Mapping

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120
_short.maxlist = _short.maxtuple = _short.maxdict = 12


def invalid(argument: str, value: object, rule: str, remedy: str) -> ValueError:
    """Build the `ValueError` for an argument that cannot be used.

    Args:
        argument: Name of the argument or config field, as the user wrote it.
        value: The value that was given (shortened in the message when long).
        rule: One sentence: what the argument must satisfy.
        remedy: One sentence: what to do instead.
    """
    return ValueError(f"`{argument}`={_short.repr(value)} cannot be used. {rule} {remedy}")


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def require_int(argument: str, value: object, minimum: int = 1) -> None:
    """Raise unless `value` is an int (not a bool) of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise invalid(argument, value, f"It must be an integer of at least {minimum}.", f"Pass `{argument}` as an int.")


def refuse_misspelt(given: Mapping[str, object], *ours: str) -> None:
    """Raise for a keyword that begins like `ours` and is none of them: transformers would ignore it."""
    for name, value in given.items():
        if name.startswith("flex") and name not in ours:
            raise invalid(name, value, "There is no such keyword.", f"Did you mean `{'` or `'.join(ours)}`?")
