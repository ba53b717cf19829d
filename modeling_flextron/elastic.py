"""Layers that run on the leading slice of their own weights.

Each layer reads how much of its input it got from the input itself, and is told how much output to make; called
with neither narrowed it is the stock layer. A slice is a view: nothing is copied, gradients land in the full
parameter, and a product of the small size is all that is computed: with the selector `I_d` of the first d
neurons, `MLP_d(X) = sigma(X (I_d W1)^T) (I_d W2)` (Flextron, arXiv 2406.10260; written out for every axis in Nemotron
Elastic, arXiv 2511.16664, equations 34-46).

At its built size a layer is called as `layer(x)` alone (`project` does that), so that PEFT, torchao, vLLM and
others may put their own layers in these places; LoRA layers of PEFT run at every size (`adapters.py`). Nothing
outside a layer reads its `weight`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .adapters import add_adapters, check_sliceable, is_narrowed, peft_layers
from .errors import invalid


def entries(vector: torch.Tensor, size: int) -> torch.Tensor:
    """The leading entries; a view, which costs microseconds at batch 1, only where there are more."""
    return vector if vector.shape[0] == size else vector[:size]


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
        if out_features is None and input.shape[-1] == self.in_features:
            return F.linear(input, self.weight, self.bias)
        weight, bias = self.leading(input.shape[-1], out_features)
        return F.linear(input, weight, bias)

    def leading(self, in_features: int, out_features: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Views of the weight and bias that a product of these sizes uses.

        Raises:
            ValueError: the weight is quantized in groups that end elsewhere.
        """
        bias = self.bias
        try:
            if in_features == self.in_features:  # one index where one is enough: at batch 1 a view costs microseconds
                weight = self.weight[:out_features]
            else:
                weight = self.weight[:out_features, :in_features]
        except (AssertionError, NotImplementedError) as error:  # what torchao raises
            size = (out_features or self.out_features, in_features)
            rule = f"This quantized weight of {tuple(self.weight.shape)} has no such leading part ({error})."
            remedy = "Use int8 weights, or groups that divide every size, or load the model at this budget."
            raise invalid("flextron_budget", size, rule, remedy) from error
        return weight, bias if bias is None else bias[:out_features]

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

        `gate` `[h]` says which channels there are, with 1 and 0: the norm is over those.
        """
        size = hidden_states.shape[-1]
        if gate is not None:
            states = hidden_states.float()
            mean_square = (states * gate).square().sum(-1, keepdim=True) / gate.sum()
            result = self.weight[:size] * (states * (mean_square + self.eps).rsqrt())
            return (result * gate).to(hidden_states.dtype)
        normalised = F.rms_norm(hidden_states.float(), (size,), eps=self.eps)
        return entries(self.weight, size) * normalised.to(hidden_states.dtype)

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
        return F.layer_norm(input, (size,), entries(self.weight, size), entries(self.bias, size), self.eps)


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
