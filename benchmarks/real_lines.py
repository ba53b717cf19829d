"""The lines of `bench_real.py`: what they start from, how they differ, and which figures are theirs."""

import statistics
from typing import Any

LENGTH, BATCH = 256, 4
SELECTION = "selection"  # the text that chooses, and is in no table
STARTS: dict[str, dict[str, Any]] = {  # and for "depth" the numbers of layers
    "slices": {"order": "importance"},
    "repaired slices": {"uniform": False, "corrections": 0.03},
    "sizes by layer": {"uniform": False},
    "depth": {"mlp": [1], "heads": [1], "order": "importance"},
    "magnitude": {"calibration": "weights"},
}
FAMILIES = {"elastic": "repaired slices", "elastic, plain": "sizes by layer", "elastic, uniform": "slices"}
RECIPES: dict[str, dict[str, Any]] = {  # of lines that start as "elastic" does: what differs from the defaults
    "elastic, cross entropy": {"ce_weight": 0.5},
    "elastic, large epsilon": {"adam_epsilon": 1e-5},
    "elastic, full more often": {"sampler": "weighted", "sampling_weights": [3, 1, 1, 1], "subnetworks_per_step": 4},
}
FAMILIES |= {**dict.fromkeys(RECIPES, "repaired slices"), "routed": "slices"}
GOES_ON = {"routed": "elastic, uniform"}  # with the model of that line, at its learning rate
SINGLES = {
    "singles": "repaired slices", "singles, tokens": "repaired slices", "depth, singles": "depth",
    "magnitude, singles": "magnitude", "lora, singles": "repaired slices",
}  # fmt: skip
LORA = {  # lines whose weights are frozen, and the adapter that learns: as LLM-Pruner (arXiv 2305.11627) recovers
    "lora, singles": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
}
PARENTS = ("parent", "int8", "int4")
LINES = (*PARENTS, *[name for name in STARTS if name != "sizes by layer"], *FAMILIES, *SINGLES, "control")


def best_rate(measured: dict[str, Any], prefix: str, tokens: int, rates: list[float]) -> float:
    """The learning rate with the lowest mean loss of all trained sizes on the text that chooses."""

    def loss(rate: float) -> float:
        found = measured[f"{prefix} {tokens} {rate:g}"]
        return statistics.mean(value[SELECTION] for value in found.values() if isinstance(value, dict))

    return min(rates, key=loss)


def chosen(result: dict[str, Any]) -> dict[tuple[str, int | None], dict[str, str]]:
    """Line and number of tokens -> budget -> name of the figures at the best learning rate, as far as that is known."""
    options, first = result["options"], result["seeds"][str(result["options"]["seeds"][0])]
    budgets, few = ["1", *(f"{budget:g}" for budget in options["budgets"])], min(options["tokens"])
    found: dict[tuple[str, int | None], dict[str, str]] = {}
    for line in LINES:
        if line in STARTS or line in PARENTS:
            found[line, None] = dict.fromkeys(budgets, line)
            continue
        for tokens in sorted(options["tokens"]):
            prefixes = {budget: line if line in FAMILIES else f"{line} {budget}" for budget in budgets}
            found[line, tokens] = {
                budget: f"{prefix} {tokens} {best_rate(first, GOES_ON.get(line, prefix), few, options['rates']):g}"
                for budget, prefix in prefixes.items()
                if all(f"{GOES_ON.get(line, prefix)} {few} {rate:g}" in first for rate in options["rates"])
            }
    return found
