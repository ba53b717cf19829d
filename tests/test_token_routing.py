"""Tokens that choose: what is computed is exactly what was chosen, in every family and every way to run."""

import copy

import pytest
import torch
from helpers import difference, elastic_of, let_tokens_choose, run_python
from torch.overrides import TorchFunctionMode

from flextron_trainer.routers.gates import RelaxedTokens
from flextron_trainer.training.router_stage import add_token_routers, spaced
from modeling_flextron import FlextronConfig, FlextronForCausalLM, token_routing
from modeling_flextron.token_routing import RoutedSubNetwork, TokenRouting

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
AUTO = "auto:0.6"


def routed(variant: str) -> FlextronForCausalLM:
    """An elastic model whose tokens want many different sizes."""
    return let_tokens_choose(elastic_of(variant))


@pytest.fixture(scope="module")
def model(variant):
    """Shared: do not change it."""
    return routed(variant)


@pytest.fixture
def text():
    """Token ids `[2, 24]`, more than are run in one piece."""
    return torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(1))


def masked(model, ids, attention_mask=None, temperature=0.1) -> tuple[torch.Tensor, RelaxedTokens]:
    """The same choices by masks on the full computation."""
    bounds = model.config.resolve(AUTO)
    tokens = None if attention_mask is None else attention_mask.bool()
    routing = RelaxedTokens(model.config, bounds, tokens, temperature, None)
    logits = model(ids, attention_mask=attention_mask, flextron_budget=bounds.bounds, routing=routing).logits
    return logits, routing


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_what_was_chosen_is_what_the_masked_reference_computes(model, text, padded):
    mask = None
    if padded:
        mask = torch.ones_like(text)
        mask[0, :7] = 0
    reference, relaxed = masked(model, text, mask)
    logits = model(text, attention_mask=mask, flextron_budget=AUTO).logits
    real = slice(None) if mask is None else mask.bool()
    assert difference(logits[real], reference[real]) < 2e-5
    chosen = model.last_routing
    for axis in ("mlp", "heads"):
        for layer, sizes in getattr(chosen, axis).items():
            assert torch.equal(sizes.float(), getattr(relaxed, axis)[layer])
    assert any(len(sizes.unique()) > 2 for sizes in chosen.mlp.values())  # or this test shows nothing
    assert chosen.cost().item() == pytest.approx(relaxed.cost().item())
    few = model(text[:1, -5:], flextron_budget=AUTO).logits
    assert difference(few, masked(model, text[:1, -5:])[0]) < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_decoding_with_a_cache_is_decoding_without(model, text, attention):
    model.set_attn_implementation(attention)
    whole = model(text, flextron_budget=AUTO, use_cache=True)
    mask = torch.ones_like(text)
    mask[1, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for extra in ({}, {"attention_mask": mask, "position_ids": positions}):
        whole = model(text, flextron_budget=AUTO, **extra)
        begin = {key: value[:, :20] for key, value in extra.items()}
        first = model(text[:, :20], flextron_budget=AUTO, use_cache=True, **begin)
        cache, logits = first.past_key_values, [first.logits]
        for i in range(20, 24):
            step = {"attention_mask": mask[:, : i + 1], "position_ids": positions[:, i : i + 1]} if extra else {}
            logits.append(model(text[:, i : i + 1], past_key_values=cache, flextron_budget=AUTO, **step).logits)
        real = mask.bool() if extra else torch.ones_like(mask).bool()
        assert difference(torch.cat(logits, dim=1)[real], whole.logits[real]) < 2e-5
    model.set_attn_implementation("sdpa")


@torch.no_grad()
def test_generate_and_lists_of_budgets(model, text):
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(text[:, :10], flextron_budget=AUTO, **greedy)
    without = model.generate(text[:, :10], flextron_budget=AUTO, use_cache=False, **greedy)
    assert torch.equal(with_cache, without)
    rows = model(text, flextron_budget=[AUTO, 0.35]).logits
    assert difference(rows[:1], model(text[:1], flextron_budget=AUTO).logits) < 1e-5
    assert difference(rows[1:], model(text[1:], flextron_budget=0.35).logits) < 1e-5
    with model.at_budget(AUTO):
        assert isinstance(model.subnetwork, RoutedSubNetwork)
        assert torch.equal(model.generate(text[:, :10], **greedy), with_cache)


@torch.no_grad()
def test_fresh_routers_run_the_static_choice(variant, text):
    model = elastic_of(variant)
    add_token_routers(model, [0.6, 0.35])
    for budget in (0.6, 0.35):
        static = model(text, flextron_budget=budget).logits
        assert difference(model(text, flextron_budget=f"auto:{budget}").logits, static) < 2e-5
    assert model.last_routing.cost().item() <= 0.36


@torch.no_grad()
def test_saved_and_loaded_with_and_without_the_package(model, text, tmp_path):
    expected = model(text, flextron_budget=AUTO).logits
    model.save_pretrained(tmp_path / "model")
    whole = FlextronForCausalLM.from_pretrained(tmp_path / "model")
    assert difference(whole(text, flextron_budget=AUTO).logits, expected) < 1e-5
    small = FlextronForCausalLM.from_pretrained(tmp_path / "model", flextron_budget="auto:0.35")
    assert small.num_parameters() <= whole.num_parameters()
    assert difference(small(text).logits, model(text, flextron_budget="auto:0.35").logits) < 1e-5
    small.save_pretrained(tmp_path / "small")
    again = FlextronForCausalLM.from_pretrained(tmp_path / "small")
    assert difference(again(text, flextron_budget="auto:0.35").logits, small(text).logits) < 1e-5
    torch.save({"ids": text, "logits": expected}, tmp_path / "expected.pt")
    run_python(
        "import torch, sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "known = torch.load(sys.argv[1] + '/expected.pt')\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/model', trust_remote_code=True,"
        f" flextron_budget={AUTO!r})\n"
        "assert (model(known['ids']).logits - known['logits']).abs().max() < 1e-5\n"
        "assert model.last_routing.average()['mlp']",
        tmp_path,
        package=False,
    )


def test_only_what_was_chosen_is_computed(monkeypatch):
    """Products counted: every token takes part in those of its own width alone."""
    model = routed("mha-tied-biased")
    text = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    done: dict[int, int] = {}
    for i, layer in enumerate(model.model.layers):
        block = layer.mlp.up_proj.block

        def counted(states, rows, columns, total=None, block=block, i=i):
            done[i] = done.get(i, 0) + len(states) * (rows.stop - rows.start)
            return block(states, rows, columns)

        monkeypatch.setattr(layer.mlp.up_proj, "block", counted)
    with torch.no_grad():
        model(text, flextron_budget=AUTO)
    assert done == {i: int(sizes.sum()) for i, sizes in model.last_routing.mlp.items()}


class Waits(TorchFunctionMode):
    """Counts what would make the host wait for a device: reading values, and shapes that depend on them."""

    READS = {"tolist", "item", "__int__", "__float__", "__bool__", "__index__", "nonzero", "masked_select", "bincount"}

    def __init__(self):
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") else ()
        masks = [i for i in (index if isinstance(index, tuple) else (index,)) if isinstance(i, torch.Tensor)]
        self.count += name in self.READS or any(mask.dtype == torch.bool for mask in masks)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [24, 6], ids=["many", "few"])
def test_a_layer_waits_for_the_device_twice(length, padded):
    """What runs next in each of its parts has the shape that was chosen; all else is known before."""
    model = routed("gqa-wide-heads")
    text = torch.randint(1, 96, (2, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length) >= torch.tensor([[0], [2]])).long() if padded else None
    bounds, counts = model.config.resolve(AUTO), []
    for budget in (bounds, bounds.bounds):
        with torch.no_grad(), Waits() as waits:
            model(text, attention_mask=mask, flextron_budget=budget)
        counts.append(waits.count)
    assert counts[0] - counts[1] == 2 * len(bounds.layers)


@pytest.mark.parametrize("variant", ["gqa-wide-heads", "gpt2"])
def test_gradients_reach_the_routers(variant, text):
    model = routed(variant)
    logits, routing = masked(model, text)
    (logits.square().mean() + routing.cost()).backward()
    layers = routing.subnetwork.layers
    for i in layers:
        for module in (model.model.layers[i].mlp, model.model.layers[i].self_attn):
            gradient = module.router.weight.grad
            assert gradient.isfinite().all()
    assert all(model.model.layers[i].mlp.router.weight.grad.abs().sum() > 0 for i in layers)


def test_targets_between_and_beside_those_trained(model, text):
    with torch.no_grad():
        model(text, flextron_budget="auto:0.5")
    assert model.last_routing.subnetwork.target == 0.5
    assert model.config.resolve("auto").target == 0.6
    for budget in ("auto:0.2", "auto:0.9"):
        with pytest.raises(ValueError, match=r"averages from 0.35 to 0.6"):
            model.set_budget(budget)
    with pytest.raises(ValueError, match="Stock classes have one size"):
        model.extract(AUTO)
    with pytest.raises(ValueError, match="no token routers"):
        elastic_of("gqa-wide-heads").set_budget(AUTO)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("mlp"), "fields mlp, heads, targets"),
        (lambda r: r.update(mlp=[24, 96]), "descend strictly"),
        (lambda r: r["targets"].reverse(), "ascend between"),
        (lambda r: r["targets"][0].pop("offset"), "list of entries"),
        (lambda r: r["targets"][0].update(heads=[16] * r["targets"][0]["layers"]), "not within the model"),
    ],
)
def test_broken_routing_is_refused(change, message):
    values = routed("gqa-wide-heads").config.to_dict()
    change(values["token_routing"])
    with pytest.raises(ValueError, match=message):
        FlextronConfig(**copy.deepcopy(values))


def test_few_sizes_of_many():
    assert spaced([8, 4], 8) == [8, 4]
    assert spaced(list(range(16, 1, -1)), 8) == [16, 14, 12, 10, 8, 6, 4, 2]
    assert token_routing.FEW < 48  # or the tests above never sort
    assert TokenRouting.norm(None, torch.relu, torch.tensor([-1.0])) == 0
