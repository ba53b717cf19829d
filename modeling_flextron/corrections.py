"""Corrections: low-rank terms and norms that a row of the frontier owns beside the weights that all sizes share.

The inputs that a slice of a projection keeps can do in part what the missing ones did: `(W[:, :k] + U V) h[:k]`, with
two thin matrices. A row that has such corrections is their `Owner`; the full network has none.

A sub-network runs with the corrections of the first owner that contains it (owners are listed smallest first), cut to
its size like any weight. What is loaded, extracted or exported at a size has them folded in: it is an ordinary dense
network. Owners inside of it get the difference to it, so that every size is the same function however it was loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import invalid
from .subnetwork import Shape, SubNetwork, is_routed

# And their corrections, whose names no pattern of PEFT for the projections matches.
PROJECTIONS = {"o_proj": "o_correction", "down_proj": "down_correction"}
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Owner:
    """A sub-network with corrections of its own.

    Args:
        name: Of the row.
        subnetwork: Its sizes.
        ranks: Projection -> rank of its correction in each kept layer; 0 for none.
    """

    name: str
    subnetwork: SubNetwork
    ranks: Mapping[str, tuple[int, ...]]

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any], subnetwork: SubNetwork) -> "Owner":
        """Read the form in `config.json`, with the sub-network that it names."""
        return cls(entry["name"], subnetwork, {name: tuple(entry[name]) for name in PROJECTIONS})

    def to_dict(self) -> dict[str, Any]:
        """The form in `config.json`."""
        return {
            "name": self.name,
            "subnetwork": self.subnetwork.to_dict(),
            **{projection: list(ranks) for projection, ranks in self.ranks.items()},
        }

    def parameters(self, shape: Shape) -> int:
        """Count the numbers that it owns in a model of this shape: norms, and two thin matrices for each rank."""
        sizes, norm = self.subnetwork, self.subnetwork.hidden * (2 if shape.norm_type == "layer" else 1)
        inputs = {"o_proj": [heads * shape.head_dim for heads in sizes.heads], "down_proj": sizes.mlp}
        thin = sum(
            rank * (sizes.hidden + read)
            for projection, ranks in self.ranks.items()
            for rank, read in zip(ranks, inputs[projection], strict=True)
        )
        return thin + norm * (len(NORMS) * len(sizes.layers) + 1)

    def within(self, outer: SubNetwork, beside: "Owner | None") -> "Owner":
        """This owner as a model that holds only `outer` has it, with the corrections of `beside` folded in."""
        common = self.subnetwork.intersection(outer)
        ranks = {}
        for projection, own in self.ranks.items():
            at = dict(zip(self.subnetwork.layers, own, strict=True))
            more = {} if beside is None else dict(zip(beside.subnetwork.layers, beside.ranks[projection], strict=True))
            ranks[projection] = tuple(at[layer] + more.get(layer, 0) for layer in common.layers)
        return Owner(self.name, common.within(outer), ranks)


def number_of_owner(owners: Sequence[Owner], subnetwork: SubNetwork) -> str | None:
    """The owner whose corrections a sub-network runs with, by its place; None for the shared weights alone.

    Tokens that choose their sizes share one set of weights.
    """
    if is_routed(subnetwork):
        return None
    return next((str(number) for number, owner in enumerate(owners) if owner.subnetwork.contains(subnetwork)), None)


def owners_within(owners: Sequence[Owner], subnetwork: SubNetwork) -> list[Owner]:
    """The owners in a model that is loaded at a size, into whose weights the corrections of that size are folded."""
    folded_in = number_of_owner(owners, subnetwork)
    beside, inner = (None, owners) if folded_in is None else (owners[int(folded_in)], owners[: int(folded_in)])
    return [owner.within(subnetwork, beside) for owner in inner]


def parameters_beside(shape: Shape, owners: Sequence[Owner], subnetwork: SubNetwork) -> int:
    """Count what a model that is loaded at a size holds beside its dense network: what smaller sizes own in it.

    With `count_parameters` of the size that is `num_parameters()` of what is loaded; nothing of it is extracted.
    """
    return sum(owner.parameters(shape) for owner in owners_within(owners, subnetwork))


def owner_number(name: str) -> str | None:
    """The place of the owner whose tensor has this name; None for a shared tensor."""
    _, _, owned = name.partition("corrections.")
    return owned.partition(".")[0] or None


def owned_names(name: str, number: str) -> list[str]:
    """The tensors of an owner that take the place of a shared norm, or that correct a shared projection.

    Args:
        name: Of a shared tensor.
        number: Place of the owner.

    Returns:
        The name of its own norm; those of the matrices U and V; or nothing, where a tensor is as it is for all.
    """
    *place, module, kind = name.split(".")
    if module in (*NORMS, "norm"):
        return [".".join((*place, "corrections", number, module, kind))]
    if module in PROJECTIONS and kind == "weight":
        return [".".join((*place[:-1], "corrections", number, PROJECTIONS[module], part)) for part in ("up", "down")]
    return []


def folded(weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The leading part of a weight that a correction is for, `[up rows, down columns]`, with the correction in it."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    leading = weight[: up.shape[0], : down.shape[1]].to(wide)
    return torch.addmm(leading, up.to(wide), down.to(wide)).to(weight.dtype)


def check_corrections(entries: Any, layers: Callable[[Any], int]) -> None:
    """Refuse what is no list of owners in a config; `layers` counts those that an owner's sizes keep."""
    names = ("name", "subnetwork", *PROJECTIONS)
    remedy = "Leave them as `convert` wrote them, or pass None for none."
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and set(entry) == {*names} for entry in entries
    ):
        raise invalid("corrections", entries, f"It is a list of dicts with {', '.join(names)}.", remedy)
    for number, entry in enumerate(entries):
        at = f"corrections[{number}]"
        if not isinstance(entry["name"], str) or not isinstance(entry["subnetwork"], dict):
            raise invalid(at, entry, "It has the name of a row and its sizes.", remedy)
        depth = layers(entry["subnetwork"])
        for projection in PROJECTIONS:
            ranks = entry[projection]
            if not isinstance(ranks, list) or len(ranks) != depth or any(type(r) is not int or r < 0 for r in ranks):
                rule = f"It is the rank in each of the {depth} kept layers, 0 for none."
                raise invalid(f"{at}[{projection!r}]", ranks, rule, remedy)
