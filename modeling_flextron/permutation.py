"""Where every unit of an elastic model was in its parent.

Conversion sorts neurons, heads and hidden channels by importance. What was made for the parent, such as an adapter, is
in the parent's order, and fits the elastic model after the same sort:

    ours = permutation.to_ours(theirs, ("mlp", "hidden"), layer)
    theirs = permutation.to_parent(ours, ("mlp", "hidden"), layer)  # the units that are there

It lies in a small file beside the weights. A model that is a part of another has the part that it needs.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file, logging

from .errors import invalid
from .families import head_rows, stored_heads
from .subnetwork import SubNetwork

logger = logging.get_logger(__name__)
# In a folder of its own: some engines read every safetensors file beside a config as weights.
FILE = "parent/permutation.safetensors"
PARTS = ("mlp", "heads", "kv_heads")
ROTATED = "rotated-"  # begins the `conversion` of a model whose residual stream was rotated as well


@dataclass(frozen=True, eq=False)
class Permutation:
    """For every unit of a model its number in the parent, in the order in which the model stores them.

    Args:
        hidden: `[D]` int64, channels.
        mlp, heads, kv_heads: For each layer `[F]`, `[H]` and `[G]` int64: neurons, query heads and KV heads.
        layers: For each layer its number in the parent.
        sizes: Of the parent: how many units it has, or has in a layer, by the names above.
        head_dim: Channels of a head.
        conversion: A text that all models of one conversion share, whatever their size; by default made of the rest.
    """

    hidden: torch.Tensor
    mlp: tuple[torch.Tensor, ...]
    heads: tuple[torch.Tensor, ...]
    kv_heads: tuple[torch.Tensor, ...]
    layers: tuple[int, ...]
    sizes: dict[str, int]
    head_dim: int
    conversion: str = ""

    def __post_init__(self):
        if not self.conversion:
            digest = hashlib.sha256()
            for name, tensor in self._tensors().items():
                digest.update(name.encode() + tensor.numpy().tobytes())
            object.__setattr__(self, "conversion", digest.hexdigest()[:16])

    def __deepcopy__(self, memo: dict) -> "Permutation":
        return self  # a value

    @classmethod
    def unsorted(cls, config: Any) -> "Permutation":
        """That of a model whose units are where the parent has them, but for the query heads of groups."""
        built = config.built
        kv_heads = [config.kv_heads(heads) for heads in built.heads]
        return cls(
            hidden=counted(built.hidden),
            mlp=tuple(map(counted, built.mlp)),
            heads=tuple(torch.tensor(stored_heads(*h), device="cpu") for h in zip(built.heads, kv_heads, strict=True)),
            kv_heads=tuple(map(counted, kv_heads)),
            layers=built.layers,
            sizes={
                "hidden": built.hidden,
                "mlp": max(built.mlp),
                "heads": max(built.heads),
                "kv_heads": max(kv_heads),
                "layers": len(built.layers),
            },
            head_dim=config.head_dim,
        )

    # ------------------------------------------------------------------------------------------- reading

    def indices(self, dims: Sequence[str], layer: int | None = None) -> tuple[torch.Tensor | None, ...]:
        """For each dimension the entries of the parent's tensor that ours has, in our order.

        Args:
            dims: What each dimension counts: the axes of `families.axes`; None comes out for any other name.
            layer: Of this model, for axes that a layer has.
        """
        orders = {"hidden": self.hidden}
        if layer is not None:
            orders["mlp"] = self.mlp[layer]
            for axis in {"heads", "kv_heads"} & set(dims):
                orders[axis] = head_rows(getattr(self, axis)[layer], self.head_dim)
        return tuple(orders.get(axis) for axis in dims)

    def to_ours(self, tensor: torch.Tensor, dims: Sequence[str], layer: int | None = None) -> torch.Tensor:
        """Put a tensor of the parent, as `families.from_stock` shows it, into our order and cut it to our size.

        `dims` names its dimensions, as in `indices`.
        """
        return reordered(tensor, self.indices(dims, layer))

    def to_parent(self, tensor: torch.Tensor, dims: Sequence[str], layer: int | None = None) -> torch.Tensor:
        """Cut a tensor of ours to the units of this permutation, in the order in which the parent has them."""
        return reordered(tensor, [index if index is None else index.argsort() for index in self.indices(dims, layer)])

    @property
    def moved(self) -> set[str]:
        """The axes along which the order is another one than in the parent."""
        orders = {"hidden": (self.hidden,), **{part: getattr(self, part) for part in PARTS}}
        return {axis for axis, found in orders.items() if not all(map(in_place, found))}

    def parent_size(self, axis: str) -> int:
        """Entries of a tensor of the parent along an axis."""
        return self.sizes[axis] * (self.head_dim if axis in ("heads", "kv_heads") else 1)

    # ------------------------------------------------------------------------------------------- deriving

    @property
    def rotated(self) -> bool:
        """Whether no channel is one of the parent's."""
        return self.conversion.startswith(ROTATED)

    def narrowed(self, subnetwork: SubNetwork) -> "Permutation":
        """That of a model which holds only `subnetwork`, a part of this one."""

        def leading(orders: tuple[torch.Tensor, ...], sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
            return tuple(orders[layer][:size] for layer, size in zip(subnetwork.layers, sizes, strict=True))

        return replace(
            self,
            hidden=self.hidden[: subnetwork.hidden],
            mlp=leading(self.mlp, subnetwork.mlp),
            heads=leading(self.heads, subnetwork.heads),
            kv_heads=leading(self.kv_heads, subnetwork.heads),  # those of groups are no more than that, and all stay
            layers=tuple(self.layers[layer] for layer in subnetwork.layers),
        )

    # ---------------------------------------------------------------------------------------------- files

    def _tensors(self) -> dict[str, torch.Tensor]:
        every = {f"layers.{i}.{part}": o for part in PARTS for i, o in enumerate(getattr(self, part))}
        return {"hidden": self.hidden, "layers": torch.tensor(self.layers, device="cpu"), **every}

    def save(self, path: str | os.PathLike) -> None:
        """Write it as safetensors."""
        dtype = torch.int16 if max(self.sizes.values()) < 2**15 else torch.int32
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in self._tensors().items()}
        os.makedirs(os.path.dirname(path), exist_ok=True)
        about = json.dumps({"conversion": self.conversion, "sizes": self.sizes})  # several names would have no order
        save_file(tensors, path, metadata={"permutation": about})

    @classmethod
    def load(cls, path: str | os.PathLike, head_dim: int) -> "Permutation":
        """Read what `save` wrote.

        Raises:
            ValueError: it is no such file, or not all of it.
        """
        try:
            with safe_open(path, framework="pt") as file:
                names, about = file.keys(), json.loads((file.metadata() or {})["permutation"])
                found = {name: file.get_tensor(name).long() for name in names}
            layers = found["layers"].tolist()
            orders = {part: tuple(found[f"layers.{i}.{part}"] for i in range(len(layers))) for part in PARTS}
            if any(order.min() < 0 or len(order.unique()) != len(order) for order in found.values()):
                raise ValueError("a number is there twice")
            sizes, conversion = about["sizes"], about["conversion"]
            if any(order.max() >= sizes[name.split(".")[-1]] for name, order in found.items()):
                raise ValueError("the parent has no such unit")
        except Exception as error:  # safetensors raises a bare exception class of its own
            rule = f"It is no complete permutation ({type(error).__name__}: {error})."
            raise invalid("permutation", str(path), rule, "Download or save the model again.") from error
        return cls(
            found["hidden"], **orders, layers=tuple(layers), sizes=sizes, head_dim=head_dim, conversion=conversion
        )

    def fits(self, config: Any) -> bool:
        """Whether it has the sizes of a config, and is of the conversion that this names."""
        sizes, expected = (
            [(name, len(order)) for name, order in each._tensors().items()]
            for each in (self, Permutation.unsorted(config))
        )
        return sizes == expected and self.conversion == config.permutation


def counted(size: int) -> torch.Tensor:
    """0, 1, 2, ... on the CPU, whatever the default device is."""
    return torch.arange(size, device="cpu")


def in_place(index: torch.Tensor) -> bool:
    """Whether an index takes leading entries in their order."""
    return torch.equal(index, counted(len(index)))


def reordered(tensor: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The entries `indices` of every dimension of a tensor, None for all of them; a view where none change places."""
    moving: dict[int, torch.Tensor] = {}
    for dim, index in enumerate(indices):
        if index is None:
            continue
        if not in_place(index):
            moving[dim] = index.to(tensor.device)
        elif len(index) != tensor.shape[dim]:
            tensor = tensor.narrow(dim, 0, len(index))
    if len(moving) == tensor.ndim == 2:
        return tensor[moving[0][:, None], moving[1]]  # in one step, without a tensor in between
    for dim, index in moving.items():
        tensor = tensor.index_select(dim, index)
    return tensor


def read_permutation(model: Any, source: Any, **hub: Any) -> Permutation | None:
    """Read the permutation beside a model's weights, from a folder or Hub id, with keywords `hub` of `cached_file`.

    None where there is none; the log says why a bad one is left out.
    """
    if model.config.permutation is None:
        return None
    try:
        path = cached_file(source, FILE, **hub)
        assert path is not None  # it raises instead
        found = Permutation.load(path, model.config.head_dim)
        if len(found.layers) == model.stored_depth:
            part = found if model.stored is None else found.narrowed(model.stored)
            if part.fits(model.config):
                return part
        rule = f"It is of another model than `config.json` (permutation={model.config.permutation!r})."
        raise invalid("permutation", path, rule, "Download or save the model again.")
    except (OSError, ValueError) as error:
        logger.warning(f"Adapters of the parent will be refused: {error}")
        return None
