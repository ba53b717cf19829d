"""`FlextronConfig`: the shape of an elastic model, its allowed sizes and the table of recommended ones.

The shape fields have the names and meanings of `LlamaConfig`, and describe what is built: a model loaded at a
budget carries a config of that budget (`narrowed`), so that caches, memory estimates and every other reader of
a Hugging Face config see the small model. Layers of different sizes are written as `per_layer_config`.

They may be changed, as in any config: costs follow, and what was chosen for other sizes (`elastic`, the frontier,
routers) is dropped with a warning. What contradicts itself was not made for another shape, and is refused.
"""

import copy
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.utils import logging

from .budgets import check_names, parse_budget, plain_budget, resolve
from .config_checks import (
    check_dimensions,
    check_dtype,
    check_elastic,
    check_origin,
    check_rope,
    completed,
    full_elastic,
)
from .config_files import AUTO_MAP, VERSION, StoredConfig
from .corrections import Owner, check_corrections, owners_within
from .errors import invalid, require_int
from .frontier import FrontierRow, held, read_rows
from .latency import check_tables
from .level_blocks import check_levels, index_name, level_of
from .measured import Figures, Measured, forget, record
from .reshaping import (
    MADE_FOR_CHOICES,
    belong_together,
    fitted_layers,
    misfits,
    narrowed_fields,
    nothing_made,
    renamed,
    with_exact_costs,
)
from .static_router import check_static_router
from .subnetwork import SubNetwork, count_parameters
from .token_routing import check_token_routing, figures_of_targets, narrowed_routing, with_figures

logger = logging.get_logger(__name__)


class FlextronConfig(StoredConfig):
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
        frontier: Recommended sub-networks, largest first: rows (`frontier.FrontierRow`), or dicts of their JSON form,
            which `validate` turns into rows. `record` writes measured figures, `forget_measurements` erases them.
        corrections: What rows own beside the shared weights, smallest row first; see `corrections.Owner`.
        parent_non_embedding_parameters: Size that fractional budgets refer to; None for the shape above.
        flextron_budget: Which sub-network to build: a value of the budget grammar, see `budgets.py`.
        flextron_context: Tokens of KV cache that memory budgets reserve; never more than `max_position_embeddings`.
        static_router: Scores from which a sub-network follows for any budget; see `static_router.StaticRouter`.
        token_routing: Sizes, targets and their bounds, of a model whose tokens choose; see `token_routing.py`.
        latency_tables: Measured latency tables beside `config.json`: file -> its device and conditions.
        levels: Of a checkpoint that is stored in levels (`level_blocks.py`): `checkpoint`, which its files share, and
            `rows`, the row of the frontier that each level completes, smallest first.
        parent_name: Hub id of the parent, or the name of its folder.
        parent_revision: Commit of the parent on the Hub, where it came from there.
        parent_license: `license`, and `license_name` and `license_link` where there are any, of the parent's card.
        permutation: What tells the order of units of this conversion from that of any other; the order itself is in a
            file beside this one (`permutation.py`). None when it is not known.
        conversion: How it was made from its parent: the `order` of its units, and what was read and planned for that.
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
    frontier: list[FrontierRow] = None  # type: ignore[assignment]
    corrections: list | None = None
    parent_non_embedding_parameters: int | None = None
    flextron_budget: Any = None
    flextron_context: int = 4096
    static_router: dict | None = None
    token_routing: dict | None = None
    latency_tables: dict = None  # type: ignore[assignment]
    levels: dict | None = None
    parent_name: str | None = None
    parent_revision: str | None = None
    parent_license: dict | None = None
    permutation: str | None = None
    conversion: dict | None = None
    training_runs: list[dict] | None = None

    def __post_init__(self, **kwargs):
        for key in kwargs:
            if key.startswith(("flextron", "elastic", "frontier")):
                known = "`elastic`, `frontier`, `flextron_budget` and `flextron_context`"
                raise invalid(key, kwargs[key], f"The elastic fields are {known}.", "Remove or rename it.")
        self._read_from = self._read_at = None
        stored = self._follow_shape()
        if stored and (differing := kwargs.get("per_layer_config")):
            layers = self.num_hidden_layers
            kwargs["per_layer_config"] = {i: sizes for i, sizes in differing.items() if int(i) < layers}
        full = {"mlp": self.intermediate_size, "heads": self.num_attention_heads}
        full |= {"hidden": self.hidden_size, "depth": self.num_hidden_layers}
        self.elastic = full_elastic(self.elastic, full)
        kwargs.setdefault("auto_map", AUTO_MAP.copy())
        super().__post_init__(**kwargs)
        self._check(stored)

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
        return self.__dict__["num_key_value_heads"] if self.grouped_queries else heads

    @property
    def grouped_queries(self) -> bool:
        """Whether query heads share KV heads, of which a layer then has as many at every size."""
        # The largest layer decides; `__dict__`, because a heterogeneous config refuses the attributes.
        return self.__dict__["num_attention_heads"] > self.__dict__["num_key_value_heads"]

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

    def owners(self) -> tuple[Owner, ...]:
        """The sub-networks with corrections of their own, smallest first."""
        return tuple(Owner.from_dict(entry, resolve(self, entry["subnetwork"])) for entry in self.corrections or ())

    @property
    def transformers_weights(self) -> str | None:
        """The index that transformers loads: in levels that of the first one which has the budget, else its default."""
        if self.levels is None or self.flextron_budget is None:
            return None
        level = level_of(self, resolve(self, self.flextron_budget))
        return None if level is None else index_name(level)

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
        dataset: str | None = None,
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
            dataset: Id of the Hub where the text lies; scores of such tasks are published in `.eval_results`.

        Raises:
            ValueError: these weights do not hold such a row.
        """
        targets = figures_of_targets(self.token_routing)
        measurable = [*held(self.frontier), *targets]
        for name in figures:
            if name not in measurable:
                rule = f"What can be measured are {', '.join(measurable)}."
                raise invalid("figures", name, rule, "Write figures of the rows that these weights hold.")
        on = Measured(text, split, tokens, time.strftime("%Y-%m-%d"), version, dataset)
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
        new._set(narrowed_fields(self, subnetwork))
        if not subnetwork.uniform:
            new.per_layer_config = {
                i: {"intermediate_size": mlp, "num_attention_heads": heads, "num_key_value_heads": self.kv_heads(heads)}
                for i, (mlp, heads) in enumerate(zip(subnetwork.mlp, subnetwork.heads, strict=True))
            }
        if self.token_routing is not None:
            new.token_routing = narrowed_routing(self, new, subnetwork.layers)
        new.corrections = [owner.to_dict() for owner in owners_within(self.owners(), subnetwork)] or None
        if new.built not in held(new.frontier).values():
            others = [row for row in new.frontier if row.name != "built"]
            rows = [new.row("built", new.built), *others]
            new.frontier = sorted(rows, key=lambda row: row.non_embedding_parameters, reverse=True)
        new._check()
        return new

    # ------------------------------------------------------------------------------------------- checking

    def validate(self) -> None:
        """Run every check again, and let what depends on the shape follow it; `save_pretrained` calls this."""
        stored = self._follow_shape()
        # It reads head counts, which a heterogeneous config has only per layer.
        PreTrainedConfig.validate(self.per_layer_config[0] if self.is_heterogeneous else self)
        self._check(stored)

    def _follow_shape(self) -> bool:
        """Let fields that follow others do so, and check them; whether choices and rows were stored for one shape."""
        stored = belong_together(self.frontier, self.elastic)
        if stored:
            self._set(fitted_layers(vars(self)))
        self._set(completed(vars(self)))
        check_dimensions(vars(self))
        return stored

    def _set(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def _check(self, stored: bool = False) -> None:
        """Check all but the dimensions; of what was `stored` together, drop what does not fit the shape."""
        if not self.learned_positions:
            check_rope(self.rope_parameters)
        check_dtype(self.dtype)
        check_tables(self.latency_tables)
        if stored:
            self._drop_misfits()
        check_elastic(self.elastic, self.built, self.anchors(), self.kv_heads)
        if self.static_router is not None:
            check_static_router(self, self.static_router)
        if self.token_routing is not None:
            check_token_routing(self, self.token_routing)
        if self.parent_non_embedding_parameters is not None:
            require_int("parent_non_embedding_parameters", self.parent_non_embedding_parameters)
        self._check_rows()
        if self.corrections is not None:
            check_corrections(self.corrections, lambda sizes: len(resolve(self, sizes).layers))
        if self.levels is not None:
            check_levels(self, self.levels)
        self.flextron_budget = plain_budget(self.flextron_budget)
        parse_budget(self.flextron_budget)
        require_int("flextron_context", self.flextron_context, minimum=0)
        terms, made, runs = self.parent_license, self.conversion, self.training_runs
        parent = {name: getattr(self, name) for name in ("parent_name", "parent_revision")}
        check_origin(parent, self.permutation, terms, made, runs, self.flextron_version)

    def _check_rows(self) -> None:
        """Read the frontier, with costs and names that are right for this shape."""
        rows = [self.row("1", self.built)] if self.frontier is None else read_rows(self, self.frontier)
        self.frontier, changed = with_exact_costs(self, rows)
        if len(self.frontier) < len(rows):
            self.levels = nothing_made(self.levels)["levels"]
        if changed:
            self.forget_measurements()  # of another shape
            self.frontier = renamed(self.frontier, self.parent_size())
        check_names(self.frontier, self.parent_size())

    def _drop_misfits(self) -> None:
        """Where choices are not those of this shape, allow what is built, and drop what was made for them."""
        wrong = misfits(self.elastic, self.built, self.anchors(), self.kv_heads)
        if not wrong:
            return
        lost = [f"elastic[{axis!r}]" for axis in wrong]
        lost += [name for name in MADE_FOR_CHOICES if getattr(self, name) is not None]
        logger.warning(f"Made for another shape, and dropped: {', '.join(lost)}.")
        self.elastic = {**self.elastic, **wrong}
        if "depth" in wrong:
            self.elastic["layer_ranking"] = []
        self._set(nothing_made(self.levels))
        self.parent_non_embedding_parameters = None
