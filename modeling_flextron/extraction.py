"""A sub-network as a stock model of the parent's family: what the class can hold, and the copy.

Where sizes do not fit, zeros can fill them up: a neuron or a head whose weights are zero reads and writes nothing, so
the function stays the same.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.utils import logging

from .adapters import refuse_adapters
from .corrections import folded, number_of_owner, owned_names
from .errors import invalid
from .families import axes, by_stock_name, family_of, is_shared, layer_of, stock_name, to_stock
from .permutation import Permutation
from .subnetwork import SubNetwork, axis_sizes, is_routed, parameters_of, uniform_subnetworks
from .switching import divided_parameters

logger = logging.get_logger(__name__)


def misfit(config, subnetwork: SubNetwork) -> str | None:
    """The rule of the stock class that a sub-network breaks, or None when the class can hold it."""
    family, kind = family_of(config.base_model_type), config.base_model_type
    if not subnetwork.uniform:
        return f"`{kind}` has the same sizes in every layer."
    hidden, heads = subnetwork.hidden, subnetwork.heads[0]
    if not family.own_head_dim and hidden != heads * config.head_dim:
        return f"`{kind}` has hidden / {config.head_dim} heads, which makes {hidden / config.head_dim:g} for {hidden}."
    if family.heads_divide_hidden and hidden % heads:
        return f"`{kind}` refuses a hidden size that its head count ({heads}) does not divide."
    return None


def padded(config, subnetwork: SubNetwork) -> SubNetwork | None:
    """The smallest sizes of a stock model that can hold a sub-network beside zeros; None when there are none."""
    family = family_of(config.base_model_type)
    most, unit = max(subnetwork.heads), config.kv_heads(1)  # an MHA model has as many KV heads as query heads: 1
    largest = subnetwork.hidden if family.heads_divide_hidden else max(most, subnetwork.hidden // config.head_dim)
    for heads in range(most, largest + 1):
        depth = len(subnetwork.layers)
        uniform = SubNetwork(subnetwork.hidden, subnetwork.layers, (max(subnetwork.mlp),) * depth, (heads,) * depth)
        if heads % unit == 0 and misfit(config, uniform) is None:
            return uniform
    return None


def fitting(config) -> list[SubNetwork]:
    """The uniform sub-networks in memory that the stock class can hold as they are."""
    return [s for s in uniform_subnetworks(config) if config.built.contains(s) and misfit(config, s) is None]


def stock_sizes(config, subnetwork: SubNetwork, pad: bool = False, snap: bool = False) -> SubNetwork:
    """The sizes of the stock model that takes the place of a sub-network: its own, where the class can hold them.

    Else with `pad` larger ones, for the same function beside zeros; with `snap` the largest ones of a sub-network that
    has no more parameters.

    Raises:
        ValueError: the stock class cannot hold it, or what is to take its place.
    """
    if pad and snap:
        both = "One fills sizes up, the other takes smaller ones."
        raise invalid("pad, snap", (pad, snap), both, "Pass one of them.")
    rule = misfit(config, subnetwork)
    if rule is None:
        return subnetwork
    size, legal, larger = parameters_of(config), fitting(config), padded(config, subnetwork)
    own = size(subnetwork)
    smaller = max((s for s in legal if size(s) <= own), key=size, default=None)
    if pad and larger is not None:
        return larger
    if snap and smaller is not None:
        return smaller
    nearest = min(legal, key=lambda s: abs(size(s) - own), default=None)
    nearest_fit = nearest and f"The nearest sub-network that fits is {nearest.to_dict()}."
    remedies = [nearest_fit or "Load more of the checkpoint."]
    if larger is not None:
        remedies.append(f"With `pad=True` (`--pad`) zeros fill these sizes up to {size(larger):,} parameters.")
    if smaller is not None:
        what = f"the largest that fits and costs no more, {size(smaller):,} parameters"
        remedies.append(f"`snap=True` (`--snap`) takes {what}.")
    raise invalid("budget", subnetwork.to_dict(), rule, " ".join(remedies))


def changes(asked: SubNetwork, given: SubNetwork) -> str:
    """Say how two sub-networks differ: `heads 6 -> 4, mlp [96, 48] -> 48`; empty when they do not."""
    before, after = asked.to_dict(), given.to_dict()
    return ", ".join(f"{key} {before[key]} -> {after[key]}" for key in before if before[key] != after[key])


def stock_config(config, sizes: SubNetwork) -> PreTrainedConfig:
    """The config of a stock model of these (uniform) sizes, with the layers of `sizes.layers`."""
    family = family_of(config.base_model_type)
    heads = sizes.heads[0]
    shape = {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.mlp[0],
        "num_hidden_layers": len(sizes.layers),
        "num_attention_heads": heads,
        "num_key_value_heads": config.kv_heads(heads),
        "layer_types": [config.layer_types[layer] for layer in sizes.layers],
    }
    values = {
        theirs: shape[ours] if ours in shape else copy.deepcopy(getattr(config, ours))
        for ours, theirs in family.fields.items()
    }
    if "layer_types" in family.fields:
        values["use_sliding_window"] = config.sliding_window is not None
    return AutoConfig.for_model(config.base_model_type, **values, dtype=config.dtype)


@torch.no_grad()
def stock_tensors(model, subnetwork: SubNetwork, target: SubNetwork) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a sub-network as the stock family names and arranges them, copied one by one.

    The units that it has are in the parent's order, so that at full size they are the parent's tensors.

    Args:
        model: A `FlextronForCausalLM`.
        subnetwork: What to copy.
        target: Sizes to fill up with zeros; the layers may differ.

    Yields:
        Name and tensor; a tied output head is left out.
    """
    config, family = model.config, family_of(model.config.base_model_type)
    position: dict[int | None, int] = {layer: i for i, layer in enumerate(subnetwork.layers)}
    device = _device(model)
    names = [name for name in model.state_dict() if layer_of(name) in (None, *position) and is_shared(name)]
    if config.tie_word_embeddings:
        names.remove("lm_head.weight")

    state = model.state_dict()

    def read(name: str) -> torch.Tensor:
        return (load_offloaded_parameter(model, name) if state[name].is_meta else state[name]).to(device)

    owner = number_of_owner(model.base_model.owners, subnetwork)
    order = (model.permutation or Permutation.unsorted(config)).narrowed(subnetwork)
    groups = config.kv_heads(1)  # of heads that lie together; 1 where every head has a KV head of its own
    for group in by_stock_name(family, names).values():
        at = position.get(layer_of(group[0]), 0)
        used, size = axis_sizes(config, subnetwork, at), axis_sizes(config, target, at)
        parts = []
        for name in group:
            tensor = read(name)
            if owner is not None and (own := [part for part in owned_names(name, owner) if part in state]):
                tensor = read(own[0]) if len(own) == 1 else folded(tensor, *map(read, own))
            tensor = order.to_parent(tensor, axes(name), at)
            for dim, axis in enumerate(axes(name)):
                if axis in used:
                    tensor = _zeros_behind(tensor, dim, size[axis] - used[axis], groups if axis == "heads" else 1)
            parts.append(tensor)
        name = stock_name(family, group[0], position.get(layer_of(group[0])))
        yield name, to_stock(family, name, parts, target.heads[at])


def _device(model) -> torch.device:
    return torch.device("cpu") if model.device.type == "meta" else model.device  # meta: all of it is on disk


def _zeros_behind(tensor: torch.Tensor, dim: int, count: int, groups: int) -> torch.Tensor:
    """Put `count` zeros along a dimension, an equal part behind each of its groups."""
    if count == 0:
        return tensor
    tensor = tensor.unflatten(dim, (groups, -1))
    shape = list(tensor.shape)
    shape[dim + 1] = count // groups
    return torch.cat((tensor, tensor.new_zeros(shape)), dim + 1).flatten(dim, dim + 1)


class ExtractionMixin(PreTrainedModel):
    """`extract` of a causal model that runs at budgets."""

    @torch.no_grad()
    def extract(self, budget: Any = None, pad: bool = False, snap: bool = False) -> PreTrainedModel:
        """Copy a sub-network into a stock model of the parent's family, such as `LlamaForCausalLM`.

        Args:
            budget: What to copy; None for the current default.
            pad: Where the stock class cannot hold these sizes, fill them up with zeros to the next ones that it
                can: the same function, with more parameters.
            snap: Where it cannot, copy the largest sub-network that it can hold and that costs no more, and say so.

        Returns:
            The stock model in the dtype and on the device of this one, in evaluation mode.

        Raises:
            ValueError: the stock class cannot hold these sizes, for instance when layers differ.
        """
        refuse_adapters(self, "budget", budget, "Merge them first: `model.merge_and_unload().extract(...)`.")
        if divided_parameters(self):
            remedy = "`save_pretrained` on all of them, load that folder in one process, and extract there."
            raise invalid("budget", budget, "The weights are divided among processes.", remedy)
        subnetwork = self.resolve_budget(budget)
        if is_routed(subnetwork):
            rule = "Stock classes have one size for all tokens."
            raise invalid("budget", f"auto:{subnetwork.target}", rule, "Name a static budget, such as 0.5.")
        target = stock_sizes(self.config, subnetwork, pad, snap)
        if snap and target != subnetwork:
            logger.warning(f"Snapped to what the stock class can hold: {changes(subnetwork, target)}.")
            subnetwork = target
        with no_init_weights():
            config = stock_config(self.config, target)
            stock = AutoModelForCausalLM.from_config(config, dtype=self.dtype, trust_remote_code=False)
        tensors = dict(stock_tensors(self, subnetwork, target))
        missing, unexpected = stock.load_state_dict(tensors, strict=False, assign=True)
        stock.tie_weights()
        assert not unexpected and all(name in stock._tied_weights_keys for name in missing), (missing, unexpected)
        if self.can_generate():
            stock.generation_config = copy.deepcopy(self.generation_config)
        return stock.to(_device(self)).eval()
