"""The lines of `bench_real.py`: what they start from, how they differ, and which figures are theirs."""

from typing import Any

from study import Plan

LENGTH, BATCH = 256, 4
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
    "elastic, full more often": {"sampler": "weighted", "sampling_weights": [3, 1]},  # the full row, every other one
}
FAMILIES |= dict.fromkeys(RECIPES, "repaired slices")
ROUTERS = {"routed": "elastic, uniform"}
SINGLES = {
    "singles": "repaired slices", "singles, tokens": "repaired slices", "depth, singles": "depth",
    "magnitude, singles": "magnitude", "lora, singles": "repaired slices",
}  # fmt: skip
LORA = {  # lines whose weights are frozen, and the adapter that learns: as LLM-Pruner (arXiv 2305.11627) recovers
    "lora, singles": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
}
PLAN = Plan(
    length=LENGTH,
    parents=("parent", "int8", "int4"),
    starts=STARTS,
    families=FAMILIES,
    recipes=RECIPES,
    singles=SINGLES,
    routers=ROUTERS,
    adapters=LORA,
    compared=(
        *(("elastic", rival) for rival in (*SINGLES, "control")),
        *((line, "elastic") for line in FAMILIES if line != "elastic"),
        *ROUTERS.items(),
    ),
    hidden=("sizes by layer",),
)
