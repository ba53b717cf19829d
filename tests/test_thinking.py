"""`generate(flextron_budget={"thinking": ..., "answer": ...})`: as by hand, with a call for each part."""

import pytest
import torch
from helpers import elastic_of, let_tokens_choose, parent_of
from tokenizers import Tokenizer, models
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, StaticCache
from transformers.generation import BaseStreamer, EosTokenCriteria

END, EOS, NEW = 7, 9, 14
OPTIONS = {"max_new_tokens": NEW, "eos_token_id": EOS, "pad_token_id": 0, "do_sample": False}
SHALLOW = {"layers": 3, "mlp": 48}


def prompts(count: int) -> torch.Tensor:
    return torch.randint(10, 96, (count, 6), generator=torch.Generator().manual_seed(5))


def thinks(after: int) -> dict:
    """Let a text think for so many tokens; a model with random weights would not end by itself."""

    return {"prefix_allowed_tokens_fn": lambda _, ids: [END] if len(ids) - 6 == after else list(range(10, 96))}


def by_hand(model, ids, thinking, answer, kept: bool, **options) -> torch.Tensor:
    """Two calls, the second of which goes on with the cache of the first, where that fits."""
    options = OPTIONS | options
    cache = DynamicCache(config=model.config)
    stop = [EosTokenCriteria(END)]
    first = model.generate(ids, flextron_budget=thinking, past_key_values=cache, stopping_criteria=stop, **options)
    left = NEW - (first.shape[1] - ids.shape[1])
    if first[0, -1] != END or left == 0:
        return first
    options |= {"max_new_tokens": left, "past_key_values": cache if kept else DynamicCache(config=model.config)}
    return model.generate(first, flextron_budget=answer, **options)


CASES = {  # variant, thinking, answer, whether the cache can be kept
    "gqa": ("gqa-wide-heads", {"mlp": 48, "heads": 4, "hidden": 48}, "1", True),
    "gqa, a smaller answer": ("gqa-wide-heads", "1", {"mlp": 24}, True),
    "gqa, deeper": ("gqa-wide-heads", SHALLOW, "1", False),
    "gqa, less deep": ("gqa-wide-heads", "1", SHALLOW, False),
    "mha": ("mha", {"heads": 2}, "1", False),
    "gpt2": ("gpt2", {"mlp": 48}, "1", True),
    "gpt2, more heads": ("gpt2", {"mlp": 48, "heads": 2, "hidden": 32}, "1", False),
    "gpt2, deeper": ("gpt2", SHALLOW, "1", False),
    "windows": ("mistral", SHALLOW, "1", False),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "sample"), [*((case, False) for case in CASES), ("gqa", True), ("gpt2, deeper", True)]
)
def test_as_by_hand(case, sample):
    variant, thinking, answer, kept = CASES[case]
    model, ids, options = elastic_of(variant), prompts(1), {"do_sample": sample, **thinks(5)}
    torch.manual_seed(1)
    expected = by_hand(model, ids, thinking, answer, kept, **options)
    torch.manual_seed(1)
    budget = {"thinking": thinking, "answer": answer, "end": END}
    found = model.generate(ids, flextron_budget=budget, **OPTIONS | options)
    assert torch.equal(found, expected) and found.shape[1] == 6 + NEW and found[0, 11] == END
    torch.manual_seed(1)
    assert not torch.equal(found, model.generate(ids, flextron_budget=thinking, **OPTIONS | options))
    assert model.subnetwork == model.built


class Streamed(BaseStreamer):
    def __init__(self):
        self.tokens, self.ends = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ends += 1


@pytest.fixture
def model():
    return elastic_of("gqa-wide-heads")


def think(model, ids, budget, **options):
    return model.generate(ids, flextron_budget={"end": END, **budget}, **OPTIONS | options)


BUDGET = {"thinking": {"mlp": 24, "layers": 3}, "answer": "1"}


@torch.no_grad()
def test_streams_and_outputs_are_of_one_call(model):
    streamed, ids = Streamed(), prompts(1)
    config = GenerationConfig(return_dict_in_generate=True, output_logits=True, **OPTIONS)
    cache = DynamicCache(config=model.config)
    budget = {**BUDGET, "end": END}
    found = model.generate(ids, config, flextron_budget=budget, streamer=streamed, past_key_values=cache, **thinks(5))
    expected = by_hand(model, ids, *BUDGET.values(), kept=False, **thinks(5))
    assert torch.equal(found.sequences, expected) and len(found.logits) == NEW
    assert streamed.tokens == expected[0].tolist() and streamed.ends == 1
    assert found.past_key_values is cache and cache.get_seq_length() == 6 + NEW - 1
    assert torch.allclose(found.logits[-1], model(expected[:, :-1]).logits[:, -1], atol=1e-4)


@torch.no_grad()
def test_a_text_that_ends_before_its_thinking_does_and_one_that_never_thinks(model):
    ids = prompts(1)
    never = model.generate(ids, flextron_budget=BUDGET["thinking"], **OPTIONS, **thinks(99))
    assert torch.equal(think(model, ids, BUDGET, **thinks(99)), never)
    ends = {"prefix_allowed_tokens_fn": lambda _, ids: [EOS] if len(ids) == 9 else list(range(10, 96))}
    assert think(model, ids, BUDGET, **ends)[0, 6:].tolist() == [*never[0, 6:9].tolist(), EOS]
    again = {"prefix_allowed_tokens_fn": lambda _, ids: [END] if len(ids) in (9, 12) else list(range(10, 96))}
    assert torch.equal(think(model, ids, BUDGET, **again), by_hand(model, ids, *BUDGET.values(), False, **again))
    assert torch.equal(think(model, ids, BUDGET, use_cache=False, **thinks(5)), think(model, ids, BUDGET, **thinks(5)))


@torch.no_grad()
def test_ends_in_the_prompt(model):
    """That of an earlier turn does not count; behind one at the very end the answer begins."""
    ids = prompts(1)
    ids[0, 2] = END
    expected = by_hand(model, ids, *BUDGET.values(), False, **thinks(5))
    assert torch.equal(think(model, ids, BUDGET, **thinks(5)), expected)
    ids[0, 5] = END
    assert torch.equal(think(model, ids, BUDGET), model.generate(ids, flextron_budget="1", **OPTIONS))
    ids[0, 4:] = torch.tensor([END, 10])
    small = model.generate(ids, flextron_budget=BUDGET["thinking"], **OPTIONS)
    assert torch.equal(think(model, ids, BUDGET), small)
    assert not torch.equal(think(model, ids, BUDGET, tokenizer=tokenizer({END: "</think>", 10: "\n"})), small)


@torch.no_grad()
def test_batches(model):
    """Each sequence as if it were alone, also beside those of other budgets."""
    ids = prompts(3)
    ids[1, :2] = 0
    mask = (ids != 0).long()
    ends = {"prefix_allowed_tokens_fn": lambda _, ids: [END] if ids[-1] % 2 == 0 else list(range(10, 96))}
    alone = [think(model, row[None, start:], BUDGET, **ends)[0] for row, start in zip(ids, (0, 2, 0), strict=True)]
    assert len({(row == END).nonzero()[0].item() for row in alone}) > 1
    found = think(model, ids, BUDGET, attention_mask=mask, **ends)
    mixed = [{**BUDGET, "end": END}, {**BUDGET, "end": END}, "0.35"]
    both = model.generate(ids, attention_mask=mask, flextron_budget=mixed, **OPTIONS, **ends)
    for row, (expected, start) in enumerate(zip(alone, (0, 2, 0), strict=True)):
        assert torch.equal(found[row, start:], expected)
        assert torch.equal(both[row, start:], expected) == (row < 2)


@torch.no_grad()
def test_every_kind_of_budget_and_cache():
    model, ids = let_tokens_choose(elastic_of("gqa-wide-heads")), prompts(1)
    for budget in ({"thinking": "auto:0.6", "answer": None}, {"thinking": "0.6", "answer": "auto:0.6"}):
        for cache in (None, StaticCache(config=model.config, max_cache_len=30)):
            found = think(model, ids, budget, past_key_values=cache, **thinks(5))
            expected = by_hand(model, ids, *budget.values(), kept=False, **thinks(5))
            assert torch.equal(found[:, :12], expected[:, :12]) and found.shape == expected.shape
    model = elastic_of("mha")
    budget = {"thinking": {"mlp": 48, "heads": 2}, "answer": {"heads": 2}}
    found = think(model, ids, budget, cache_implementation="static", **thinks(5))
    assert torch.equal(found, by_hand(model, ids, *list(budget.values()), kept=True, **thinks(5)))


def test_a_static_cache_of_other_heads_is_refused_before_anything_is_written():
    model, ids, streamed = elastic_of("mha"), prompts(2), Streamed()
    budget = {"thinking": {"heads": 2}, "answer": "1", "end": END}
    cache, message = StaticCache(config=model.config, max_cache_len=30), "has one number of KV heads in a layer"
    for budgets, rows in ((budget, ids[:1]), (["1", budget], ids)):
        for options in (
            {"cache_implementation": "static"},
            {"cache_implementation": "offloaded_static"},
            {"generation_config": GenerationConfig(cache_implementation="static")},
            {"past_key_values": cache},
        ):
            with pytest.raises(ValueError, match=message):
                model.generate(rows, flextron_budget=budgets, streamer=streamed, **options)
    assert not streamed.tokens and cache.get_seq_length() == 0


def test_a_static_cache_of_one_kv_head_serves_every_size():
    parent = parent_of("gqa-wide-heads", num_key_value_heads=1)
    model, ids = elastic_of("gqa-wide-heads", parent), prompts(1)
    small, *_ = reversed(model.config.choices("heads"))
    budget = {"thinking": {"heads": small}, "answer": "1", "end": END}
    found = think(model, ids, budget, cache_implementation="static", **thinks(5))
    assert small < model.built.heads[0] and torch.equal(found, think(model, ids, budget, **thinks(5)))


def tokenizer(words: dict[int, str], template: str | None = None, response: dict | None = None):
    """A tokenizer of 96 words, some of which are given."""
    vocabulary = {words.get(i, f"w{i}"): i for i in range(96)}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "w0")))
    made.chat_template, made.response_template = template, response
    return made


class TestTheEndOfThinking:
    def generate(self, model, budget=BUDGET, **options):
        return model.generate(prompts(1), flextron_budget=budget, **OPTIONS | thinks(5) | options)

    @pytest.mark.parametrize(
        ("known", "budget"),
        [
            (tokenizer({END: "</think>"}, "{{ '<think>' }}{{ content.split('</think>')[-1] }}"), {}),
            (tokenizer({END: "<end>", 8: "</think>"}, "</think>", {"fields": {"thinking": {"close": "<end>"}}}), {}),
            (tokenizer({END: "<end>", 8: "</think>"}, "</think>"), {"end": "<end>"}),
            (None, {"end": END}),
        ],
        ids=["chat template", "response template", "text", "id"],
    )
    def test_where_it_is_found(self, model, known, budget):
        found = self.generate(model, {**BUDGET, **budget}, tokenizer=known)
        assert torch.equal(found, think(model, prompts(1), BUDGET, **thinks(5)))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({}, '`tokenizer`=None .*nobody knows which token ends the thinking.*"end": ID'),
            ({"tokenizer": tokenizer({})}, "chat template of this tokenizer has no end of thinking that is known"),
            ({"tokenizer": tokenizer({}, "</think>")}, "'</think>', which is no token of this tokenizer"),
            ({"budget": {**BUDGET, "end": 96}}, "none of the 96 tokens"),
            ({"budget": {**BUDGET, "end": -1}}, "none of the 96 tokens"),
            ({"budget": {"thinking": 0.6}}, "for `thinking` and one for the `answer`"),
            ({"budget": {**BUDGET, "mlp": 48}}, "for `thinking` and one for the `answer`"),
            ({"budget": {"thinking": "huge", "answer": 1, "end": END}}, "'huge'"),
        ],
    )
    def test_where_it_is_not(self, model, options, words):
        with pytest.raises(ValueError, match=words):
            self.generate(model, **options)


def test_what_it_cannot_do(model):
    ids = prompts(1)
    for name, value in (("draft_budget", "0.15"), ("assistant_model", model.share("0.15")), ("use_mtp", True)):
        with pytest.raises(ValueError, match=f"`{name}`=.*Drafted tokens would go beyond the end of the thinking"):
            think(model, ids, BUDGET, **{name: value})
    for name in ("num_beams", "num_return_sequences", "prompt_lookup_num_tokens"):
        for options in ({name: 2}, {"generation_config": GenerationConfig(do_sample=True, **{name: 2})}):
            with pytest.raises(ValueError, match=f"`{name}`=2 .*thinking"):
                think(model, ids, BUDGET, **options)
    for call in (
        model.set_budget,
        model.share,
        model.config.resolve,
        lambda budget: model(ids, flextron_budget=budget),
    ):
        with pytest.raises(ValueError, match="of one call of `generate`"):
            call(BUDGET)
    with pytest.raises(ValueError, match="of one call of `generate`"):
        model.generate_batch([[1, 2]], flextron_budget=BUDGET)
