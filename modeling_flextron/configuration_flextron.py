"""`FlextronConfig`: the shape of an elastic model, its allowed sizes and the table of recommended ones.

The shape fields have the names and meanings of `LlamaConfig`, and describe what is built: a model loaded at a
budget carries a config of that budget (`narrowed`), so that caches, memory estimates and every other reader of
a Hugging Face config see the small model. Layers of different sizes are written as `per_layer_config`.

They may be changed, as in any config: costs follow, and what was chosen for other sizes (`elastic`, the frontier,
routers) is dropped with a warning. What contradicts itself was not made for another shape, and is refused.

The class checks its own fields instead of using the `@strict` decorator, whose errors are neither `ValueError`
nor name the way out.
"""

import copy
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import CONFIG_NAME, logging

from .budgets import TOLERANCE, Budget, budget_of_name, parse_budget, resolve
from .errors import invalid, require_int
from .families import family_of
from .frontier import COSTS, FrontierRow, held, plain_rows, read_rows
from .latency import check_summary, copy_tables
from .levels import check_levels, index_name, level_of
from .measured import Figures, Measured, forget, record
from .static_router import check_static_router, narrowed_router
from .subnetwork import AXES, SubNetwork, count_parameters, is_subnetwork
from .token_routing import (
    check_token_routing,
    figures_of_targets,
    is_routed,
    narrowed_routing,
    with_figures,
)

logger = logging.get_logger(__name__)
VERSION = "0.2.0"  # of this code, wherever it runs from; the package has the same
AUTO_MAP = {
    "AutoConfig": "configuration_flextron.FlextronConfig",
    "AutoModel": "modeling_flextron.FlextronModel",
    "AutoModelForCausalLM": "modeling_flextron.FlextronForCausalLM",
    "AutoModelForSequenceClassification": "modeling_flextron.FlextronForSequenceClassification",
}
ELASTIC_FIELDS = (*AXES, "layer_ranking")
MADE_FOR_CHOICES = ("frontier", "static_router", "token_routing")
LICENSE_FIELDS = ("license", "license_name", "license_link")
NORMS = ("rms", "layer")
KINDS = ("full_attention", "sliding_attention")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _listed(value: Any) -> Any:
    return value if _is_list(value) else [value]


def _nothing_made(levels: Any) -> dict[str, Any]:
    """The fields of a config for whose choices nothing was made; the files of its `levels` stay one checkpoint."""
    levels = {**levels, "rows": []} if isinstance(levels, dict) else levels
    return {**dict.fromkeys(MADE_FOR_CHOICES), "levels": levels}


def _digest(values: dict[str, Any]) -> str:
    written = {name: value for name, value in values.items() if name != "_name_or_path"}
    return hashlib.sha256(json.dumps(written, sort_keys=True, default=str).encode()).hexdigest()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _parts(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _plain(budget: Any) -> Any:
    """A budget as JSON has it: a `SubNetwork` becomes the dict of its sizes."""
    if is_routed(budget):
        return f"auto:{budget.target}"
    return budget.to_dict() if is_subnetwork(budget) else budget


class FlextronConfig(PreTrainedConfig):
    """Configuration of a `FlextronModel`.

    Args:
        base_model_type: Family of the parent, such as `"llama"`; `extract()` returns that stock class.
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
        head_dim, hidden_act, max_position_embeddings, initializer_range, use_cache, pad_token_id, bos_token_id,
        eos_token_id, tie_word_embeddings, rope_parameters, attention_dropout, mlp_bias: as in `LlamaConfig`.
        norm_type: `"rms"` or `"layer"`.
        norm_eps: Epsilon of every norm.
        attention_bias: Biases on the q, k and v projections.
        attention_output_bias: Bias on the output projection; None for the same as `attention_bias`.
        qk_norm: RMS norms over the channels of each query and key head.
        gated_mlp: `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
        parallel_residual: Attention and MLP both read the input of the layer.
        learned_positions: Learned embeddings of the positions instead of rotary ones.
        padding_is_trained: The embedding of `pad_token_id` gets gradients like any other.
        residual_dropout, embedding_dropout: Dropout behind attention and MLP, and behind the embeddings.
        sliding_window, layer_types: Tokens that `"sliding_attention"` layers see, and the kind of every layer; None
            for `"full_attention"` everywhere.
        elastic: Allowed sizes: strictly descending lists under `mlp` (neurons), `heads` (query heads), `hidden`
            and `depth` (number of layers), each beginning with the full size, and `layer_ranking`, the layers
            in the order in which depth drops them.
        frontier: Recommended sub-networks, largest first. A row holds `name`, `subnetwork` (or None when only a
            larger checkpoint has its weights), exact `parameters`, `non_embedding_parameters` and
            `kv_values_per_token`, the evaluation `loss` in nats per token when it was measured, free `metrics`, and
            in `measured` what these were measured on (`record` writes them, `forget_measurements` erases them).
        parent_non_embedding_parameters: Size that fractional budgets refer to; None for the shape above.
        flextron_budget: Which sub-network to build: a value of the budget grammar, see `budgets.py`.
        flextron_context: Tokens of KV cache that memory budgets reserve; never more than `max_position_embeddings`.
        static_router: Scores from which a sub-network follows for any budget; see `static_router.StaticRouter`.
        token_routing: Sizes, targets and their bounds, of a model whose tokens choose; see `token_routing.py`.
        latency_tables: Measured latency tables beside `config.json`: file -> its device and conditions.
        levels: Of a checkpoint that is stored in levels (`levels.py`): `checkpoint`, which its files share, and
            `rows`, the row of the frontier that each level completes, smallest first.
        parent_name: Hub id of the parent, or the name of its folder.
        parent_license: `license`, and `license_name` and `license_link` where there are any, of the parent's card.
        permutation: What tells the order of units of this conversion from that of any other; the order itself is in a
            file beside this one (`permutation.py`). None when it is not known.
        training_runs: Of every run since the conversion: the training arguments that differ from their defaults, and
            how many `steps` it made and `tokens` it read.
        flextron_version: Version of the code that wrote the file, and that lies beside it.

    Raises:
        ValueError: a field has the wrong type or an impossible value; the message names it.
    """

    model_type = "flextron"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    # Query heads of a GQA parent are stored rank-major, across KV heads: attention cannot be split by rows.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan: ClassVar[dict[str, Any]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    base_model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # type: ignore[assignment]  # filled in below, as `elastic` and `frontier` are
    head_dim: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    norm_type: str = "rms"
    norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict = None  # type: ignore[assignment]
    attention_bias: bool = False
    attention_output_bias: bool = None  # type: ignore[assignment]
    attention_dropout: float = 0.0
    qk_norm: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    parallel_residual: bool = False
    learned_positions: bool = False
    padding_is_trained: bool = False
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    sliding_window: int | None = None
    layer_types: list[str] = None  # type: ignore[assignment]
    elastic: dict = None  # type: ignore[assignment]
    frontier: list = None  # type: ignore[assignment]
    parent_non_embedding_parameters: int | None = None
    flextron_budget: Any = None
    flextron_context: int = 4096
    static_router: dict | None = None
    token_routing: dict | None = None
    latency_tables: dict = None  # type: ignore[assignment]
    levels: dict | None = None
    parent_name: str | None = None
    parent_license: dict | None = None
    permutation: str | None = None
    training_runs: list[dict] | None = None
    flextron_version: str | None = None

    def __post_init__(self, **kwargs):
        for key in kwargs:
            if key.startswith(("flextron", "elastic", "frontier")):
                known = "`elastic`, `frontier`, `flextron_budget` and `flextron_context`"
                raise invalid(key, kwargs[key], f"The elastic fields are {known}.", "Remove or rename it.")
        self._read_from = None  # a digest of the `config.json` that this is, until it is saved itself
        stored = self._belong_together()
        if stored:
            self._fit_layers()
            if differing := kwargs.get("per_layer_config"):
                layers = self.num_hidden_layers
                kwargs["per_layer_config"] = {i: sizes for i, sizes in differing.items() if int(i) < layers}
        self._check_dimensions()
        self.elastic = self._full_elastic()
        kwargs.setdefault("auto_map", AUTO_MAP.copy())
        super().__post_init__(**kwargs)
        self._check(stored)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As `PreTrainedConfig.from_pretrained`; the config knows where it was read, as one of `AutoConfig` does."""
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As `PreTrainedConfig.get_config_dict`, which makes a default model of a folder that has no config."""
        remedy = "Download or write it again; `flextron convert` and `flextron train` write whole folders."
        try:
            found, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (TypeError, AttributeError, LookupError, RecursionError) as error:
            rule = f"Its {CONFIG_NAME} is none of a model ({type(error).__name__}: {error})."
            raise invalid("config", str(pretrained_model_name_or_path), rule, remedy) from error
        if "model_type" not in found:
            rule = f"There is no {CONFIG_NAME}, or it names no `model_type`."
            raise invalid("config", str(pretrained_model_name_or_path), rule, remedy)
        return {**found, "_name_or_path": str(pretrained_model_name_or_path)}, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As `PreTrainedConfig.from_dict`, with our own keywords handed to the constructor.

        The base class sets keywords only after construction, where no check would see them.
        """
        if (kind := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            # The base class would go on: with query heads in the order of another architecture.
            raise invalid("model_type", kind, "It is no Flextron model.", "Make it one with `flextron convert`.")
        inherited = PreTrainedConfig.__dataclass_fields__
        names = [name for name in (*cls.__dataclass_fields__, "per_layer_config") if name not in inherited]
        ours: dict[str, Any] = {name: kwargs.pop(name) for name in names if name in kwargs}
        values = config_dict | ours
        if values.get("elastic") != config_dict.get("elastic"):
            logger.warning(f"Made for other choices, and dropped unless given: {', '.join(MADE_FOR_CHOICES)}.")
            values |= _nothing_made(config_dict.get("levels")) | ours
        try:
            result = super().from_dict(values, **kwargs)
            config = result[0] if isinstance(result, tuple) else result
            config._read_from = _digest(config_dict)
            config.validate()  # with the other keywords, set by now
        except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
            # The base class reads its own fields without a look at their types.
            rule = f"One of its fields has an impossible value ({type(error).__name__}: {error})."
            raise invalid("config", config_dict.get("_name_or_path"), rule, "Download or write it again.") from error
        config._say_which_code_runs()
        return result

    def check_still_there(self, source: str, subfolder: str) -> None:
        """Refuse a folder whose `config.json` is no longer the one that this config was read from.

        Raises:
            ValueError: it was written again since.
        """
        if self._read_from is None or source != self.name_or_path or not os.path.isdir(source):
            return
        if _digest(PreTrainedConfig.get_config_dict(source, subfolder=subfolder)[0]) != self._read_from:
            rule = "The `config.json` of this folder was written again after the config was read."
            raise invalid("config", source, rule, "Try again; a config that is passed as an object must be read again.")

    # ------------------------------------------------------------------------------------------- reading

    @property
    def built(self) -> SubNetwork:
        """The largest sub-network: everything that the weights hold."""
        layers = list(self.per_layer_config)
        return SubNetwork(
            self.hidden_size,
            tuple(range(self.num_hidden_layers)),
            tuple(layer.intermediate_size for layer in layers),
            tuple(layer.num_attention_heads for layer in layers),
        )

    def kv_heads(self, heads: int) -> int:
        """KV heads of a layer that runs `heads` query heads.

        A GQA parent keeps all its KV heads, so that the KV cache has the same shape at every budget; an MHA
        parent drops a KV head with its query head.
        """
        # The largest layer decides; `__dict__`, because a heterogeneous config refuses the attributes.
        shared = self.__dict__["num_key_value_heads"]
        return shared if self.__dict__["num_attention_heads"] > shared else heads

    def anchors(self) -> set[int]:
        """Layers that always stay: the first of each kind, from whose cache entry a cache's length is read."""
        return {self.layer_types.index(kind) for kind in self.layer_types}

    def choices(self, axis: str) -> list[int]:
        """Allowed sizes on an axis, largest first."""
        return self.elastic[axis]

    def kept_layers(self, depth: int) -> tuple[int, ...]:
        """Layers that a network of `depth` layers keeps."""
        dropped = self.elastic["layer_ranking"][: self.num_hidden_layers - depth]
        return tuple(layer for layer in range(self.num_hidden_layers) if layer not in dropped)

    def parent_size(self) -> int:
        """Non-embedding parameters of the parent, which fractional budgets refer to."""
        return self.parent_non_embedding_parameters or count_parameters(self, self.built, embeddings=False)

    def resolve(self, budget: Any) -> SubNetwork:
        """The sub-network that a budget means; see `budgets.resolve`."""
        return resolve(self, budget)

    @property
    def transformers_weights(self) -> str | None:
        """The index that transformers loads: in levels that of the first one which has the budget, else its default."""
        if self.levels is None or self.flextron_budget is None:
            return None
        level = level_of(self, resolve(self, self.flextron_budget))
        return None if level is None else index_name(level)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """As `PreTrainedConfig.save_pretrained`, with the latency tables that the config lists."""
        copy_tables(self, save_directory)
        self.flextron_version = VERSION  # this code is what a model saves
        self._read_from = None
        super().save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As `PreTrainedConfig.to_dict`; what is written beside our code does not name that of another repo."""
        written = super().to_dict()
        written.pop("_read_from", None)
        written["frontier"] = plain_rows(self.frontier)
        names = {kind: written["auto_map"].get(kind, ours) for kind, ours in AUTO_MAP.items()}
        return written | {"auto_map": {k: AUTO_MAP[k] if "--" in str(name) else name for k, name in names.items()}}

    def _say_which_code_runs(self) -> None:
        """One line in the log when the repo's own code is another version than this one, which runs."""
        if self.flextron_version in (None, VERSION):
            return
        newer = _parts(self.flextron_version) > _parts(VERSION)
        logger.warning_once(
            f"The code beside {self.name_or_path or 'this config'} is Flextron {self.flextron_version}; what runs is"
            f" {'the older' if newer else 'the newer'} {VERSION} in {os.path.dirname(__file__)}."
            + (" Upgrade it if something is missing: `pip install -U flextron`." if newer else "")
        )

    # ------------------------------------------------------------------------------------------- changing

    def row(self, name: str, subnetwork: SubNetwork) -> FrontierRow:
        """A row of the frontier with the exact costs of `subnetwork`."""
        return FrontierRow.of(self, name, subnetwork)

    def record(
        self,
        figures: Mapping[str, Mapping[str, float]],
        *,
        text: str | None,
        split: str | None = None,
        tokens: int | None = None,
        version: str = VERSION,
    ) -> None:
        """Write figures that were just measured on one text, and what that was; today's date is written with them.

        What another text gave under the same names is erased in all rows: a column is of one text.

        Args:
            figures: Name of a row, or `"auto:0.5"` -> name -> value: `loss` in nats per token, others as
                `accuracy`, or `task/metric` where texts have metrics of the same name.
            text: Name of the text or task: without a path, as everybody can read it; None where it is unknown.
            split: Split of it.
            tokens: How many tokens counted.
            version: Of the code that measured.

        Raises:
            ValueError: these weights do not hold such a row.
        """
        targets = figures_of_targets(self.token_routing)
        measurable = [*held(self.frontier), *targets]
        for name in figures:
            if name not in measurable:
                rule = f"What can be measured are {', '.join(measurable)}."
                raise invalid("figures", name, rule, "Write figures of the rows that these weights hold.")
        on = Measured(text, split, tokens, time.strftime("%Y-%m-%d"), version)
        self.frontier = [record(row, row.name, figures, on) for row in self.frontier]
        targets = {name: record(target, name, figures, on) for name, target in targets.items()}
        self.token_routing = with_figures(self.token_routing, targets)

    def forget_measurements(self, only_routed: bool = False) -> None:
        """Erase every measured figure, as the weights are about to change.

        Args:
            only_routed: Those of token routing alone: no other size runs its routers.
        """
        if not only_routed:
            self.frontier = [forget(row) for row in self.frontier]
        targets = dict.fromkeys(figures_of_targets(self.token_routing), Figures())
        self.token_routing = with_figures(self.token_routing, targets)

    def narrowed(self, subnetwork: SubNetwork) -> "FlextronConfig":
        """The config of a model that holds only `subnetwork`: its shape, its choices, its rows of the frontier."""
        new = copy.deepcopy(self)
        new.per_layer_config = None
        new.flextron_budget = None
        new.parent_non_embedding_parameters = self.parent_size()
        kv_heads = [self.kv_heads(heads) for heads in subnetwork.heads]
        new.hidden_size = subnetwork.hidden
        new.num_hidden_layers = len(subnetwork.layers)
        new.intermediate_size = max(subnetwork.mlp)
        new.num_attention_heads = max(subnetwork.heads)
        new.num_key_value_heads = max(kv_heads)
        new.layer_types = [self.layer_types[layer] for layer in subnetwork.layers]
        new.elastic = {
            "mlp": [size for size in self.choices("mlp") if size <= new.intermediate_size],
            "heads": [size for size in self.choices("heads") if size <= new.num_attention_heads],
            "hidden": [size for size in self.choices("hidden") if size <= new.hidden_size],
            "depth": [size for size in self.choices("depth") if size <= new.num_hidden_layers],
            "layer_ranking": [
                subnetwork.layers.index(layer) for layer in self.elastic["layer_ranking"] if layer in subnetwork.layers
            ],
        }
        if new.static_router is not None:
            counts = {axis: len(new.elastic[axis]) for axis in AXES}
            new.static_router = narrowed_router(new.static_router, subnetwork.layers, counts)
        inner = {name: s.within(subnetwork) for name, s in held(self.frontier).items() if subnetwork.contains(s)}
        new.frontier = [replace(row, subnetwork=inner.get(row.name)) for row in self.frontier]
        if not subnetwork.uniform:
            new.per_layer_config = {
                i: {"intermediate_size": mlp, "num_attention_heads": heads, "num_key_value_heads": kv}
                for i, (mlp, heads, kv) in enumerate(zip(subnetwork.mlp, subnetwork.heads, kv_heads, strict=True))
            }
        if self.token_routing is not None:
            new.token_routing = narrowed_routing(self, new, subnetwork.layers)
        if new.built not in inner.values():
            others = [row for row in new.frontier if row.name != "built"]
            rows = [new.row("built", new.built), *others]
            new.frontier = sorted(rows, key=lambda row: row.non_embedding_parameters, reverse=True)
        new._check()
        return new

    # ------------------------------------------------------------------------------------------- checking

    def validate(self) -> None:
        """Run every check again, and let what depends on the shape follow it; `save_pretrained` calls this."""
        stored = self._belong_together()
        if stored:
            self._fit_layers()
        # Both read head counts, which a heterogeneous config has only per layer.
        one = self.per_layer_config[0] if self.is_heterogeneous else self
        one._check_dimensions()
        PreTrainedConfig.validate(one)
        self._check(stored)

    def _check(self, stored: bool = False) -> None:
        """Check all but the dimensions; of what was `stored` together, drop what does not fit the shape."""
        self._check_rope()
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise invalid(
                "dtype", self.dtype, "It is a floating-point dtype of torch.", "Pass 'float32', for instance."
            )
        if stored:
            self._drop_misfits()
        self._check_elastic()
        if self.static_router is not None:
            check_static_router(self, self.static_router)
        if self.token_routing is not None:
            check_token_routing(self, self.token_routing)
        if self.parent_non_embedding_parameters is not None:
            require_int("parent_non_embedding_parameters", self.parent_non_embedding_parameters)
        self.frontier = [self.row("1", self.built)] if self.frontier is None else read_rows(self, self.frontier)
        changed = self._update_costs()
        if changed:
            self.forget_measurements()  # of another shape
        for row in self._unreached():
            if not changed:
                rule = "A row is reached by its name, and this one means something else."
                remedy = "Begin it with a letter, such as 'small'."
                raise invalid(f"frontier[{self.frontier.index(row)}]['name']", row.name, rule, remedy)
            other = replace(row, name=f"row-{row.name}")
            self.frontier[self.frontier.index(row)] = other
            logger.warning(
                f"Row {row.name!r} costs more of this shape than its name says, and is called {other.name!r}."
            )
        if self.levels is not None:
            check_levels(self, self.levels)
        self.flextron_budget = _plain(self.flextron_budget)
        parse_budget(self.flextron_budget)
        require_int("flextron_context", self.flextron_context, minimum=0)
        self._check_origin()

    def _check_origin(self) -> None:
        """Check what a card says about where the model comes from."""
        if not isinstance(self.parent_name, str | None):
            raise invalid("parent_name", self.parent_name, "It is a text.", "Pass the Hub id of the parent, or None.")
        if not isinstance(self.permutation, str | None):
            raise invalid("permutation", self.permutation, "It is the name of a conversion.", "Leave it out.")
        terms = self.parent_license
        if terms is not None and not (
            isinstance(terms, dict) and set(terms) <= set(LICENSE_FIELDS) and all(map(_is_text, terms.values()))
        ):
            rule = f"It holds texts under {', '.join(LICENSE_FIELDS)}."
            raise invalid("parent_license", terms, rule, "Pass for instance {'license': 'apache-2.0'}, or None.")
        runs = self.training_runs
        if runs is not None and not (isinstance(runs, list) and all(isinstance(run, dict) for run in runs)):
            raise invalid("training_runs", runs, "It lists the arguments of every run.", "Pass a list of dicts.")
        for run in runs or []:
            for count in {"steps", "tokens"} & set(run):
                require_int(f"training_runs[{count!r}]", run[count], minimum=0)
        version = self.flextron_version
        if version is not None and not (_is_text(version) and re.fullmatch(r"\d+(\.\d+)*", version)):
            raise invalid("flextron_version", version, "It is numbers with dots between.", "Leave it out.")

    def _check_rope(self) -> None:
        """Check the rotary positions, of which the base class checks the names of the fields."""
        rope, kinds = self.rope_parameters, ("default", *ROPE_INIT_FUNCTIONS)
        if self.learned_positions:
            return
        if rope["rope_type"] not in kinds:
            raise invalid(
                "rope_parameters", rope, f"Its `rope_type` is one of {', '.join(kinds)}.", "Name one of them."
            )
        for key in ("rope_theta", "factor", "partial_rotary_factor"):
            value = rope.get(key, 1.0)
            if not _is_number(value) or value <= 0:
                raise invalid(
                    f"rope_parameters[{key!r}]", value, "It is a positive number.", "Pass that of the parent."
                )

    def _check_dimensions(self) -> None:
        family_of(self.base_model_type, "base_model_type")
        if not _is_text(self.hidden_act) or self.hidden_act not in ACT2FN:
            raise invalid("hidden_act", self.hidden_act, "transformers has no activation of this name.", "Pass 'silu'.")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            ids = getattr(self, name)
            several = ids if isinstance(ids, list) and name == "eos_token_id" else [0 if ids is None else ids]
            if not all(type(token) is int for token in several):
                raise invalid(name, ids, "It is the number of a token.", "Pass an int, or None for no such token.")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            require_int(name, getattr(self, name))
        require_int("max_position_embeddings", self.max_position_embeddings)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        require_int("num_key_value_heads", self.num_key_value_heads)
        require_int("head_dim", self.head_dim)
        if self.head_dim % 2 and not self.learned_positions:
            rule = "Rotary embeddings rotate pairs, so the size of a head must be even."
            raise invalid("head_dim", self.head_dim, rule, "Pass an even `head_dim`.")
        if self.num_attention_heads % self.num_key_value_heads:
            rule = f"Every KV head serves the same number of the {self.num_attention_heads} query heads."
            raise invalid("num_key_value_heads", self.num_key_value_heads, rule, "Pass a divisor of that number.")
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.norm_type not in NORMS:
            raise invalid("norm_type", self.norm_type, f"It is one of {', '.join(NORMS)}.", "Pick one of them.")
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        kinds = self.layer_types if isinstance(self.layer_types, list) else []
        if len(kinds) != self.num_hidden_layers or not set(kinds) <= set(KINDS):
            rule = f"It names the kind of each of the {self.num_hidden_layers} layers: {' or '.join(KINDS)}."
            raise invalid("layer_types", self.layer_types, rule, "Pass None for full attention everywhere.")
        if "sliding_attention" in kinds:
            require_int("sliding_window", self.sliding_window)
        elif self.sliding_window is not None:
            rule = "No layer has sliding attention."
            raise invalid("sliding_window", self.sliding_window, rule, "Pass `layer_types` as well, or None.")
        for name in (
            "tie_word_embeddings", "attention_bias", "attention_output_bias", "qk_norm", "mlp_bias", "gated_mlp",
            "parallel_residual", "learned_positions", "padding_is_trained", "use_cache",
        ):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise invalid(name, getattr(self, name), "It must be a bool.", "Pass True or False.")
        self.latency_tables = {} if self.latency_tables is None else self.latency_tables
        if not isinstance(self.latency_tables, dict):
            raise invalid(
                "latency_tables", self.latency_tables, "It maps files to devices.", "Pass None for no tables."
            )
        for file, table in self.latency_tables.items():
            check_summary(file, table)
        for name in (
            "norm_eps", "initializer_range", "attention_dropout", "residual_dropout", "embedding_dropout"
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise invalid(name, value, "It must be a finite number of at least 0.", "Pass a float.")

    def _full_elastic(self) -> dict[str, list[int]]:
        """`elastic` with a list for every axis: the full size alone where nothing else is allowed."""
        given = self.elastic if self.elastic is not None else {}
        if not isinstance(given, dict):
            raise invalid("elastic", given, "It maps axes to lists of sizes.", "Pass a dict such as {'mlp': [8, 4]}.")
        for key in given:
            if key not in ELASTIC_FIELDS:
                raise invalid(
                    f"elastic[{key!r}]", given[key], f"The fields of `elastic` are {', '.join(ELASTIC_FIELDS)}.",
                    "Remove or rename it.",
                )  # fmt: skip
        full = {
            "mlp": self.intermediate_size,
            "heads": self.num_attention_heads,
            "hidden": self.hidden_size,
            "depth": self.num_hidden_layers,
        }
        elastic = {axis: given.get(axis, [size]) for axis, size in full.items()}
        elastic["layer_ranking"] = given.get("layer_ranking", [])
        return elastic

    def _check_elastic(self) -> None:
        built = self.built
        full = {"mlp": max(built.mlp), "heads": max(built.heads), "hidden": built.hidden, "depth": len(built.layers)}
        for axis in AXES:
            name, sizes = f"elastic[{axis!r}]", self.elastic[axis]
            if not isinstance(sizes, list) or not sizes:
                raise invalid(name, sizes, "It must be a list of sizes.", f"Pass at least [{full[axis]}].")
            for size in sizes:
                require_int(name, size)
            if sizes[0] != full[axis]:
                rule = f"The first choice is the full size, {full[axis]}."
                raise invalid(name, sizes, rule, f"Begin the list with {full[axis]}.")
            if any(small >= large for large, small in pairwise(sizes)):
                raise invalid(name, sizes, "The sizes must descend strictly.", "Sort them and drop repeated ones.")
        for heads in self.elastic["heads"]:
            if heads % self.kv_heads(heads):
                rule = f"Every one of the {self.kv_heads(heads)} KV heads keeps the same number of query heads."
                raise invalid("elastic['heads']", heads, rule, "Use multiples of the number of KV heads.")
        for axis, sizes in (("mlp", built.mlp), ("heads", built.heads)):
            if missing := set(sizes) - set(self.elastic[axis]):
                rule = f"Some layers are built with {sorted(missing)}, which is not among the choices."
                raise invalid(f"elastic[{axis!r}]", self.elastic[axis], rule, "List every size that a layer has.")
        ranking = self.elastic["layer_ranking"]
        droppable = self.num_hidden_layers - self.elastic["depth"][-1]
        allowed = set(range(self.num_hidden_layers)) - self.anchors()
        valid = isinstance(ranking, list) and all(type(i) is int and i in allowed for i in ranking)
        if not valid or len(set(ranking)) != len(ranking) or len(ranking) < droppable:
            rule = (
                f"It lists at least {droppable} different layers below {self.num_hidden_layers} in the order in which"
                f" they are dropped, without {sorted(self.anchors())}, which always stay."
            )
            raise invalid("elastic['layer_ranking']", ranking, rule, "Rank as many layers as `depth` drops.")

    def _unreached(self) -> list[FrontierRow]:
        """Rows that their names do not reach, because these are budgets which mean something else."""
        # Embeddings, context and dtype do not count: they change later.
        wholes, meanings, wrong = {"fraction": self.parent_size(), "parameters": 1}, set[Budget](), []
        for row in self.frontier:
            meaning = budget_of_name(row.name)
            if meaning is None or meaning in meanings:
                wrong.append(row)
                continue
            meanings.add(meaning)
            if meaning.kind in wholes and row.non_embedding_parameters > (
                TOLERANCE * meaning.value * wholes[meaning.kind]
            ):
                wrong.append(row)
        return wrong

    # ------------------------------------------------------------------------------- following another shape

    def _belong_together(self) -> bool:
        """Whether the rows of `frontier` name sizes of `elastic`: then both were stored, for one shape."""
        try:
            rows = [row["subnetwork"] for row in plain_rows(self.frontier) if row["subnetwork"] is not None]
            sizes = [{**row, "depth": len(row["layers"]) if _is_list(row["layers"]) else row["layers"]} for row in rows]
            named = {axis: {size for row in sizes for size in _listed(row[axis])} for axis in AXES}
            return bool(rows) and all(named[axis] <= set(self.elastic[axis]) for axis in AXES)
        except (TypeError, KeyError):  # none given, or nothing like them
            return False

    def _fit_layers(self) -> None:
        """Let what is listed by layer follow their number, the window their kinds, and KV heads the query heads."""
        layers, heads, kinds = self.num_hidden_layers, self.__dict__["num_attention_heads"], self.layer_types
        if self.__dict__["num_key_value_heads"] == self.elastic["heads"][0] != heads:  # each had its own
            self.num_key_value_heads = heads
        if _is_list(kinds) and kinds and type(layers) is int:
            had_window = "sliding_attention" in kinds
            kinds = [*kinds[:layers], *kinds[-1:] * (layers - len(kinds))]
            if self.sliding_window is None:
                kinds = ["full_attention" if kind == "sliding_attention" else kind for kind in kinds]
            elif had_window and "sliding_attention" not in kinds:
                self.sliding_window = None
            self.layer_types = kinds

    def _fits(self, axis: str, sizes: tuple[int, ...]) -> bool:
        """Whether the choices of an axis are those of the `sizes` that are built."""
        choices = self.elastic[axis]
        if choices[0] != max(sizes) or not set(sizes) <= set(choices):
            return False
        if axis == "heads":
            return not any(heads % self.kv_heads(heads) for heads in choices)
        return axis != "depth" or not self.anchors() & set(self.elastic["layer_ranking"])

    def _drop_misfits(self) -> None:
        """Where choices are not those of this shape, allow what is built, and drop what was made for them."""
        built = self.built
        held = {"mlp": built.mlp, "heads": built.heads, "hidden": (built.hidden,), "depth": (len(built.layers),)}
        wrong = {axis: sorted(set(sizes), reverse=True) for axis, sizes in held.items() if not self._fits(axis, sizes)}
        if not wrong:
            return
        lost = [f"elastic[{axis!r}]" for axis in wrong]
        lost += [name for name in MADE_FOR_CHOICES if getattr(self, name) is not None]
        logger.warning(f"Made for another shape, and dropped: {', '.join(lost)}.")
        self.elastic = {**self.elastic, **wrong}
        if "depth" in wrong:
            self.elastic["layer_ranking"] = []
        for name, value in _nothing_made(self.levels).items():
            setattr(self, name, value)
        self.parent_non_embedding_parameters = None

    def _update_costs(self) -> bool:
        """Let the costs in the frontier follow the shape; of rows that are not held only their embeddings can.

        Returns:
            Whether any was of another shape.
        """
        rows: list[FrontierRow] = []
        scales: set[Fraction | None] = set()  # of the embeddings; None where more has changed
        for row in self.frontier:
            if row.subnetwork is not None:
                exact = self.row(row.name, row.subnetwork)
                before, after = (costs.parameters - costs.non_embedding_parameters for costs in (row, exact))
                same = before > 0 and all(getattr(row, key) == getattr(exact, key) for key in COSTS[1:])
                scales.add(Fraction(after, before) if same else None)
                row = replace(row, **{key: getattr(exact, key) for key in COSTS})
            rows.append(row)
        changed = bool(scales - {Fraction(1)})
        self.frontier = rows
        others = [row for row in rows if row.subnetwork is None]
        if not others or not changed:
            return changed
        scale, *more = scales
        if scale is not None and not more:
            self.frontier = [row if row.subnetwork else with_embeddings(row, scale) for row in rows]
            return changed
        names = ", ".join(repr(row.name) for row in others)
        logger.warning(f"What the rows {names} cost is not known for this shape, and they are dropped.")
        self.frontier = [row for row in rows if row.subnetwork is not None]
        self.levels = _nothing_made(self.levels)["levels"]
        return changed


def with_embeddings(row: FrontierRow, scale: Fraction) -> FrontierRow:
    """A row whose embeddings cost so many times as much."""
    embeddings = row.parameters - row.non_embedding_parameters
    return replace(row, parameters=row.non_embedding_parameters + int(embeddings * scale))
