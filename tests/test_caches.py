"""Every cache, attention function and kind of budget together: what one call without a cache computes, or a refusal."""

import functools
import gc
import inspect
import itertools

import pytest
import torch
from flash import flash  # noqa: F401  a fixture
from helpers import difference, elastic_of, random_subnetworks
from test_token_routing import AUTO, routed
from transformers import Cache, ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache, cache_utils
from transformers.generation.continuous_batching import initialization

from modeling_flextron import FlextronForCausalLM

VARIANTS = ("mha", "mistral", "qwen2", "gpt2")
ATTENTION = ("sdpa", "eager", "flash_attention_2")
EXACT = {
    "none": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "grown": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=30),
}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 95, "pad_token_id": 0}
PAGES = ContinuousBatchingConfig(page_size=4, num_blocks=32, max_batch_tokens=16)
PROMPT, PADDING = 20, 3  # tokens; more than are run in one piece


@functools.cache
def shared(variant: str) -> FlextronForCausalLM:
    return routed(variant)


@functools.cache
def budgets(variant: str) -> list:
    return [None, "0.35", *random_subnetworks(shared(variant), 1, seed=2), AUTO]


def text() -> torch.Tensor:
    return torch.randint(1, 95, (2, PROMPT + 1), generator=torch.Generator().manual_seed(3))


@functools.cache
def at_once(variant: str, budget) -> torch.Tensor:
    """What a text gives in one call."""
    shared(variant).set_attn_implementation("sdpa")
    return shared(variant)(text(), flextron_budget=budget, use_cache=False).logits


def in_steps(model, cache, padded: bool, **options) -> torch.Tensor:
    """What it gives in two, the first row padded on the left, if at all."""
    ids, mask = text(), torch.ones(2, PROMPT + 1 + PADDING, dtype=torch.long)
    if padded:
        ids = torch.nn.functional.pad(ids, (PADDING, 0))
        ids[1], mask[0, :PADDING] = ids[1].roll(-PADDING), 0
        ids[1, -PADDING:] = ids[1, :PADDING]  # the second row has more tokens
    options |= {"past_key_values": cache, "use_cache": cache is not None}
    stops = (0, ids.shape[1] - 1, ids.shape[1]) if cache is not None else (0, ids.shape[1])
    steps = []
    for begin, end in itertools.pairwise(stops):
        more = {"attention_mask": mask[:, :end]} if padded else {}
        if padded:
            more["position_ids"] = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, begin:]
        steps.append(model(ids[:, begin:end], **more, **options).logits)
    logits = torch.cat(steps, dim=1)
    return torch.stack([logits[0, -PROMPT - 1 :], logits[1, : PROMPT + 1]])


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("cache", EXACT)
def test_a_text_in_steps_is_the_text_at_once(attention, cache, flash):  # noqa: F811
    for variant, padded in itertools.product(VARIANTS, (False, True)):
        for budget in budgets(variant):
            expected, model = at_once(variant, budget), shared(variant)
            model.config._attn_implementation = attention
            try:
                found = in_steps(model, EXACT[cache](model.config), padded, flextron_budget=budget)
            except ValueError as error:
                assert (attention, cache, padded) == ("flash_attention_2", "static", False), error
                assert "`attention_mask`=None cannot be used. It is all that tells" in str(error)
            else:
                assert difference(found, expected) < 3e-5, (variant, padded, budget)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["mha", "qwen2"])
def test_flex_attention(variant):
    """Not compiled, which takes a minute."""
    expected, model = {budget: at_once(variant, budget) for budget in ("0.35", AUTO)}, shared(variant)
    model.config._attn_implementation = "flex_attention"
    with torch.compiler.set_stance("force_eager"):
        for budget, logits in expected.items():
            for cache in ("none", "dynamic"):
                found = in_steps(model, EXACT[cache](model.config), cache == "dynamic", flextron_budget=budget)
                assert difference(found, logits) < 3e-5
        with pytest.raises(ValueError, match=r"`past_key_values`='StaticCache' .*asks a static cache for its length"):
            in_steps(model, EXACT["static"](model.config), False)


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTION)
def test_generate_with_every_kind_of_cache(attention, flash):  # noqa: F811
    """Greedy text of a static budget, of tokens that choose and of a list of both is that without a cache."""
    model, ids = shared("gqa-wide-heads"), text()
    model.config._attn_implementation = attention
    for budget in ("0.35", AUTO, ["0.35", AUTO]):
        expected = model.generate(ids, use_cache=False, flextron_budget=budget, **GREEDY)
        for cache in ("dynamic", "static"):
            found = model.generate(ids, cache_implementation=cache, flextron_budget=budget, **GREEDY)
            assert torch.equal(found, expected)


@torch.no_grad()
def test_a_quantized_cache_rounds_as_with_the_stock_model():
    model = elastic_of("mha")
    stock = model.extract("0.35")
    caches = [cache_utils.QuantizedCache("fp8", config=one.config) for one in (stock, model)]
    found = in_steps(model, caches[1], False, flextron_budget="0.35")
    assert difference(found, in_steps(stock, caches[0], False)) < 1e-4
    assert difference(found, in_steps(stock, None, False)) > 1e-3  # or nothing was rounded


def test_other_caches():
    """All that transformers has, so that a new one is looked at."""
    known = {Cache, DynamicCache, StaticCache, cache_utils.QuantizedCache}
    drafts = {cache_utils.DFlashCache, cache_utils.MtpCache}  # dynamic ones, which models of theirs make themselves
    found = {kind for _, kind in inspect.getmembers(cache_utils, inspect.isclass) if issubclass(kind, Cache)}
    assert found == {*known, *drafts, cache_utils.EncoderDecoderCache}
    model, ids = shared("mha"), text()
    of_two = cache_utils.EncoderDecoderCache(DynamicCache(), DynamicCache())
    for cache, name in ((of_two, "EncoderDecoderCache"), ((), "tuple"), ({}, "dict")):
        with pytest.raises(ValueError, match=f"`past_key_values`='{name}' .*a `Cache` of a decoder alone"):
            model(ids, past_key_values=cache)
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True  # which cannot be made without a GPU
    with pytest.raises(ValueError, match=r"offloading=True.*this sub-network skips some"):
        model(ids, past_key_values=offloaded, flextron_budget={"layers": 2})


class TestContinuousBatching:
    """`generate_batch` writes what `generate` does for each prompt alone."""

    @pytest.fixture(autouse=True)
    def few_objects_to_collect(self):
        # Every call collects garbage more than once, among all that the tests before have made.
        gc.freeze()
        yield
        gc.unfreeze()

    @pytest.fixture
    def prompts(self):
        """Ids of two texts that begin alike, and of a short one."""
        first, second = text()
        return [first.tolist(), first[:9].tolist() + second[:2].tolist(), second[:3].tolist()]

    def check(self, model, prompts, expected, **options):
        found = model.generate_batch(
            prompts,
            generation_config=GenerationConfig(**GREEDY),
            continuous_batching_config=PAGES,
            warmup=False,
            **options,
        )
        assert [request.error for request in found.values()] == [None] * 3
        for prompt, request in zip(prompts, found.values(), strict=True):
            assert request.generated_tokens == expected(torch.tensor([prompt]))[0, len(prompt) :].tolist()

    @torch.no_grad()
    @pytest.mark.parametrize("variant", ["gqa-wide-heads", *VARIANTS])
    def test_at_every_kind_of_budget(self, variant, prompts, flash):  # noqa: F811
        model = shared(variant)
        for budget, attention in zip(budgets(variant), (*ATTENTION, "sdpa"), strict=True):
            model.config._attn_implementation = attention
            alone = functools.partial(model.generate, flextron_budget=budget, **GREEDY)
            self.check(model, prompts, alone, flextron_budget=budget)
            assert model.config._attn_implementation == attention and model.subnetwork == model.built

    @torch.no_grad()
    def test_pages_that_a_kernel_reads_itself(self, prompts, flash, monkeypatch):  # noqa: F811
        monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", lambda *_: None)  # asks for CUDA
        model = shared("mha")
        model.config._attn_implementation = "flash_attention_2"
        for budget in budgets("mha"):
            alone = functools.partial(model.generate, flextron_budget=budget, **GREEDY)
            self.check(model, prompts, alone, flextron_budget=budget)

    @torch.no_grad()
    def test_a_model_whose_layers_differ_and_one_that_changes(self, prompts, tmp_path):
        model = elastic_of("mha")
        model.save_pretrained(tmp_path)
        mixed = {"heads": [4, 2, 2, 4], "mlp": 48}
        loaded = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget=mixed)
        self.check(loaded, prompts, functools.partial(loaded.generate, **GREEDY))
        assert not loaded.config.allow_global_per_layer_attribute_access
        model.set_budget("0.35")
        expected = [model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :].tolist() for prompt in prompts]
        self.check(model, prompts, functools.partial(model.generate, **GREEDY))
        settings = {"generation_config": GenerationConfig(**GREEDY), "continuous_batching_config": PAGES}
        with model.continuous_batching_context_manager(**settings, warmup=False) as manager:
            model.set_budget(None)
            for prompt, tokens in zip(prompts, expected, strict=True):
                request = manager.add_request(prompt, max_new_tokens=5)
                assert manager.get_result(request, timeout=60).generated_tokens == tokens

    def test_what_it_cannot_do(self, prompts):
        model = elastic_of("mha")
        with pytest.raises(ValueError, match="A list is not a budget"):
            model.generate_batch(prompts, flextron_budget=[1, 1, 1])
        model.set_attn_implementation("paged|eager")
        with pytest.raises(ValueError, match=r"`attn_implementation`='paged\|eager' .*for `generate_batch` alone"):
            model(text())
