"""Another budget in the middle of a text, on the cache of the one before."""

import copy

import pytest
import torch
from helpers import difference, elastic_of
from shapes import VARIANTS
from transformers import DynamicCache, StaticCache

GROUPED = ("gqa-wide-heads", "gqa-tied-llama3", "mistral", "qwen2", "qwen3")
GREEDY = {"do_sample": False, "return_dict_in_generate": True}


@pytest.fixture(scope="module", params=GROUPED)
def grouped(request):
    return elastic_of(request.param)


def smaller(model, **sizes):
    """A sub-network of all layers that is smaller on every other axis."""
    heads = model.config.choices("heads")[-1]
    return model.resolve_budget({"mlp": 48, "heads": heads, "hidden": 48, **sizes})


def caches(model):
    return DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=40)


@torch.no_grad()
def test_a_grouped_cache_has_one_shape_at_every_budget_of_a_depth(grouped, ids):
    sizes = [smaller(grouped), smaller(grouped, mlp=24, hidden=32), grouped.built]
    sizes.append(grouped.resolve_budget({"heads": [grouped.built.heads[0], sizes[0].heads[0]] * 2}))
    shapes = []
    for sub in sizes:
        cache = DynamicCache(config=grouped.config)
        grouped(ids, past_key_values=cache, use_cache=True, flextron_budget=sub)
        shapes.append([tuple(layer.keys.shape) for layer in cache.layers])
    assert all(shape == shapes[0] for shape in shapes)


@torch.no_grad()
@pytest.mark.parametrize("kind", [0, 1])
def test_a_conversation_goes_on_at_another_budget(grouped, ids, kind):
    def talk():
        """Small, then full by `set_budget`, then small again for one call, on one cache."""
        model, cache = grouped.share(None), caches(grouped)[kind]
        said = model.generate(ids, past_key_values=cache, max_new_tokens=4, flextron_budget=smaller(model), **GREEDY)
        model.set_budget(None)
        said = model.generate(said.sequences, past_key_values=cache, max_new_tokens=4, **GREEDY, output_logits=True)
        more = model.generate(
            said.sequences, past_key_values=cache, max_new_tokens=4, flextron_budget=smaller(model), **GREEDY
        )
        return more.sequences, torch.stack(said.logits), cache.get_seq_length()

    sequences, logits, length = talk()
    assert sequences.shape == (2, 24) and length == 23
    assert logits.isfinite().all()
    again = talk()
    assert torch.equal(sequences, again[0]) and torch.equal(logits, again[1])


@torch.no_grad()
def test_the_large_model_reads_the_cache_of_the_small_one(grouped, ids):
    """What it says differs from its own words: it is the small one's keys that it attends to."""
    cache = DynamicCache(config=grouped.config)
    grouped(ids[:, :8], past_key_values=cache, use_cache=True, flextron_budget=smaller(grouped))
    keys = cache.layers[0].keys.clone()
    mixed = grouped(ids[:, 8:], past_key_values=cache, use_cache=True).logits
    assert torch.equal(cache.layers[0].keys[:, :, :8], keys) or cache.layers[0].is_sliding
    alone = grouped(ids).logits[:, 8:]
    assert not torch.allclose(mixed, alone) and mixed.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_another_depth_is_refused_in_both_directions(variant, kind, ids):
    model = elastic_of(variant)
    for first, second in ((3, 4), (4, 3), (2, 3)):
        cache = caches(model)[kind]
        model(ids, past_key_values=cache, use_cache=True, flextron_budget={"layers": first})
        before = copy.deepcopy([layer.keys for layer in cache.layers if layer.is_initialized])
        with pytest.raises(ValueError, match=r"`past_key_values`=.*filled by the layers .* Keep the depth"):
            model(ids[:, :1], past_key_values=cache, use_cache=True, flextron_budget={"layers": second})
        after = [layer.keys for layer in cache.layers if layer.is_initialized]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        model(ids[:, :1], past_key_values=cache, use_cache=True, flextron_budget={"layers": first, "mlp": 48})
        cache.reset()  # emptied, it serves any depth
        model(ids, past_key_values=cache, use_cache=True, flextron_budget={"layers": second})


@torch.no_grad()
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in GROUPED])
def test_other_heads_of_an_ungrouped_parent_are_refused(variant, kind, ids):
    model = elastic_of(variant)
    cache = caches(model)[kind]
    model(ids, past_key_values=cache, use_cache=True, flextron_budget={"heads": 2})
    with pytest.raises(ValueError, match=r"holds 2 KV heads in layer 0, and .* has 4\. Keep the number of heads"):
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="Keep the number of heads"):
        model.generate(ids[:, :1].repeat(1, 13), past_key_values=cache, max_new_tokens=2)
    out = model(ids[:, :1], past_key_values=cache, use_cache=True, flextron_budget={"heads": 2, "mlp": 24})
    assert out.logits.isfinite().all()


@torch.no_grad()
def test_chunked_prefill_into_a_static_cache(ids):
    model = elastic_of("mha")
    options = {"max_new_tokens": 4, "do_sample": False, "flextron_budget": {"heads": 2, "layers": 3}}
    chunked = model.generate(ids, cache_implementation="static", prefill_chunk_size=5, **options)
    assert torch.equal(chunked, model.generate(ids, **options))


@torch.no_grad()
def test_a_cache_that_was_cropped_to_nothing_serves_any_depth(ids):
    model = elastic_of("gqa-wide-heads")
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True, flextron_budget={"layers": 3})
    cache.crop(-12)
    assert difference(model(ids, past_key_values=cache, use_cache=True).logits, model(ids).logits) < 1e-6


@pytest.mark.slow
@torch.no_grad()
def test_a_static_cache_that_was_initialised_early_compiles_at_a_smaller_depth(ids):
    model = elastic_of("mha")
    sub = model.resolve_budget({"layers": 3})
    cache = StaticCache(model.config, max_cache_len=20)
    cache.early_initialization(2, 4, 16, torch.float32, model.device)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    logits = compiled(ids, past_key_values=cache, use_cache=True, flextron_budget=sub).logits
    assert difference(logits, model(ids, flextron_budget=sub).logits) < 1e-5
    torch._dynamo.reset()
