"""The decoder as a Hugging Face model: attention functions, caches, generation, checkpointing, compile."""

import copy
import itertools

import pytest
import torch
from helpers import all_sizes, difference, elastic_of, parent_of, random_subnetworks
from kinds import KINDS, of_each_kind
from shapes import VARIANTS
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modeling_flextron import FlextronForCausalLM, SubNetwork, count_parameters, flops_per_token
from modeling_flextron.extraction import misfit

ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
    "longrope": {
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.1 * i for i in range(8)],
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "proportional": {"factor": 2.0},
}


def test_no_rope_type_of_transformers_is_missing():
    assert set(ROPES) == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("rope_type", ROPES)
@torch.no_grad()
def test_rope_types(rope_type, tmp_path):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **copy.deepcopy(ROPES[rope_type])}
    parent = parent_of("gqa-tied-llama3", rope_parameters=rope).double()
    elastic = elastic_of("gqa-tied-llama3", parent)
    elastic.save_pretrained(tmp_path)
    mixed = {"mlp": [96, 48, 24, 96], "heads": [4, 2, 4, 2]}
    loaded = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget=mixed)
    for length in (20, 120, 20):  # short, beyond the original length, and short again
        ids = torch.randint(1, 96, (2, length))
        assert difference(parent(ids).logits, elastic(ids).logits) < 1e-5
        assert difference(parent(ids).logits, elastic.extract()(ids).logits) < 1e-5
        assert difference(elastic(ids, flextron_budget=mixed).logits, loaded(ids).logits) < 1e-5


@torch.no_grad()
def test_eager_attention(elastic, ids):
    eager = copy.deepcopy(elastic)
    eager.set_attn_implementation("eager")
    for sub in all_sizes(elastic, count=3):
        assert difference(elastic(ids, flextron_budget=sub).logits, eager(ids, flextron_budget=sub).logits) < 1e-5


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("variant", ["gqa-wide-heads", "qwen2"])
def test_flex_attention(variant, ids):
    elastic = elastic_of(variant)
    flex = copy.deepcopy(elastic)
    flex.set_attn_implementation("flex_attention")
    for sub in (elastic.config.built, *random_subnetworks(elastic, 1)):
        assert difference(elastic(ids, flextron_budget=sub).logits, flex(ids, flextron_budget=sub).logits) < 1e-5


def test_flash_attention_is_declared():
    assert FlextronForCausalLM._supports_flash_attn and FlextronForCausalLM._supports_attention_backend


@of_each_kind
@torch.no_grad()
def test_left_padding_changes_nothing(elastic, ids):
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(17) >= 5).long().expand(2, -1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for sub in all_sizes(elastic, count=3):
        expected = elastic(ids, flextron_budget=sub).logits
        found = elastic(padded, attention_mask=mask, position_ids=positions, flextron_budget=sub).logits[:, 5:]
        assert difference(expected, found) < 1e-5
        generated = elastic.generate(ids, max_new_tokens=5, do_sample=False, flextron_budget=sub)
        again = elastic.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False, flextron_budget=sub)
        assert torch.equal(generated[:, 12:], again[:, 17:])


@of_each_kind
@torch.no_grad()
def test_hidden_states_attentions_embeddings_and_logits_to_keep(elastic, ids):
    model = copy.deepcopy(elastic)
    model.set_attn_implementation("eager")
    for sub in all_sizes(elastic, count=3):
        out = model(ids, flextron_budget=sub, output_hidden_states=True, output_attentions=True)
        assert len(out.hidden_states) == len(sub.layers) + 1
        assert all(h.shape == (2, 12, sub.hidden) for h in out.hidden_states)
        assert [a.shape[1] for a in out.attentions] == list(sub.heads)
        last = model(ids, flextron_budget=sub, logits_to_keep=1).logits
        assert last.shape[1] == 1 and difference(out.logits[:, -1:], last) < 1e-5
        embeds = model.get_input_embeddings()(ids)
        assert difference(out.logits, model(inputs_embeds=embeds, flextron_budget=sub).logits) < 1e-5


@of_each_kind
@torch.no_grad()
def test_generation_in_all_modes(elastic, ids):
    sub = elastic.resolve_budget(elastic.frontier[1]["name"])
    greedy = {"max_new_tokens": 6, "do_sample": False, "flextron_budget": sub}
    plain = elastic.generate(ids, **greedy)
    assert torch.equal(plain, elastic.generate(ids, cache_implementation="static", **greedy))
    assert torch.equal(plain, elastic.generate(ids, past_key_values=DynamicCache(config=elastic.config), **greedy))
    beams = elastic.generate(ids, num_beams=3, **greedy)
    assert torch.equal(beams, elastic.generate(ids, num_beams=3, use_cache=False, **greedy))
    torch.manual_seed(0)
    sampled = elastic.generate(ids, max_new_tokens=6, do_sample=True, flextron_budget=sub)
    torch.manual_seed(0)
    assert torch.equal(sampled, elastic.generate(ids, max_new_tokens=6, do_sample=True, flextron_budget=sub))
    with elastic.at_budget(sub):
        assert torch.equal(plain, elastic.generate(ids, max_new_tokens=6, do_sample=False))
    looked_up = elastic.generate(ids[:1], prompt_lookup_num_tokens=3, **greedy)
    assert torch.equal(looked_up, elastic.generate(ids[:1], **greedy))


@of_each_kind
@torch.no_grad()
def test_the_steps_of_contrastive_search(elastic, ids):
    """That mode lives on the Hub since transformers 5; what it does with a cache: candidates side by side, one kept."""
    sub = all_sizes(elastic, count=1)[-1]
    cache, k = DynamicCache(config=elastic.config), 3
    inputs = {"past_key_values": cache, "use_cache": True, "output_hidden_states": True, "flextron_budget": sub}
    elastic(ids, **inputs)
    cache.batch_repeat_interleave(k)
    candidates = torch.randint(1, 96, (2 * k, 1), generator=torch.Generator().manual_seed(5))
    out = elastic(candidates, **inputs)
    whole = torch.cat([ids.repeat_interleave(k, 0), candidates], dim=1)
    alone = elastic(whole, output_hidden_states=True, flextron_budget=sub)
    assert difference(out.logits[:, -1], alone.logits[:, -1]) < 1e-5
    assert difference(out.hidden_states[-1][:, -1], alone.hidden_states[-1][:, -1]) < 1e-4
    chosen = torch.tensor([1, 5])
    cache.batch_select_indices(chosen)
    after = elastic(ids[:, :1], **inputs).logits[:, -1]
    expected = elastic(torch.cat([whole[chosen], ids[:, :1]], dim=1), flextron_budget=sub).logits[:, -1]
    assert difference(after, expected) < 1e-5


@torch.no_grad()
def test_caches_have_the_head_counts_of_each_layer(tmp_path, ids):
    elastic = elastic_of("mha")
    elastic.save_pretrained(tmp_path)
    mixed = {"heads": [4, 2, 2, 4], "mlp": 48}
    loaded = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget=mixed)
    static = StaticCache(loaded.config, max_cache_len=20)
    loaded(ids, past_key_values=static, use_cache=True)
    assert [layer.keys.shape[1] for layer in static.layers] == [4, 2, 2, 4]
    for cache in (static, None):
        options = {"max_new_tokens": 5, "do_sample": False}
        expected = elastic.generate(ids, flextron_budget=mixed, **options)
        implementation = {} if cache is None else {"cache_implementation": "static"}
        assert torch.equal(expected, loaded.generate(ids, **implementation, **options))


@torch.no_grad()
def test_a_dropped_layer_leaves_its_cache_empty(elastic, ids):
    sub = elastic.resolve_budget({"layers": 2})
    cache = DynamicCache(config=elastic.config)
    elastic(ids, past_key_values=cache, use_cache=True, flextron_budget=sub)
    assert cache.get_seq_length() == 12
    assert [i for i, layer in enumerate(cache.layers) if layer.get_seq_length()] == list(sub.layers)


@of_each_kind
def test_gradients_are_equal_with_and_without_checkpointing(elastic, ids):
    for sub in all_sizes(elastic, count=2):
        gradients = []
        for checkpointing in (False, True):
            model = copy.deepcopy(elastic).train()
            if checkpointing:
                model.activation_checkpointing_enable()
            model(ids, labels=ids, flextron_budget=sub, use_cache=False).loss.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters()})
        for name, gradient in gradients[0].items():
            other = gradients[1][name]
            assert (gradient is None) == (other is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, other)


def test_gradients_stay_inside_the_subnetwork(elastic, ids):
    model = copy.deepcopy(elastic)
    sub = SubNetwork(32, (0, 2), (48, 24), (model.built.heads[0] // 2,) * 2)
    model(ids, labels=ids, flextron_budget=sub).loss.backward()
    layer = model.model.layers[0]
    assert model.model.layers[1].mlp.up_proj.weight.grad is None
    assert layer.mlp.up_proj.weight.grad[:48, :32].all()
    assert not layer.mlp.up_proj.weight.grad[48:].any() and not layer.mlp.up_proj.weight.grad[:, 32:].any()
    assert not layer.self_attn.o_proj.weight.grad[32:].any()


class TestBudgets:
    @pytest.fixture
    def model(self):
        return elastic_of("gqa-wide-heads")

    @torch.no_grad()
    def test_set_budget_and_at_budget(self, model, ids):
        small = model.resolve_budget("0.35")
        full = model(ids).logits
        expected = model(ids, flextron_budget=small).logits
        with model.at_budget("0.35"):
            assert model.subnetwork == small
            assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, full)
        model.set_budget(0.35)
        assert torch.equal(model(ids).logits, expected)
        with pytest.raises(ZeroDivisionError), model.at_budget(1.0):
            raise ZeroDivisionError
        assert model.subnetwork == small
        model.set_budget(None)
        assert torch.equal(model(ids).logits, full)

    def test_a_loaded_model_goes_down_but_not_up(self, model, ids, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget=0.6)
        assert [row["name"] for row in loaded.frontier] == [row["name"] for row in model.frontier[1:]]
        loaded.set_budget(0.35)
        expected = model(ids, flextron_budget=0.35).logits
        assert difference(expected, loaded(ids).logits) < 1e-5
        for request in (1.0, "1", model.config.frontier[0]["parameters"]):
            with pytest.raises(ValueError, match=r"Reload it .*flextron_budget='1'"):
                loaded.set_budget(request)

    def test_sharing_and_switching_allocate_nothing(self, model):
        storages = {tensor.data_ptr() for tensor in itertools.chain(model.parameters(), model.buffers())}
        draft = model.share("0.35")
        found = {tensor.data_ptr() for tensor in itertools.chain(draft.parameters(), draft.buffers())}
        assert found == storages
        assert all(a is b for a, b in zip(model.parameters(), draft.parameters(), strict=True))
        assert draft.subnetwork == model.resolve_budget("0.35") and model.subnetwork == model.built
        allocated = TensorAllocations()
        with allocated:
            model.set_budget(0.35)
            model.share(0.35)
        assert allocated.count == 0

    @torch.no_grad()
    def test_the_decoder_alone_runs_the_budget_too(self, model, ids):
        model.set_budget("0.35")
        assert model.model(ids).last_hidden_state.shape[-1] == model.subnetwork.hidden
        assert model.model.subnetwork == model.subnetwork

    @torch.no_grad()
    def test_a_budget_of_a_call_is_not_that_of_the_draft(self, model, ids):
        draft, drafted = model.share("0.15"), []
        draft.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: drafted.append(args[1]))
        greedy = {"max_new_tokens": 6, "do_sample": False}
        assisted = model.generate(ids[:1], assistant_model=draft, flextron_budget="0.6", **greedy)
        assert torch.equal(assisted, model.generate(ids[:1], flextron_budget="0.6", **greedy))
        assert drafted and set(drafted) == {draft.subnetwork.mlp[0]}
        assert model.subnetwork == model.built

    def test_a_part_of_another_shape_takes_the_rows_that_it_holds(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        part = FlextronForCausalLM.from_pretrained(tmp_path, flextron_budget={"mlp": [96, 72, 48, 96], "heads": 4})
        row = next(row for row in part.frontier if row["name"] != "built")
        cost = row["non_embedding_parameters"] / part.config.parent_size()
        part.set_budget(cost + 1e-6)
        assert part.subnetwork == part.resolve_budget(row["name"])

    @pytest.mark.parametrize("variant", KINDS)
    @pytest.mark.parametrize("budget", [None, 1])
    def test_resizing_the_vocabulary(self, variant, budget, ids, tmp_path):
        model = elastic_of(variant)
        before = model(ids).logits
        if budget is not None:
            budget = model.frontier[budget]["name"]
            model.save_pretrained(tmp_path / "whole")
            model = FlextronForCausalLM.from_pretrained(tmp_path / "whole", flextron_budget=budget)
            before = model(ids).logits
        model.resize_token_embeddings(104)
        assert difference(model(ids).logits[..., :96], before) < 1e-5
        model.save_pretrained(tmp_path / "resized")
        name = model.frontier[-1]["name"]
        loaded = FlextronForCausalLM.from_pretrained(tmp_path / "resized", flextron_budget=name)
        assert loaded.num_parameters() == loaded.frontier[0]["parameters"]
        assert difference(loaded(ids).logits, model(ids, flextron_budget=name).logits) < 1e-5

    @torch.no_grad()
    @pytest.mark.parametrize("variant", ["gqa-wide-heads", "gqa-tied-llama3"])
    def test_resizing_the_vocabulary_of_a_shared_model(self, variant, ids):
        """A twin of another vocabulary does not run, and none of its own is given to it."""
        model = elastic_of(variant)
        twin = model.share("0.35")
        inner = twin.share("0.15")
        before = model.lm_head.weight
        model.resize_token_embeddings(104)
        assert model.lm_head.weight is before and len(before) == 104  # what an optimizer holds
        for stale in (twin, inner, twin.model):
            with pytest.raises(ValueError, match=r"`config\.vocab_size`=96 .*has 104 .* Call `share` again"):
                stale(ids)
        with pytest.raises(ValueError, match="different tokenizers"):
            model.generate(ids[:1], assistant_model=twin, max_new_tokens=4)
        again = model.share("0.35")
        assert torch.equal(again(ids).logits, model(ids, flextron_budget="0.35").logits)
        greedy = {"max_new_tokens": 6, "do_sample": False}
        drafted = model.generate(ids[:1], assistant_model=again, **greedy)
        assert torch.equal(drafted, model.generate(ids[:1], **greedy))
        model.resize_token_embeddings(96)
        assert torch.equal(twin(ids).logits, model(ids, flextron_budget="0.35").logits)
        for one in (twin, twin.model, inner):
            with pytest.raises(ValueError, match=r"`new_num_tokens`=104 .*Resize the original"):
                one.resize_token_embeddings(104)
        assert twin(ids).logits.shape[-1] == model(ids).logits.shape[-1] == 96
        assert twin.resize_token_embeddings() is twin.get_input_embeddings()  # which changes nothing

    def test_a_shared_model_is_not_saved(self, model, tmp_path):
        with pytest.raises(ValueError, match="extract"):
            model.share("0.35").save_pretrained(tmp_path / "draft")
        assert not (tmp_path / "draft").exists()

    @torch.no_grad()
    def test_two_budgets_at_the_same_time(self, model, ids):
        """A budget is an argument, not state: threads at different sizes do not disturb each other."""
        from concurrent.futures import ThreadPoolExecutor

        sizes = [sub for sub in all_sizes(model)] * 4
        alone = [model(ids, flextron_budget=sub).logits for sub in sizes]
        with ThreadPoolExecutor(4) as pool, torch.no_grad():
            together = list(pool.map(lambda sub: model(ids, flextron_budget=sub).logits.detach(), sizes))
        assert all(difference(a, b) < 1e-6 for a, b in zip(alone, together, strict=True))


class TensorAllocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts every tensor operation."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_small_step_computes_no_product_of_full_size(variant, ids):
    """Slices, not masks: the counted operations are those of a dense model of the small shape."""
    elastic = elastic_of(variant)
    elastic.set_attn_implementation("eager")  # the one whose products torch counts on every device
    for sub in all_sizes(elastic, count=4):
        flops = {}
        if misfit(elastic.config, sub) is None:
            dense = elastic.extract(sub)
            dense.set_attn_implementation("eager")
            for name, model in {"ours": elastic, "dense": dense}.items():
                extra = {"flextron_budget": sub} if name == "ours" else {}
                with FlopCounterMode(display=False) as counter:
                    model(ids, labels=ids, use_cache=False, **extra).loss.backward()
                flops[name] = counter.get_total_flops()
            assert flops["ours"] == flops["dense"]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            elastic(ids, use_cache=False, flextron_budget=sub)
        attention = sum(4 * heads * elastic.config.head_dim * 12 for heads in sub.heads)
        assert counter.get_total_flops() == ids.numel() * (flops_per_token(elastic.config, sub) + attention)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("variant", ["gqa-wide-heads", "mistral", "gpt2", "neox"])
def test_compile_makes_one_graph_for_each_size(variant, ids):
    elastic = elastic_of(variant, parent_of(variant, num_hidden_layers=2), depth=[1, 0.5])
    counter = CompileCounter()
    compiled = torch.compile(elastic, fullgraph=True, dynamic=False, backend=counter)
    sizes = [elastic.config.built, random_subnetworks(elastic, 2)[1]]  # whose layers differ
    for _ in range(2):
        for sub in sizes:
            eager = elastic(ids, flextron_budget=sub).logits
            assert difference(compiled(ids, flextron_budget=sub).logits, eager) < 1e-5
    assert counter.frame_count == len(set(sizes))
    torch._dynamo.reset()


@of_each_kind
@torch.no_grad()
def test_half_precision(elastic, ids):
    half = copy.deepcopy(elastic).bfloat16()
    for sub in all_sizes(elastic, count=2):
        small = half(ids, flextron_budget=sub).logits
        assert small.dtype == torch.bfloat16
        if misfit(elastic.config, sub) is None:
            assert difference(half.extract(sub)(ids).logits, small) < 0.05 * small.abs().max().item()


def test_a_quantized_model_is_built_of_exact_linears_and_does_not_switch():
    config = copy.deepcopy(elastic_of("mha").config)
    config.quantization_config = {"quant_method": "none of ours"}
    config.flextron_budget = "0.6"
    with torch.device("meta"):
        model = FlextronForCausalLM(config)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert model.num_parameters() == count_parameters(config, config.resolve("0.6"))
    with pytest.raises(ValueError, match="quantized"):
        model.set_budget("0.35")
