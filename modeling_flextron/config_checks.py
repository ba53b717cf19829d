"""Checks a config's fields: pure functions of plain values, which name the field that is wrong and change nothing.

What belongs to one part is checked there: rows in `frontier.py`, routers in `static_router.py` and `token_routing.py`,
latency tables in `latency.py`, levels in `level_blocks.py`, corrections in `corrections.py`.
"""

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .errors import invalid, is_number, require_int
from .families import family_of
from .subnetwork import AXES, SubNetwork

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FLAGS = (
    "tie_word_embeddings", "attention_bias", "attention_output_bias", "qk_norm", "mlp_bias", "gated_mlp",
    "parallel_residual", "learned_positions", "padding_is_trained", "use_cache",
)  # fmt: skip
NUMBERS = ("norm_eps", "initializer_range", "attention_dropout", "residual_dropout", "embedding_dropout")
NORMS = ("rms", "layer")
KINDS = ("full_attention", "sliding_attention")
ELASTIC_FIELDS = (*AXES, "layer_ranking")
LICENSE_FIELDS = ("license", "license_name", "license_link")


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that follow from the sizes of a config where they are None, and themselves where they are not."""
    for name in SIZES:
        require_int(name, values[name])
    defaults = {
        "num_key_value_heads": values["num_attention_heads"],
        "head_dim": values["hidden_size"] // values["num_attention_heads"],
        "attention_output_bias": values["attention_bias"],
        "layer_types": ["full_attention"] * values["num_hidden_layers"],
        "latency_tables": {},
    }
    return {name: value if values[name] is None else values[name] for name, value in defaults.items()}


def check_dimensions(values: Mapping[str, Any]) -> None:
    """Refuse fields of the decoder that have the wrong type or contradict each other."""
    family_of(values["base_model_type"], "base_model_type")
    if not isinstance(activation := values["hidden_act"], str) or activation not in ACT2FN:
        raise invalid("hidden_act", activation, "transformers has no activation of this name.", "Pass 'silu'.")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ids = values[name]
        several = ids if isinstance(ids, list) and name == "eos_token_id" else [0 if ids is None else ids]
        if not all(type(token) is int for token in several):
            raise invalid(name, ids, "It is the number of a token.", "Pass an int, or None for no such token.")
    require_int("max_position_embeddings", values["max_position_embeddings"])
    _check_heads(values["num_attention_heads"], values["num_key_value_heads"])
    require_int("head_dim", values["head_dim"])
    if values["head_dim"] % 2 and not values["learned_positions"]:
        rule = "Rotary embeddings rotate pairs, so the size of a head must be even."
        raise invalid("head_dim", values["head_dim"], rule, "Pass an even `head_dim`.")
    if values["norm_type"] not in NORMS:
        raise invalid("norm_type", values["norm_type"], f"It is one of {', '.join(NORMS)}.", "Pick one of them.")
    _check_kinds(values["layer_types"], values["num_hidden_layers"], values["sliding_window"])
    for name in FLAGS:
        if not isinstance(values[name], bool):
            raise invalid(name, values[name], "It must be a bool.", "Pass True or False.")
    for name in NUMBERS:
        if not is_number(values[name]) or values[name] < 0:
            raise invalid(name, values[name], "It must be a finite number of at least 0.", "Pass a float.")


def _check_heads(heads: int, kv_heads: Any) -> None:
    require_int("num_key_value_heads", kv_heads)
    if heads % kv_heads:
        rule = f"Every KV head serves the same number of the {heads} query heads."
        raise invalid("num_key_value_heads", kv_heads, rule, "Pass a divisor of that number.")


def _check_kinds(kinds: Any, layers: int, window: Any) -> None:
    known = kinds if isinstance(kinds, list) else []
    if len(known) != layers or not set(known) <= set(KINDS):
        rule = f"It names the kind of each of the {layers} layers: {' or '.join(KINDS)}."
        raise invalid("layer_types", kinds, rule, "Pass None for full attention everywhere.")
    if "sliding_attention" in known:
        require_int("sliding_window", window)
    elif window is not None:
        rule = "No layer has sliding attention."
        raise invalid("sliding_window", window, rule, "Pass `layer_types` as well, or None.")


def check_rope(rope: Mapping[str, Any]) -> None:
    """Refuse rotary positions with impossible values; the base class checks the names of the fields."""
    kinds = ("default", *ROPE_INIT_FUNCTIONS)
    if rope["rope_type"] not in kinds:
        raise invalid("rope_parameters", rope, f"Its `rope_type` is one of {', '.join(kinds)}.", "Name one of them.")
    for key in ("rope_theta", "factor", "partial_rotary_factor"):
        value = rope.get(key, 1.0)
        if not is_number(value) or value <= 0:
            raise invalid(f"rope_parameters[{key!r}]", value, "It is a positive number.", "Pass that of the parent.")


def check_dtype(dtype: Any) -> None:
    """Refuse what is no floating-point dtype of torch, nor the name of one, nor None."""
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if named is not None and not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise invalid("dtype", dtype, "It is a floating-point dtype of torch.", "Pass 'float32', for instance.")


def full_elastic(given: Any, full: Mapping[str, int]) -> dict[str, list[int]]:
    """The allowed sizes with a list for every axis: the `full` size alone where nothing else is allowed."""
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise invalid("elastic", given, "It maps axes to lists of sizes.", "Pass a dict such as {'mlp': [8, 4]}.")
    for key in given:
        if key not in ELASTIC_FIELDS:
            rule = f"The fields of `elastic` are {', '.join(ELASTIC_FIELDS)}."
            raise invalid(f"elastic[{key!r}]", given[key], rule, "Remove or rename it.")
    return {axis: given.get(axis, [full[axis]]) for axis in AXES} | {"layer_ranking": given.get("layer_ranking", [])}


def check_elastic(
    elastic: Mapping[str, Any], built: SubNetwork, anchors: set[int], kv_heads: Callable[[int], int]
) -> None:
    """Refuse allowed sizes that are not those of what is built, or that drop `anchors`, the layers that always stay."""
    layers = len(built.layers)
    full = {"mlp": max(built.mlp), "heads": max(built.heads), "hidden": built.hidden, "depth": layers}
    for axis in AXES:
        _check_choices(f"elastic[{axis!r}]", elastic[axis], full[axis])
    for heads in elastic["heads"]:
        if heads % kv_heads(heads):
            rule = f"Every one of the {kv_heads(heads)} KV heads keeps the same number of query heads."
            raise invalid("elastic['heads']", heads, rule, "Use multiples of the number of KV heads.")
    for axis, sizes in (("mlp", built.mlp), ("heads", built.heads)):
        if missing := set(sizes) - set(elastic[axis]):
            rule = f"Some layers are built with {sorted(missing)}, which is not among the choices."
            raise invalid(f"elastic[{axis!r}]", elastic[axis], rule, "List every size that a layer has.")
    ranking, droppable = elastic["layer_ranking"], layers - elastic["depth"][-1]
    allowed = set(range(layers)) - anchors
    valid = isinstance(ranking, list) and all(type(i) is int and i in allowed for i in ranking)
    if not valid or len(set(ranking)) != len(ranking) or len(ranking) < droppable:
        rule = (
            f"It lists at least {droppable} different layers below {layers} in the order in which"
            f" they are dropped, without {sorted(anchors)}, which always stay."
        )
        raise invalid("elastic['layer_ranking']", ranking, rule, "Rank as many layers as `depth` drops.")


def _check_choices(name: str, sizes: Any, full: int) -> None:
    if not isinstance(sizes, list) or not sizes:
        raise invalid(name, sizes, "It must be a list of sizes.", f"Pass at least [{full}].")
    for size in sizes:
        require_int(name, size)
    if sizes[0] != full:
        raise invalid(name, sizes, f"The first choice is the full size, {full}.", f"Begin the list with {full}.")
    if any(small >= large for large, small in pairwise(sizes)):
        raise invalid(name, sizes, "The sizes must descend strictly.", "Sort them and drop repeated ones.")


def check_origin(parent: dict[str, Any], permutation: Any, terms: Any, made: Any, runs: Any, version: Any) -> None:
    """Refuse what a card says about where the model comes from: parent, its licence, conversion, training, code."""
    for field, value in parent.items():
        if not isinstance(value, str | None):
            raise invalid(field, value, "It is a text.", "Pass Hub id and commit of the parent, or None.")
    if not isinstance(permutation, str | None):
        raise invalid("permutation", permutation, "It is the name of a conversion.", "Leave it out.")
    texts = isinstance(terms, dict) and all(isinstance(value, str) for value in terms.values())
    if terms is not None and not (texts and set(terms) <= set(LICENSE_FIELDS)):
        rule = f"It holds texts under {', '.join(LICENSE_FIELDS)}."
        raise invalid("parent_license", terms, rule, "Pass for instance {'license': 'apache-2.0'}, or None.")
    if made is not None and not (isinstance(made, dict) and isinstance(made.get("order"), str)):
        rule = "It says the order of units, and what the conversion took."
        raise invalid("conversion", made, rule, "Pass for instance {'order': 'norms'}, or None.")
    if runs is not None and not (isinstance(runs, list) and all(isinstance(run, dict) for run in runs)):
        raise invalid("training_runs", runs, "It lists the arguments of every run.", "Pass a list of dicts.")
    for run in runs or []:
        for count in {"steps", "tokens"} & set(run):
            require_int(f"training_runs[{count!r}]", run[count], minimum=0)
    if version is not None and not (isinstance(version, str) and re.fullmatch(r"\d+(\.\d+)*", version)):
        raise invalid("flextron_version", version, "It is numbers with dots between.", "Leave it out.")
