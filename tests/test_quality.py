"""What importance and elastic training are worth, on a text of a few languages that a small model learns in seconds."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments, convert
from flextron_trainer.data import collator
from flextron_trainer.demo import settings
from flextron_trainer.evaluation.quality import evaluate_model
from modeling_flextron import count_parameters

pytestmark = pytest.mark.slow
HALF, WORDS, LANGUAGES, LENGTH = 0.5, 64, 4, 24


def text(rows: int, seed: int) -> torch.Tensor:
    """Rows `[rows, LENGTH]` of one language each, which names the word that follows on every word, but for one of ten.

    Which language it is, a model has to read from the words before.
    """
    languages = torch.randint(0, WORDS, (LANGUAGES, WORDS), generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, WORDS, (rows, LENGTH), generator=generator)
    noisy = torch.rand(rows, LENGTH, generator=generator) < 0.1
    language = torch.randint(0, LANGUAGES, (rows,), generator=generator)
    words = [noise[:, 0]]
    for i in range(1, LENGTH):
        words.append(torch.where(noisy[:, i], noise[:, i], languages[language, words[-1]]))
    return torch.stack(words, dim=1)


def arguments(folder, steps: int, learning_rate: float) -> dict:
    return settings(folder, "cpu", steps, 0, learning_rate) | {"per_device_train_batch_size": 32, "disable_tqdm": True}


@pytest.fixture(scope="module")
def train():
    return [{"input_ids": row} for row in text(32 * 150, seed=1)]


@pytest.fixture(scope="module")
def parent(train, tmp_path_factory):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(**shape, vocab_size=WORDS, num_hidden_layers=3, tie_word_embeddings=True, pad_token_id=0)
    )
    how = TrainingArguments(**arguments(tmp_path_factory.mktemp("parent"), steps=150, learning_rate=5e-3))
    Trainer(model, how, train_dataset=train, data_collator=collator()).train()
    return model.eval()


def test_order_and_training(parent, train, tmp_path):
    held_out, calibration = [{"input_ids": row} for row in text(256, seed=2)], text(64, seed=3)
    loss = {"parent": evaluate_model(parent, held_out, 64)["loss"]}
    for order in ("reverse", "random", "importance"):
        elastic = convert(parent, calibration, order=order)
        loss[order] = evaluate_model(elastic, held_out, 64, elastic.resolve_budget(HALF))["loss"]
    assert loss["parent"] < 1.3  # of 4.2 for words at random: it has learned something that can be lost
    assert loss["parent"] < loss["importance"] < loss["random"] < loss["reverse"]

    half = elastic.resolve_budget(HALF)
    assert count_parameters(elastic.config, half, embeddings=False) <= HALF * elastic.config.parent_size()
    how = FlextronTrainingArguments(**arguments(tmp_path, steps=30, learning_rate=4e-3))
    FlextronTrainer(elastic, how, teacher=parent, train_dataset=train).train()
    loss["trained"] = evaluate_model(elastic, held_out, 64, half)["loss"]
    removed = (loss["importance"] - loss["trained"]) / (loss["importance"] - loss["parent"])
    print(loss, f"{removed:.0%} of the gap removed")
    assert removed >= 0.4  # of a slice that is close to its parent, as half of the budget is spent where it matters
