"""Documents that share a block but do not see each other: the same as each document alone."""

import datasets
import pytest
import torch
from flash import flash  # noqa: F401  a fixture
from helpers import difference, elastic_of, parent_of, random_subnetworks
from test_data import tokenizer  # noqa: F401  a fixture
from test_token_routing import AUTO, routed
from training import VARIANT, arguments

from flextron_trainer import FlextronTrainer
from flextron_trainer.data import collator, pack
from flextron_trainer.evaluation.quality import evaluate_model
from flextron_trainer.training.batches import read_batch

LENGTHS = ((9, 1, 14), (24,), (3, 12, 9))  # documents of each block


def documents(seed: int = 5) -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(1, 96, (n,), generator=generator).tolist() for n in lengths] for lengths in LENGTHS]


def packed(blocks: list[list[list[int]]]) -> list[dict[str, list[int]]]:
    """The rows that `pack` makes of documents that fill their blocks."""
    return [
        {
            "input_ids": [token for document in block for token in document],
            "labels": [token if i else -100 for document in block for i, token in enumerate(document)],
            "position_ids": [i for document in block for i in range(len(document))],
        }
        for block in blocks
    ]


def alone(blocks: list[list[list[int]]]) -> list[dict[str, list[int]]]:
    return [{"input_ids": document} for block in blocks for document in block]


def same_as_alone(model, budget, atol: float = 2e-5) -> None:
    """Logits of the blocks are those of their documents, and so are gradients."""
    blocks = documents()
    batch = collator()(packed(blocks))
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    logits = model(**batch, use_cache=False, flextron_budget=budget).logits
    parts = [
        model(torch.tensor([document]), use_cache=False, flextron_budget=budget).logits[0]
        for b in blocks
        for document in b
    ]
    assert difference(logits.flatten(0, 1), torch.cat(parts)) < atol
    joined = model(input_ids=batch["input_ids"], use_cache=False, flextron_budget=budget).logits
    assert difference(joined[0], logits[0]) > 1e-2  # what crosses a boundary matters
    assert difference(joined[1], logits[1]) < atol
    if not model.training:
        return
    targets = [torch.tensor(document)[1:] for b in blocks for document in b]
    expected = sum(
        torch.nn.functional.cross_entropy(part[:-1], target, reduction="sum")
        for part, target in zip(parts, targets, strict=True)
        if len(target)
    )
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss, expected)]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or difference(one, other) < 1e-4 * max(1.0, other.abs().max().item())


@pytest.mark.parametrize(
    ("variant", "attention"),
    [("gqa-wide-heads", "sdpa"), ("gqa-wide-heads", "eager"), ("gpt2", "sdpa"), ("mistral", "sdpa")],
)
def test_a_block_is_its_documents_at_every_size(variant, attention):
    model = elastic_of(variant).train()
    model.set_attn_implementation(attention)
    for budget in (None, "0.35", *random_subnetworks(model, 1)):
        same_as_alone(model, budget)


@torch.no_grad()
def test_a_block_is_its_documents_when_tokens_choose():
    same_as_alone(routed("gqa-wide-heads"), AUTO, atol=1e-4)


@pytest.mark.parametrize("teacher", ["parent", "self"])
def test_training_on_blocks_is_training_on_documents(tmp_path, teacher):
    """The teacher keeps them apart, too; so does evaluation."""
    logs = []
    for make in (packed, alone):
        data, parent = make(documents()), parent_of(VARIANT)
        run = FlextronTrainer(
            elastic_of(VARIANT, parent),
            arguments(tmp_path, max_steps=2, per_device_train_batch_size=len(data), optim="sgd"),
            teacher=parent if teacher == "parent" else teacher,
            train_dataset=data,
            eval_dataset=data,
        )
        before = evaluate_model(run.model, data, budget="0.35")["loss"]
        run.train()
        kept = [[log[key] for key in ("loss_1", "loss_0.15", "grad_norm")] for log in run.state.log_history[:2]]
        logs.append([before, run.evaluate()["eval_loss"], *kept[0], *kept[1]])
    assert logs[0] == pytest.approx(logs[1], rel=2e-3, abs=1e-5)


def test_flash_attention_of_a_stock_teacher_is_refused_for_several_blocks(tmp_path):
    parent = parent_of(VARIANT)
    run = FlextronTrainer(elastic_of(VARIANT), arguments(tmp_path), teacher=parent, train_dataset=packed(documents()))
    run.teacher.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"`attn_implementation`='flash_attention_2' cannot be used\. A stock teacher"):
        run.train()


def test_training_with_flash_attention(tmp_path, flash):  # noqa: F811
    logs = []
    for attention in ("sdpa", "flash_attention_2"):
        model = elastic_of(VARIANT)
        model.config._attn_implementation = attention
        changes = {"max_steps": 1, "per_device_train_batch_size": len(LENGTHS)}
        run = FlextronTrainer(model, arguments(tmp_path, **changes), teacher="self", train_dataset=packed(documents()))
        run.train()
        logs.append([run.state.log_history[0][name] for name in ("loss_1", "loss_0.15", "grad_norm")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_pack_marks_documents(tokenizer):  # noqa: F811
    rows = datasets.Dataset.from_dict({"text": ["w2 w3 w4", "w5", "", "w6 w7 w8 w9 w10 w11"]})
    blocks = pack(rows, tokenizer, 4, document_boundaries=True)
    assert blocks["input_ids"][:] == [[2, 3, 4, 1], [5, 1, 1, 6], [7, 8, 9, 10]]
    assert blocks["position_ids"][:] == [[0, 1, 2, 3], [0, 1, 0, 0], [0, 1, 2, 3]]
    assert blocks["labels"][:] == [[-100, 3, 4, 1], [-100, 1, -100, -100], [-100, 8, 9, 10]]
    stream = pack(rows.to_iterable_dataset(), tokenizer, 4, document_boundaries=True)
    assert list(stream) == list(blocks)


@pytest.mark.parametrize("first", [0, 1])
@torch.no_grad()
def test_no_token_sees_padding_that_rows_bring(first):
    """Which positions may count, beside a row of several documents, and whichever row has positions."""
    model = elastic_of("gqa-wide-heads")
    padded = {"input_ids": [9, 5, 6, 7], "attention_mask": [0, 1, 1, 1], "position_ids": [0, 1, 2, 3]}
    several = {"input_ids": [8, 4, 3, 2], "position_ids": [0, 1, 0, 1]}
    alone = {"input_ids": [3, 2, 1, 8]}
    batch = collator()([alone, padded, several] if first else [padded, several, alone])
    batch = read_batch(batch, None, None, torch.device("cpu"))
    batch.pop("labels")
    logits = model(**batch).logits
    for row, part in enumerate(
        (slice(0, 4), slice(1, 4), slice(2, 4)) if first else (slice(1, 4), slice(2, 4), slice(0, 4))
    ):
        expected = model(batch["input_ids"][row : row + 1, part]).logits
        torch.testing.assert_close(logits[row : row + 1, part], expected)


def test_padding_is_apart_too():
    rows = packed(documents())
    short = {key: values[:20] for key, values in rows[0].items()}
    batch = collator()([rows[1], short])
    assert "attention_mask" not in batch and batch["position_ids"][1, 20:].tolist() == [0] * 4
    assert batch["labels"][1, 20:].tolist() == [-100] * 4
