"""One decoder for every family, every size of which is a prefix of its weights.

Read top to bottom: rotary positions, attention, MLP, layer, decoder, language-model head. A `SubNetwork` comes down
as an argument and each layer runs on the leading slice of its own weights (`elastic.py`); a size is passed on only
where it differs from what was built, so a model at its built size is an ordinary decoder.

Shapes: B batch, S sequence, D hidden, F neurons, H query heads, G KV heads, R = H / G query heads for each KV head,
E head_dim, V vocabulary. Query heads are stored rank-major, [R, G, E]: the r best of every group are leading rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GradientCheckpointingLayer
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .adapters import check_layers
from .caches import PAGED, check_cache, fill_skipped, most_tokens, own_cache, update_pages
from .configuration_flextron import FlextronConfig
from .corrections import Owner, number_of_owner
from .drafting import Drafts
from .elastic import (
    ElasticEmbedding,
    ElasticLinear,
    ElasticRMSNorm,
    LowRankCorrection,
    NarrowedAttention,
    corrections_of_layer,
    norm_between_layers,
    project,
)
from .errors import invalid, refuse_misspelt
from .extraction import ExtractionMixin
from .generation import FlextronGenerationMixin, per_row
from .loading import LoadingMixin
from .positions import attention_masks, check_positions, documents, real_tokens
from .saving import SavingMixin
from .subnetwork import is_routed
from .switching import SwitchingMixin
from .token_routing import Routing, TokenRouter, TokenRouting, route_layer, token_router

Observer = Callable[..., None]  # called as (kind, layer number, *tensors) while importance is measured


class FlextronRotaryEmbedding(nn.Module):
    """Cosines and sines `[B, S, E]` of the rotary positions, for every `rope_type` of transformers.

    The sines of the first half are negative, as `rotate` has them.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: FlextronConfig):
        super().__init__()
        self.config = config.per_layer_config[0]  # rope reads head counts, which are not global when layers differ
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        functions = {"default": self.compute_default_rope_parameters, **ROPE_INIT_FUNCTIONS}
        inv_freq, self.attention_scaling = functions[self.rope_type](self.config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: FlextronConfig) -> tuple[torch.Tensor, float]:
        """Inverse frequencies [E / 2] and the factor on the cosines and sines; transformers calls it by this name."""
        rope = config.rope_parameters
        size = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        return 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float) / size)), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device, torch.float)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the leading channels of `[B, heads, S, E]`, as many as cosines and sines `[B, 1, S, e]` have.

    Channel i turns with channel i + e / 2; the sines of the first half are negative.
    """
    size = cos.shape[-1]
    if size < states.shape[-1]:
        return torch.cat((rotate(states[..., :size], cos, sin), states[..., size:]), dim=-1)
    return states * cos + states.roll(size // 2, -1) * sin


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention in plain products, the one implementation that returns its weights."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class FlextronAttention(nn.Module):
    """Causal self-attention on the leading query heads.

    An MHA parent (G = H) drops a KV head with its query head. A GQA parent keeps its KV heads and runs fewer query
    heads for each, so the KV cache has the same shape at every budget.
    """

    def __init__(self, config: FlextronConfig, layer_idx: int, linear: type[nn.Linear]):
        super().__init__()
        layer = config.per_layer_config[layer_idx]
        heads, self.kv_heads = layer.num_attention_heads, layer.num_key_value_heads
        self.config = config
        self.layer_idx = layer_idx
        self.grouped_queries = config.grouped_queries
        self.head_dim = config.head_dim
        self.num_key_value_groups = heads // self.kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.q_proj = linear(config.hidden_size, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = linear(config.hidden_size, self.kv_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = linear(config.hidden_size, self.kv_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = linear(heads * self.head_dim, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = ElasticRMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = ElasticRMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.router = token_router(config)

    def kv_heads_of(self, heads: int | None) -> int:
        """KV heads that so many query heads read; None means all of them."""
        return self.kv_heads if heads is None or self.grouped_queries else heads

    def keys_and_values(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        past_key_values: Any,
        heads: int | None,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, G, S, E]` that `heads` query heads read, with those in the cache before them.

        Args:
            options: Keywords of the attention function, which the cache of an engine adds to.
        """
        kv_heads = self.kv_heads_of(heads)
        size = None if kv_heads == self.kv_heads else kv_heads * self.head_dim
        shape = (*hidden_states.shape[:2], kv_heads, self.head_dim)
        key = project(self.k_proj, hidden_states, size).view(shape)
        value = project(self.v_proj, hidden_states, size).view(shape)
        if self.k_norm is not None:
            key = self.k_norm(key)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if position_embeddings is not None:
            key = rotate(key, *position_embeddings)
        if isinstance(past_key_values, Cache):
            key, value = past_key_values.update(key, value, self.layer_idx)
        elif past_key_values is not None:
            key, value = update_pages(past_key_values, key, value, self, options)
        return key, value

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        heads: int | None = None,
        hidden: int | None = None,
        keys_and_values: tuple[torch.Tensor, torch.Tensor] | None = None,
        gate: torch.Tensor | None = None,
        correction: LowRankCorrection | None = None,
        observe: Observer | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend with the leading `heads` query heads and write `hidden` channels; None means all of them.

        Args:
            keys_and_values: What to read instead of the keys and values of `hidden_states`.
            gate: Factors `[..., H E]` of what the heads read.
            correction: Of the output projection.
        """
        # vLLM looks for the call of the attention interface in the source of this very method.
        if keys_and_values is None:
            keys_and_values = self.keys_and_values(hidden_states, position_embeddings, past_key_values, heads, kwargs)
        key, value = keys_and_values
        batch, length, _ = hidden_states.shape
        kv_heads = self.kv_heads_of(heads)
        ranks = self.num_key_value_groups if heads is None else heads // kv_heads
        query = project(self.q_proj, hidden_states, None if heads is None else heads * self.head_dim)
        query = query.view(batch, length, ranks, kv_heads, self.head_dim)
        if self.q_norm is not None:
            query = self.q_norm(query)
        query = query.permute(0, 3, 2, 1, 4).flatten(1, 2)  # [B, G R, S, E], the order attention functions expect
        if position_embeddings is not None:
            query = rotate(query, *position_embeddings)

        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation.removeprefix(PAGED), eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self if ranks == self.num_key_value_groups else NarrowedAttention(self, ranks),
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        if ranks > 1:  # back to rank-major
            attn_output = attn_output.reshape(batch, length, kv_heads, ranks, self.head_dim).transpose(2, 3)
        attn_output = attn_output.reshape(batch, length, -1)  # [B, S, R G E]
        if gate is not None:
            attn_output = attn_output * gate
        if observe is not None:
            observe("heads", self.layer_idx, attn_output)
        output = project(self.o_proj, attn_output, hidden)
        return output if correction is None else correction(attn_output, output), attn_weights


class FlextronMLP(nn.Module):
    """MLP, gated or plain, on the leading neurons."""

    def __init__(self, config: FlextronConfig, layer_idx: int, linear: type[nn.Linear]):
        super().__init__()
        size = config.per_layer_config[layer_idx].intermediate_size
        self.layer_idx = layer_idx
        self.gate_proj = linear(config.hidden_size, size, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = linear(config.hidden_size, size, bias=config.mlp_bias)
        self.down_proj = linear(size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.router = token_router(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mlp: int | None = None,
        hidden: int | None = None,
        gate: torch.Tensor | None = None,
        correction: LowRankCorrection | None = None,
        observe: Observer | None = None,
    ) -> torch.Tensor:
        """Map `[B, S, d]` through `mlp` neurons, times `gate`, to `hidden` channels; None means all of them.

        `correction` is of the down projection.
        """
        neurons, gate_proj = project(self.up_proj, hidden_states, mlp), self.gate_proj
        if gate_proj is None:
            neurons = self.act_fn(neurons)
        else:
            neurons = self.act_fn(project(gate_proj, hidden_states, mlp)) * neurons
        if gate is not None:
            neurons = neurons * gate
        if observe is not None:
            observe("mlp", self.layer_idx, neurons)
        output = project(self.down_proj, neurons, hidden)
        return output if correction is None else correction(neurons, output)


class FlextronDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and added to the residual stream, one after the other or in parallel."""

    def __init__(self, config: FlextronConfig, layer_idx: int, linear: type[nn.Linear]):
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = FlextronAttention(config, layer_idx, linear)
        self.mlp = FlextronMLP(config, layer_idx, linear)
        self.input_layernorm = norm_between_layers(config)
        self.post_attention_layernorm = norm_between_layers(config)
        self.corrections = nn.ModuleDict()  # place of an owner -> what it has here
        self.parallel_residual = config.parallel_residual
        self.residual_dropout = config.residual_dropout

    def forward(
        self,
        hidden_states: torch.Tensor,
        mlp: int | None = None,
        hidden: int | None = None,
        routing: Routing | None = None,
        owner: str | None = None,
        observe: Observer | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Run the layer with `mlp` neurons and `hidden` channels; the rest goes to the attention.

        Args:
            owner: Whose corrections it runs with.
        """
        if routing is not None:
            return route_layer(self, routing, hidden_states, mlp, hidden, **kwargs)
        norms: Any = self
        of_attention = of_mlp = None
        if owner is not None:
            norms = self.corrections[owner]
            of_attention, of_mlp = norms.o_correction, norms.down_correction
        attn_input = norms.input_layernorm(hidden_states)
        attn_output, _ = self.self_attn(attn_input, hidden=hidden, correction=of_attention, observe=observe, **kwargs)
        residual = hidden_states + self.drop(attn_output)

        mlp_input = norms.post_attention_layernorm(hidden_states if self.parallel_residual else residual)
        output = residual + self.drop(self.mlp(mlp_input, mlp, hidden, correction=of_mlp, observe=observe))
        if observe is not None:
            observe("layer", self.layer_idx, hidden_states, output)
            observe("hidden", self.layer_idx, attn_input, mlp_input)
        return output

    def drop(self, states: torch.Tensor) -> torch.Tensor:
        """Dropout of what the layer adds: no module, because calling one for nothing costs decoding microseconds."""
        return nn.functional.dropout(states, self.residual_dropout) if self.training else states


class FlextronPreTrainedModel(SwitchingMixin, LoadingMixin, SavingMixin):
    """The base of decoder and heads: budgets, loading at a budget, saving."""

    config_class = FlextronConfig
    config: FlextronConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FlextronDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": FlextronDecoderLayer, "attentions": FlextronAttention}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TokenRouter):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        if isinstance(module, LowRankCorrection):
            init.zeros_(module.up)
            init.normal_(module.down, std=module.down.shape[1] ** -0.5)


class FlextronModel(FlextronPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: FlextronConfig):
        super().__init__(config)
        config = self.config
        # Quantizers that look for the exact class get it; such a model runs at its built size only.
        linear = ElasticLinear if self.switchable else nn.Linear
        self.padding_idx = None if config.padding_is_trained else config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = ElasticEmbedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(FlextronDecoderLayer(config, i, linear) for i in range(config.num_hidden_layers))
        self.norm = norm_between_layers(config)
        self.set_owners(config.owners())
        learned = config.learned_positions
        self.embed_positions = ElasticEmbedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.rotary_emb = None if learned else FlextronRotaryEmbedding(config)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.gradient_checkpointing = False
        self.post_init()
        if not config.gated_mlp:
            self._tp_plan.pop("layers.*.mlp.gate_proj", None)

    def set_owners(self, owners: Sequence[Owner]) -> None:
        """Make room for what these own, instead of those that owned something; whoever calls it fills it."""
        self.owners, like = tuple(owners), next(self.norm.parameters())
        for place, layer in enumerate(self.layers):
            layer.corrections = corrections_of_layer(self.config, owners, place).to(like)
        lasts = [norm_between_layers(self.config, owner.subnetwork.hidden) for owner in owners]
        ends = {str(number): nn.ModuleDict({"norm": last}) for number, last in enumerate(lasts)}
        self.corrections = nn.ModuleDict(ends).to(like)  # place of an owner -> its last norm

    def embed(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, hidden: int | None
    ) -> torch.Tensor:
        """Embed token ids `[B, S]` in `hidden` channels, or take these of what is embedded already."""
        if inputs_embeds is None and input_ids is not None:
            return project(self.embed_tokens, input_ids, hidden)
        if inputs_embeds is not None and input_ids is None:
            return inputs_embeds[..., :hidden]
        both = (input_ids is not None, inputs_embeds is not None)
        raise invalid("input_ids, inputs_embeds", both, "Exactly one of the two is needed.", "Pass one of them.")

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        flextron_budget: Any = None,
        routing: Routing | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Run the decoder at `flextron_budget` (None: the default of `set_budget`).

        Args:
            input_ids: Token ids `[B, S]`; or pass `inputs_embeds` `[B, S, D]`, of which a narrower hidden size
                uses the leading channels.
            attention_mask: `[B, S]` with zeros at padding, or a prepared 4-D mask.
            position_ids: `[B, S]`; documents whose positions do not follow each other do not see each other.
            cache: What transformers calls `past_key_values` from version 5.24 on; also the pages of an engine that
                batches requests.
            routing: Runs the parts of every layer while sizes are being learned.
        """
        if kwargs:
            refuse_misspelt(kwargs, "flextron_budget")
        if self._shared and (tokens := len(self.embed_tokens.weight)) != self.config.vocab_size:
            rule = f"The model that this one shares its parameters with has {tokens} tokens since."
            raise invalid("config.vocab_size", self.config.vocab_size, rule, "Call `share` again.")
        subnetwork, built = self.resolve_budget(flextron_budget), self.built
        hidden = None if subnetwork.hidden == built.hidden else subnetwork.hidden
        if hidden is not None:
            check_layers([layer for layer in self.layers if type(layer) is not FlextronDecoderLayer])
        hidden_states = self.embed(input_ids, inputs_embeds, hidden)
        length = hidden_states.shape[1]

        # What every token may see: tokens before it in a cache, and in a row of several documents those of its own.
        cache = cache if past_key_values is None else past_key_values
        past_key_values = own_cache(cache, self.config)
        places = None
        if cache is past_key_values:  # an engine with pages for a cache keeps its texts apart itself
            places = documents(position_ids, attention_mask, cache, use_cache)
        use_cache = use_cache and places is None  # a cache continues one text
        if use_cache and cache is None:
            cache = past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            check_cache(past_key_values, self.config, subnetwork, attention_mask)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if not (given := position_ids is not None):
            position_ids = (torch.arange(length, device=hidden_states.device) + seen).unsqueeze(0)
        kinds = self.config.layer_types
        masks, options = attention_masks(self.config, hidden_states, attention_mask, past_key_values, places)
        kwargs |= options

        position_embeddings = None
        if self.rotary_emb is not None:
            cos, sin = self.rotary_emb(hidden_states, position_ids)
            position_embeddings = cos.unsqueeze(1), sin.unsqueeze(1)  # the same for every head
        if self.embed_positions is not None:
            limit, most = self.config.max_position_embeddings, most_tokens(cache, seen, length)
            check_positions(position_ids, limit, most, given)
            hidden_states = hidden_states + project(self.embed_positions, position_ids, hidden)
        hidden_states = self.dropout(hidden_states)

        if routing is None and is_routed(subnetwork):
            routing = TokenRouting(self.config, subnetwork, real_tokens(attention_mask, seen, length))
        owner = None if routing is not None else number_of_owner(self.owners, subnetwork)
        layers = list(self.layers)
        for layer, mlp, heads in zip(subnetwork.layers, subnetwork.mlp, subnetwork.heads, strict=True):
            hidden_states = layers[layer](
                hidden_states,
                mlp=None if mlp == built.mlp[layer] else mlp,
                heads=None if heads == built.heads[layer] else heads,
                hidden=hidden,
                routing=routing,
                owner=owner,
                attention_mask=masks[kinds[layer]],
                position_embeddings=position_embeddings,
                position_ids=position_ids if places is None else places,
                past_key_values=cache,
                use_cache=use_cache,
                **kwargs,
            )
        if use_cache and len(subnetwork.layers) < len(built.layers):
            fill_skipped(past_key_values, subnetwork.layers)
        if isinstance(routing, TokenRouting):
            self._last_routing = routing  # now that it is complete: others may be looking
        ends: Any = self if owner is None else self.corrections[owner]
        last = ends.norm
        hidden_states = last(hidden_states) if routing is None else routing.norm(last, hidden_states)
        return BaseModelOutputWithPast(hidden_states, past_key_values if use_cache else None)


class FlextronForCausalLM(FlextronPreTrainedModel, FlextronGenerationMixin, ExtractionMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: FlextronConfig):
        super().__init__(config)
        self.model = FlextronModel(self.config)
        self.vocab_size = self.config.vocab_size
        self.lm_head = ElasticLinear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.drafts = Drafts()
        self.post_init()

    @can_return_tuple
    @per_row
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Any = None,
        flextron_budget: Any = None,
        head_loss: Callable[[torch.Tensor, nn.Module], torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Predict the next tokens at `flextron_budget` (None: the default of `set_budget`; a list: one for each row).

        Args:
            labels: Ids `[B, S]` to predict, shifted here; -100 is ignored.
            logits_to_keep: Compute only the last so many logits, or those at these positions; 0 for all.
            head_loss: Called as `head_loss(hidden_states, lm_head)` instead of computing logits, for losses
                that never hold `[B, S, V]`; its value is the `loss` of the output, and `logits` is None.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache if past_key_values is None else past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            flextron_budget=self.resolve_budget(flextron_budget),
            **kwargs,
        )
        logits, hidden_states = None, outputs.last_hidden_state
        if head_loss is not None:
            loss = head_loss(hidden_states, self.lm_head)
        else:
            logits = project(self.lm_head, slice_logits_to_keep(hidden_states, logits_to_keep), None)
            loss = None
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class FlextronForSequenceClassification(GenericForSequenceClassification, FlextronPreTrainedModel):
    """The decoder with a linear classifier on the last token of each sequence."""

    def __init__(self, config: FlextronConfig):
        # Past the constructor of the generic class: it looks for the decoder in `AutoModel`, which needs the package.
        FlextronPreTrainedModel.__init__(self, config)
        self.num_labels = self.config.num_labels
        self.model = FlextronModel(self.config)
        self.score = ElasticLinear(self.config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    forward = can_return_tuple(per_row(GenericForSequenceClassification.forward))


FlextronModel.register_for_auto_class("AutoModel")
FlextronForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
FlextronForCausalLM.register_for_auto_class("AutoModelForCausalLM")
FlextronConfig.register_for_auto_class()
