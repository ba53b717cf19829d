"""A list of budgets: every sequence of a batch as if it ran alone at its own."""

import pytest
import torch
from helpers import all_sizes, difference, elastic_of
from transformers import GenerationConfig, LogitsProcessorList, SuppressTokensLogitsProcessor

from modeling_flextron import FlextronConfig, FlextronForSequenceClassification


@pytest.fixture
def padded():
    """Ids `[5, 9]` padded on the left, and their mask."""
    ids = torch.randint(1, 96, (5, 9), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(9) >= torch.tensor([0, 3, 1, 0, 4])[:, None]).long()
    return ids * mask, mask


def budgets_of(model):
    rows = model.frontier
    return [rows[1]["name"], None, all_sizes(model, 1)[-1], rows[1]["name"], rows[-1]["name"]]


def alone(ids, mask, row):
    start = int((1 - mask[row]).sum())
    return ids[row : row + 1, start:], start


@torch.no_grad()
def test_forward(elastic, padded):
    ids, mask = padded
    budgets = budgets_of(elastic)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = elastic(ids, attention_mask=mask, position_ids=positions, flextron_budget=budgets).logits
    embeds = elastic.get_input_embeddings()(ids)
    inputs = {"attention_mask": mask, "position_ids": positions, "flextron_budget": budgets}
    assert difference(elastic(inputs_embeds=embeds, **inputs).logits, logits) < 1e-5
    last = elastic(ids, logits_to_keep=1, return_dict=False, **inputs)[0]
    for row, budget in enumerate(budgets):
        own, start = alone(ids, mask, row)
        expected = elastic(own, flextron_budget=budget).logits[0]
        assert difference(logits[row, start:], expected) < 1e-5
        assert difference(last[row], expected[-1:]) < 1e-5


@torch.no_grad()
def test_generate(elastic, padded):
    ids, mask = padded
    budgets = budgets_of(elastic)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 7, "pad_token_id": 0}
    together = elastic.generate(ids, attention_mask=mask, flextron_budget=budgets, **options)
    config = GenerationConfig(num_beams=2, num_return_sequences=2, **options)
    beams = elastic.generate(ids, config, attention_mask=mask, flextron_budget=budgets)
    for row, budget in enumerate(budgets):
        own, start = alone(ids, mask, row)
        expected = elastic.generate(own, flextron_budget=budget, **options)[0]
        assert torch.equal(together[row, start : start + len(expected)], expected)
        assert not together[row, start + len(expected) :].any()
        expected = elastic.generate(own, config, flextron_budget=budget)
        found = beams[2 * row : 2 * row + 2, start : start + expected.shape[1]]
        assert torch.equal(found, expected[:, : found.shape[1]])
    with elastic.at_budget(budgets[0]):  # None is the default of the moment
        some = elastic.generate(ids, attention_mask=mask, flextron_budget=[None] * 5, **options)
    assert torch.equal(some[:, :9], ids)


def test_a_tensor_of_settings_is_no_batch(elastic, padded):
    ids, mask = padded
    options = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0, "flextron_budget": budgets_of(elastic)}
    second = elastic.generate(ids, max_new_tokens=2, eos_token_id=96, **options)[:, -1]  # which is never written
    assert elastic.generate(ids, max_new_tokens=9, eos_token_id=second.roll(1), **options).shape[1] <= ids.shape[1] + 2


def test_every_positional_argument_counts(elastic, padded):
    ids, mask = padded
    options = {"attention_mask": mask, "max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    only_five = LogitsProcessorList([SuppressTokensLogitsProcessor([i for i in range(96) if i != 5])])
    written = elastic.generate(ids, None, only_five, flextron_budget=budgets_of(elastic), **options)[:, 9:]
    assert (written == 5).all()
    with pytest.raises(TypeError, match="multiple values"):
        elastic.generate(ids, flextron_budget=budgets_of(elastic), inputs=ids, **options)


@torch.no_grad()
def test_rows_of_one_budget_run_together():
    model = elastic_of("gqa-wide-heads")
    sizes = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    model(torch.ones(5, 3, dtype=torch.long), flextron_budget=["1", "0.35", 0.35, "1", "1"])
    assert sizes == [3, 2]


@torch.no_grad()
def test_classification(ids, tmp_path):
    elastic_of("gqa-wide-heads").save_pretrained(tmp_path)
    model = FlextronForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    logits = model(ids, flextron_budget=["0.35", None]).logits
    assert difference(logits[:1], model(ids[:1], flextron_budget="0.35").logits) < 1e-5
    assert difference(logits[1:], model(ids[1:]).logits) < 1e-5


def test_what_lists_cannot_do(ids):
    model = elastic_of("gqa-wide-heads")
    with pytest.raises(ValueError, match="one budget for each sequence, and the batch has 2"):
        model(ids, flextron_budget=[0.35])
    with pytest.raises(ValueError, match="one budget for each sequence"):
        model.generate(ids, flextron_budget=[0.35, 1, 1])
    with pytest.raises(ValueError, match=r"'huge'"):
        model(ids, flextron_budget=["huge", 1])
    for name, value in (("labels", ids), ("use_cache", True), ("output_hidden_states", True)):
        with pytest.raises(ValueError, match=rf"`{name}`=.* make one call for each budget"):
            model(ids, flextron_budget=[1, 1], **{name: value})
    with pytest.raises(ValueError, match="`return_dict_in_generate`="):
        model.generate(ids, flextron_budget=[1, 1], return_dict_in_generate=True)
    with pytest.raises(ValueError, match="needs the sequences"):
        model.generate(flextron_budget=[1])
    for use in (model.set_budget, lambda budgets: FlextronConfig(flextron_budget=budgets)):
        with pytest.raises(ValueError, match=r"A list is not a budget: .* in `forward` and `generate`"):
            use([1, 1])
