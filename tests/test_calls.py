"""One model, several callers: a call's size is a value of that call, whoever else calls the same object.

A table of entry points, caller patterns, caches, attention functions and families, in which every cell must give what
a single call gives of a fresh model that is extracted at that size, or loaded for nothing else.
"""

import asyncio
import copy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import pytest
import torch
from helpers import difference, elastic_of, let_tokens_choose, parent_of
from transformers import AutoModelForCausalLM, GenerationConfig, StaticCache

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FAMILIES = ("mha", "gqa-wide-heads", "qwen2", "gpt2", "neox")
SLIDING = {"num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
BUDGETS = ("1", "0.6", "0.35", "0.15")
AUTO = "auto:0.6"
GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
IDS = torch.randint(1, 96, (1, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=[("mha", "eager"), *((family, "sdpa") for family in FAMILIES)], ids=":".join)
def model(request):
    """A family whose tokens can choose, too. Shared: its default stays the full size."""
    family, attention = request.param
    parent = parent_of(family, **(SLIDING if family == "qwen2" else {"num_hidden_layers": 2}))
    layers = parent.config.num_hidden_layers
    model = elastic_of(family, parent, depth=[layers, layers - 1])
    let_tokens_choose(model)
    model.set_attn_implementation(attention)
    return model


def at(model, budget, call: Callable) -> torch.Tensor:
    with model.at_budget(budget):
        return call()


def kept(model, budget, cache) -> torch.Tensor:
    """The logits of a text in two parts, the first of which is in a cache."""
    first = model(IDS[:, :4], past_key_values=cache, use_cache=True, flextron_budget=budget)
    second = model(IDS[:, 4:], past_key_values=first.past_key_values, flextron_budget=budget).logits
    return torch.cat((first.logits, second), dim=1)


def static(model) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=16)


# Every way to run a size. Each is called as ENTRY[name](model, budget) and gives logits or ids.
ENTRIES: dict[str, Callable] = {
    "forward": lambda model, budget: model(IDS, flextron_budget=budget).logits,
    "forward, no cache": lambda model, budget: model(IDS, flextron_budget=budget, use_cache=False).logits,
    "forward, dynamic cache": lambda model, budget: kept(model, budget, None),
    "forward, static cache": lambda model, budget: kept(model, budget, static(model)),
    "forward, list": lambda model, budget: model(IDS.repeat(2, 1), flextron_budget=["0.15", budget]).logits[1:],
    "forward, block": lambda model, budget: at(model, budget, lambda: model(IDS).logits),
    "decoder, block": lambda model, budget: model.lm_head(at(model, budget, lambda: model.model(IDS)[0])),
    "forward, twin": lambda model, budget: model.share(budget)(IDS).logits,
    "generate": lambda model, budget: model.generate(IDS, flextron_budget=budget, **GREEDY),
    "generate, no cache": lambda model, budget: model.generate(IDS, flextron_budget=budget, use_cache=False, **GREEDY),
    "generate, static cache": lambda model, budget: model.generate(
        IDS, flextron_budget=budget, cache_implementation="static", **GREEDY
    ),
    "generate, block": lambda model, budget: at(model, budget, lambda: model.generate(IDS, **GREEDY)),
    "generate, twin": lambda model, budget: model.share(budget).generate(IDS, **GREEDY),
    "generate, list": lambda model, budget: model.generate(
        IDS.repeat(2, 1), flextron_budget=["0.15", budget], **GREEDY
    )[1:],
    "generate, draft": lambda model, budget: model.generate(IDS, flextron_budget=budget, draft_budget="0.15", **GREEDY),
    "generate, twin as assistant": lambda model, budget: model.generate(
        IDS, flextron_budget=budget, assistant_model=model.share("0.15"), **GREEDY
    ),
    "generate, beams": lambda model, budget: model.generate(IDS, flextron_budget=budget, num_beams=2, **GREEDY),
}
DRAFTED = {name for name in ENTRIES if "draft" in name or "assistant" in name}


def threads(jobs: list[Callable]) -> list[torch.Tensor]:
    """Sixteen at a time."""
    often = sys.getswitchinterval() / 20
    sys.setswitchinterval(often)
    try:
        with ThreadPoolExecutor(16) as pool:
            results = list(pool.map(lambda job: job(), jobs))
    finally:
        sys.setswitchinterval(20 * often)
    return results


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and difference(a.float(), b.float()) < 1e-5


def tasks(model, jobs: list[Callable]) -> list[torch.Tensor]:
    """Every job in an asyncio task of its own, each inside a block of another size, and all blocks open at once."""

    async def run(job: Callable, around: str) -> torch.Tensor:
        with model.at_budget(around):
            await asyncio.sleep(0)
            result = job()
            await asyncio.sleep(0)
            assert model.subnetwork == model.resolve_budget(around)
        return result

    async def all_of_them() -> list[torch.Tensor]:
        return await asyncio.gather(*(run(job, BUDGETS[i % 4]) for i, job in enumerate(jobs)))

    return asyncio.run(all_of_them())


def after_an_error(model, jobs: list[Callable]) -> list[torch.Tensor]:
    """After calls at other sizes that break in the middle."""

    class Break(Exception):
        pass

    def stop(*_):
        raise Break

    for budget in ("0.15", AUTO):
        hook = model.model.layers[0].register_forward_hook(stop)
        try:
            for call in ("generate", "forward", "generate, block", "generate, list"):
                with pytest.raises(Break):
                    ENTRIES[call](model, budget)
        finally:
            hook.remove()
    with pytest.raises(Break), model.at_budget("0.15"):
        stop()
    return [job() for job in jobs]


PATTERNS: dict[str, Callable] = {
    "alone": lambda model, jobs: [job() for job in jobs],
    "threads": lambda model, jobs: threads(jobs),
    "inside blocks, as tasks": tasks,
    "after an error": after_an_error,
}


@pytest.fixture(scope="module")
@torch.no_grad()
def expected(model):
    """Of every budget the logits, the text and the text of two beams, of a model that runs at nothing else."""
    found = {}
    for budget in BUDGETS:
        stock = model.extract(budget)
        beams = stock.generate(IDS, num_beams=2, **GREEDY)
        found[budget] = {"logits": stock(IDS).logits, "text": stock.generate(IDS, **GREEDY), "beams": beams}
    alone = {"flextron_budget": AUTO, "use_cache": False}
    fresh = copy.deepcopy(model)
    text = fresh.generate(IDS, **alone, **GREEDY)
    beams = fresh.generate(IDS, num_beams=2, **alone, **GREEDY)
    found[AUTO] = {"logits": fresh(IDS, **alone).logits, "text": text, "beams": beams}
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_call_is_as_if_it_were_alone(model, expected, pattern):
    cells = [
        (entry, budget)
        for entry, budget in product(ENTRIES, expected)
        if entry not in DRAFTED or budget not in ("0.15", AUTO)  # for which nothing smaller can draft
    ]

    def job(entry: str, budget: str) -> Callable:
        def run():
            with torch.no_grad():  # which is of a thread, too
                return ENTRIES[entry](model, budget)

        return run

    results = PATTERNS[pattern](model, [job(*cell) for cell in cells])
    assert len(results) == len(cells) > 75
    wrong = []
    for (entry, budget), result in zip(cells, results, strict=True):
        kind = "logits" if result.is_floating_point() else "beams" if "beams" in entry else "text"
        if not same(result, expected[budget][kind]):
            wrong.append((entry, budget))
    assert not wrong
    assert model.subnetwork == model.built


def test_a_generation_config_has_no_budget(model):
    for name in ("flextron_budget", "draft_budget"):
        config = GenerationConfig(**{name: "0.35"}, **GREEDY)
        for args in ((IDS, config), (IDS,)):
            with pytest.raises(ValueError, match=rf"`generation_config.{name}`='0.35' .* Pass `generate\(..., {name}="):
                model.generate(*args, **({} if len(args) > 1 else {"generation_config": config}))
        own = copy.deepcopy(model)
        setattr(own.generation_config, name, 0.35)
        with pytest.raises(ValueError, match=rf"`generation_config.{name}`=0.35"):
            own.generate(IDS, **GREEDY)


def test_misspelt_keywords_are_refused(tmp_path):
    """Transformers drops them on the way to a layer, so that the full size would run."""
    model = elastic_of("mha")
    model.save_pretrained(tmp_path)
    for call in (model, model.model, partial(AutoModelForCausalLM.from_pretrained, tmp_path)):
        with pytest.raises(ValueError, match=r"`flextron_buget`=0.5 .* Did you mean `flextron_budget`"):
            call(*([] if isinstance(call, partial) else [IDS]), flextron_buget=0.5)
    with pytest.raises(ValueError, match="flextron_buget"):
        model.generate(IDS, flextron_buget=0.5, **GREEDY)


def test_an_early_exit_is_refused_and_changes_nothing(model, expected):
    own, layers = copy.deepcopy(model), model.config.num_hidden_layers
    for call in (
        lambda: own.generate(IDS, assistant_early_exit=1, **GREEDY),
        lambda: own.generate(IDS, GenerationConfig(assistant_early_exit=1, **GREEDY)),
    ):
        with pytest.raises(ValueError, match=r"`assistant_early_exit`=1 .* Pass `draft_budget="):
            call()
        assert torch.equal(own.generate(IDS, **GREEDY), expected["1"]["text"])
        assert own.config.num_hidden_layers == layers


def test_the_default_is_set_outside_of_blocks_alone(model):
    with model.at_budget("0.35"), pytest.raises(ValueError, match="Call `set_budget` outside of the block"):
        model.set_budget("0.6")
    assert model.subnetwork == model.built


def test_a_default_that_changes_is_for_later_calls(model, expected):
    own = copy.deepcopy(model)
    hook = own.lm_head.register_forward_hook(lambda *_: own.set_budget("0.15"))  # another caller, after a token
    assert torch.equal(own.generate(IDS, **GREEDY), expected["1"]["text"])
    assert torch.equal(own.generate(IDS, **GREEDY), expected["0.15"]["text"])
    hook.remove()
