"""What importance and elastic training are worth, on the demo's model and text with a fixed seed."""

import pytest

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments, convert
from flextron_trainer.data import load_text, pack
from flextron_trainer.demo import settings, train_parent, train_tokenizer
from flextron_trainer.evaluation.quality import evaluate_model
from modeling_flextron import count_parameters

pytestmark = pytest.mark.slow
HALF, SEQUENCE_LENGTH = 0.5, 64


@pytest.fixture(scope="module")
def text():
    rows = load_text("stdlib").shuffle(seed=0).select(range(80))
    tokenizer = train_tokenizer(rows["text"])
    blocks = pack(rows, tokenizer, SEQUENCE_LENGTH).shuffle(seed=0)
    return tokenizer, blocks.select(range(96, len(blocks))), blocks.select(range(96))


@pytest.fixture(scope="module")
def parent(text, tmp_path_factory):
    tokenizer, train, _ = text
    return train_parent(tokenizer, train, tmp_path_factory.mktemp("parent"), "cpu", steps=300, seed=0)


def convert_in_order(parent, text, order):
    return convert(parent, text[1].select(range(64)), order=order, sequence_length=SEQUENCE_LENGTH)


def test_order_and_training(parent, text, tmp_path):
    _, train, held_out = text
    loss = {"parent": evaluate_model(parent, held_out, 16)["loss"]}
    for order in ("reverse", "random", "importance"):
        elastic = convert_in_order(parent, text, order)
        loss[order] = evaluate_model(elastic, held_out, 16, elastic.resolve_budget(HALF))["loss"]
    assert loss["parent"] < 5.0  # of about 6.3 for single tokens: it has learned something that can be lost
    assert loss["parent"] < loss["importance"] < loss["random"] < loss["reverse"]

    half = elastic.resolve_budget(HALF)
    assert count_parameters(elastic.config, half, embeddings=False) <= HALF * elastic.config.parent_size()
    arguments = FlextronTrainingArguments(**settings(tmp_path, "cpu", steps=80, seed=0, learning_rate=2e-3))
    FlextronTrainer(elastic, arguments, teacher=parent, train_dataset=train).train()
    loss["trained"] = evaluate_model(elastic, held_out, 16, half)["loss"]
    removed = (loss["importance"] - loss["trained"]) / (loss["importance"] - loss["parent"])
    print(loss, f"{removed:.0%} of the gap removed")
    assert removed >= 0.4  # of a slice that is close to its parent, as half of the budget is spent where it matters
