"""Layers that run on the leading slice of their own weights.

A layer sees by its input how much of that there is, and is told how much output to make. A slice is a view: nothing
is copied, gradients land in the full parameter, and only the small product is computed: with the selector `I_d` of the
first d neurons, `MLP_d(X) = sigma(X (I_d W1)^T) (I_d W2)` (Flextron, arXiv 2406.10260; for every axis in Nemotron
Elastic, arXiv 2511.16664, equations 34-46).

At its built size a layer is called as `layer(x)` alone (`project` does that), so that PEFT, torchao, vLLM and
others may put their own layers in these places; LoRA layers of PEFT run at every size (`adapters.py`). Nothing
outside a layer reads its `weight`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .adapters import add_adapters, check_sliceable, is_narrowed, peft_layers
from .corrections import NORMS, PROJECTIONS, Owner
from .errors import invalid
from .subnetwork import Shape


def parameter(module: nn.Module, name: str) -> Any:
    """`getattr(module, name)` of a parameter, in a tenth of the time: `nn.Module` looks there last, in Python.

    Nothing is kept: what replaces, moves or casts a parameter is seen by the next call.
    """
    try:
        return module._parameters[name]
    except KeyError:  # a parametrized or flattened one
        return getattr(module, name)


def corner(tensor: torch.Tensor, *sizes: int) -> torch.Tensor:
    """The leading entries along each dimension, as a view; making one costs microseconds, which counts at batch 1."""
    if type(tensor) is nn.Parameter and not torch.is_grad_enabled():
        return torch.as_strided(tensor, sizes, tensor.stride())  # the same in less than half of the time
    return tensor[tuple(map(slice, sizes))]


def leading_entries(vector: torch.Tensor, size: int) -> torch.Tensor:
    """The leading entries; a view only where there are more."""
    return vector if vector.shape[0] == size else corner(vector, size)


class ElasticLinear(nn.Linear):
    """`nn.Linear` on the leading rows and columns of its weight."""

    def forward(
        self,
        input: torch.Tensor,
        out_features: int | None = None,
        block: tuple[slice, slice] | None = None,
        total: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map `[..., i]` to `[..., out_features]` with `weight[:out_features, :i]`.

        Args:
            input: Shape `[..., i]` with `i <= in_features`; a narrower input uses the leading columns.
            out_features: Leading rows to use; None for all.
            block: Use these rows and columns instead of leading ones.
            total: Add the product with a block to these rows `[n, out_features]`, in place, and return them.
        """
        if block is not None:
            return self.block(input, *block, total)
        columns = input.shape[-1]
        if out_features is None and columns == self.in_features:
            return F.linear(input, parameter(self, "weight"), parameter(self, "bias"))
        weight, bias = self.leading(columns, out_features)
        return F.linear(input, weight, bias)

    def leading(self, in_features: int, out_features: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Views of the weight and bias that a product of these sizes uses.

        Raises:
            ValueError: the weight is quantized in groups that end elsewhere.
        """
        weight, bias = parameter(self, "weight"), parameter(self, "bias")
        rows = out_features or self.out_features
        try:
            weight = corner(weight, rows, in_features)
        except (AssertionError, NotImplementedError) as error:  # what torchao raises
            rule = f"This quantized weight of {tuple(weight.shape)} has no such leading part ({error})."
            remedy = "Use int8 weights, or groups that divide every size, or load the model at this budget."
            raise invalid("flextron_budget", (rows, in_features), rule, remedy) from error
        return weight, bias if bias is None else corner(bias, rows)

    def block(
        self, input: torch.Tensor, rows: slice, columns: slice, total: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map `[..., columns]` to `[..., rows]` with a block of the weight; the bias counts where columns begin."""
        weight = self.weight[rows, columns]
        if total is not None and columns.start:
            # One pass over the rows instead of three. Autocast leaves a product in place alone.
            return total.addmm_(input.to(total.dtype), weight.t().to(total.dtype))
        bias = self.bias if not columns.start else None
        product = F.linear(input, weight, bias if bias is None else bias[rows])
        return product if total is None else total.add_(product)


class ElasticEmbedding(nn.Embedding):
    """`nn.Embedding` on the leading columns of its weight."""

    def forward(self, input: torch.Tensor, embedding_dim: int | None = None) -> torch.Tensor:
        """Map ids `[...]` to `[..., embedding_dim]`; None for the full width."""
        weight = self.weight if embedding_dim is None else self.weight[:, :embedding_dim]
        return F.embedding(input, weight, self.padding_idx)


class ElasticRMSNorm(nn.Module):
    """RMS norm over the channels that its input has."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise `[..., h]` in float32 and scale it with the leading `h` weights.

        `gate` `[h]` says which channels there are, with 1 and 0: the norm is over those. It is here because FSDP
        gathers the weights of a module for its forward pass alone.
        """
        size = hidden_states.shape[-1]
        if gate is not None:
            states = hidden_states.float()
            mean_square = (states * gate).square().sum(-1, keepdim=True) / gate.sum()
            result = self.weight[:size] * (states * (mean_square + self.eps).rsqrt())
            return (result * gate).to(hidden_states.dtype)
        weight, dtype = leading_entries(parameter(self, "weight"), size), hidden_states.dtype
        if dtype == weight.dtype == torch.float32:  # the same in one step
            return F.rms_norm(hidden_states, (size,), weight, self.eps)
        return weight * F.rms_norm(hidden_states.float(), (size,), eps=self.eps).to(dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class ElasticLayerNorm(nn.LayerNorm):
    """Layer norm over the channels that its input has."""

    def forward(self, input: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise `[..., h]` and apply the leading `h` weights and biases; `gate` as in `ElasticRMSNorm`."""
        size = input.shape[-1]
        if gate is not None:
            states, count = input.float(), gate.sum()
            centred = states - (states * gate).sum(-1, keepdim=True) / count
            variance = (centred.square() * gate).sum(-1, keepdim=True) / count
            result = self.weight[:size] * (centred * (variance + self.eps).rsqrt()) + self.bias[:size]
            return (result * gate).to(input.dtype)
        weight, bias = parameter(self, "weight"), parameter(self, "bias")
        return F.layer_norm(input, (size,), leading_entries(weight, size), leading_entries(bias, size), self.eps)


def norm_between_layers(config: Shape, size: int | None = None) -> nn.Module:
    """Make the norm that a model has between its layers, over `size` channels; None for all of them."""
    kind = {"rms": ElasticRMSNorm, "layer": ElasticLayerNorm}[config.norm_type]
    return kind(config.hidden_size if size is None else size, config.norm_eps)


class LowRankCorrection(nn.Module):
    """`U V` beside a projection, on leading channels; nothing at first, as U is zero.

    Attributes:
        down: V, `[rank, in_features]`.
        up: U, `[out_features, rank]`.
    """

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, in_features) / in_features**0.5)
        self.up = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, input: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Add to `output` `[..., o]` of the projection what is corrected for its `input` `[..., i]`."""
        down, up = parameter(self, "down"), parameter(self, "up")
        if input.shape[-1] != down.shape[1]:  # a view costs microseconds at batch 1
            down = down[:, : input.shape[-1]]
        if output.shape[-1] != up.shape[0]:
            up = up[: output.shape[-1]]
        return F.linear(F.linear(input, down), up).add_(output)


class LayerCorrections(nn.Module):
    """The norms of an owner in a layer that it keeps, and its correction of each projection, or None."""

    def __init__(self, config: Shape, owner: Owner, layer: int):
        super().__init__()
        subnetwork = owner.subnetwork
        at, hidden = subnetwork.layers.index(layer), subnetwork.hidden
        inputs = {"o_proj": subnetwork.heads[at] * config.head_dim, "down_proj": subnetwork.mlp[at]}
        for name in NORMS:
            setattr(self, name, norm_between_layers(config, hidden))
        for name, correction in PROJECTIONS.items():
            rank = owner.ranks[name][at]
            setattr(self, correction, LowRankCorrection(inputs[name], hidden, rank) if rank else None)


def corrections_of_layer(config: Shape, owners: Sequence[Owner], layer: int) -> nn.ModuleDict:
    """Make the corrections of the owners that keep a layer: place of the owner -> `LayerCorrections`."""
    held = {str(number): owner for number, owner in enumerate(owners) if layer in owner.subnetwork.layers}
    return nn.ModuleDict({number: LayerCorrections(config, owner, layer) for number, owner in held.items()})


class NarrowedAttention:
    """An attention module as an attention function sees it, with fewer query heads for each KV head.

    The functions of transformers read `num_key_value_groups` from the module; a view keeps that number out of the
    module's own state, so that one model may run two budgets at the same time.
    """

    def __init__(self, module: nn.Module, num_key_value_groups: int):
        self.module = module
        self.num_key_value_groups = num_key_value_groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def project(layer: Any, input: torch.Tensor, size: int | None) -> torch.Tensor:
    """Call `layer` for `size` output features; None means its built size, and then any layer will do.

    Raises:
        ValueError: an adapter in the place of one of our layers does not run on fewer features.
    """
    if isinstance(layer, (ElasticLinear, ElasticEmbedding)) or not is_narrowed(layer, input, size):
        return layer(input) if size is None else layer(input, size)
    if isinstance(layer, peft_layers().copies):
        return layer(input, size) if size is not None else layer(input)
    check_sliceable(layer)
    output = layer.base_layer(input) if size is None else layer.base_layer(input, size)
    return add_adapters(layer, input, output, slice(size), slice(input.shape[-1]))


def project_block(
    layer: Any, input: torch.Tensor, rows: slice, columns: slice, total: torch.Tensor | None = None
) -> torch.Tensor:
    """Call `layer` with a block of its weight; see `ElasticLinear.forward`. Errors as in `project`."""
    if isinstance(layer, ElasticLinear):
        return layer(input, block=(rows, columns), total=total)
    check_sliceable(layer)
    output = layer.base_layer(input, block=(rows, columns), total=total)
    return add_adapters(layer, input, output, rows, columns, in_place=total is not None)
