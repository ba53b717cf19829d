"""What only a GPU can show. Rehearsed elsewhere: `FLEXTRON_TEST_DEVICE=cpu pytest -m gpu` runs all of it on the CPU."""

import copy
import os
import warnings

import pytest
import torch
from helpers import elastic_of, let_tokens_choose, parent_of

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments
from modeling_flextron import FlextronForCausalLM
from modeling_flextron.frontier import held

DEVICE = os.environ.get("FLEXTRON_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else None)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE is None, reason="there is no CUDA device")]
FAMILIES = ("gqa-tied-llama3", "qwen3", "gpt2", "neox")
VARIANT = "gqa-tied-llama3"
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True)
def exact_products():
    """Float32 products in float32, which TF32 would round."""
    torch.backends.cuda.matmul.allow_tf32 = False


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(ids.to(model.device), **inputs).logits.float().cpu()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_every_row_is_the_same_there(variant, attention, ids, tmp_path):
    here = elastic_of(variant)
    here.save_pretrained(tmp_path)
    there = FlextronForCausalLM.from_pretrained(tmp_path, device_map=DEVICE, attn_implementation=attention)
    for row in held(here.frontier).values():
        expected = logits(here, ids, flextron_budget=row)
        torch.testing.assert_close(logits(there, ids, flextron_budget=row), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("variant", FAMILIES)
def test_bfloat16_is_near(variant, ids):
    here = elastic_of(variant)
    there = copy.deepcopy(here).to(DEVICE, torch.bfloat16)
    for row in held(here.frontier).values():
        expected, found = (logits(model, ids, flextron_budget=row) for model in (here, there))
        assert (found - expected).norm() / expected.norm() < 0.05


def test_levels_go_straight_onto_the_device(tmp_path, ids):
    here = elastic_of(VARIANT)
    here.export(tmp_path / "levels")
    for name, row in held(here.frontier).items():
        there = FlextronForCausalLM.from_pretrained(tmp_path / "levels", flextron_budget=name, device_map=DEVICE)
        assert there.device.type == torch.device(DEVICE).type
        torch.testing.assert_close(logits(there, ids), logits(here, ids, flextron_budget=row), atol=2e-4, rtol=2e-4)


def test_a_compiled_forward_is_the_same(ids):
    model = elastic_of(VARIANT).to(DEVICE)
    small = list(held(model.frontier).values())[-1]
    compiled = torch.compile(model, mode="reduce-overhead", dynamic=False)
    for row in (None, small):
        found = logits(compiled, ids, flextron_budget=row)  # the second call replays the graph of the first
        found = logits(compiled, ids, flextron_budget=row)
        torch.testing.assert_close(found, logits(model, ids, flextron_budget=row), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_caches_write_what_the_cpu_writes(cache, ids):
    here = elastic_of(VARIANT)
    there = copy.deepcopy(here).to(DEVICE)
    for row in held(here.frontier).values():
        expected = here.generate(ids, max_new_tokens=8, flextron_budget=row, **GREEDY)
        options = {"cache_implementation": cache, "disable_compile": True}
        found = there.generate(ids.to(DEVICE), max_new_tokens=8, flextron_budget=row, **options, **GREEDY)
        assert torch.equal(found.cpu(), expected)


def test_drafts_and_lists_write_what_plain_calls_write(ids):
    model = elastic_of(VARIANT).to(DEVICE)
    ids, (large, *_, small) = ids.to(DEVICE), held(model.frontier).values()
    for row in ids:
        plain = model.generate(row[None], max_new_tokens=12, **GREEDY)
        assert torch.equal(model.generate(row[None], max_new_tokens=12, draft_budget=small, **GREEDY), plain)
    listed = model.generate(ids, max_new_tokens=8, flextron_budget=[small, large], **GREEDY)
    for row, budget, found in zip(ids, (small, large), listed, strict=True):
        assert torch.equal(found[None], model.generate(row[None], max_new_tokens=8, flextron_budget=budget, **GREEDY))


def test_tokens_choose_alike_and_wait_twice_a_layer(ids):
    here = let_tokens_choose(elastic_of(VARIANT))
    there = copy.deepcopy(here).to(DEVICE)
    expected = logits(here, ids, flextron_budget="auto:0.6")
    torch.testing.assert_close(logits(there, ids, flextron_budget="auto:0.6"), expected, atol=1e-3, rtol=1e-3)
    if DEVICE == "cpu":
        return  # it never waits for itself
    inputs = ids.to(DEVICE)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits, torch.no_grad():
            warnings.simplefilter("always")
            there(inputs, flextron_budget="auto:0.6", use_cache=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    layers = there.config.num_hidden_layers
    assert sum("synchroniz" in str(wait.message) for wait in waits) <= 2 * layers + 2


@pytest.mark.parametrize("bf16", [False, True])
def test_a_training_step_is_that_of_the_cpu(bf16, tmp_path):
    rows = [{"input_ids": row} for row in torch.randint(1, 96, (8, 24), generator=torch.Generator().manual_seed(3))]
    trained = {}
    for device in ("cpu", DEVICE):
        model = elastic_of(VARIANT)
        arguments = FlextronTrainingArguments(
            str(tmp_path / device), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none",
            use_cpu=device == "cpu", bf16=bf16 and device != "cpu", save_strategy="no", disable_tqdm=True,
            optim="sgd", subnetworks_per_step=4, loss_chunk_size=16,
        )  # fmt: skip
        FlextronTrainer(model, arguments, teacher=parent_of(VARIANT), train_dataset=rows).train()
        trained[device] = {name: value.detach().cpu() for name, value in model.named_parameters()}
    start = dict(elastic_of(VARIANT).named_parameters())
    for name, value in trained[DEVICE].items():
        moved = trained["cpu"][name] - start[name].detach()
        difference = (value - trained["cpu"][name]).norm()
        assert difference <= (0.2 if bf16 else 1e-3) * moved.norm() + 1e-7, name
