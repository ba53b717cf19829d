"""Teachers with more or fewer tokens than the model, and those of another tokenizer."""

import copy

import pytest
import torch
from helpers import elastic_of, parent_of
from tokenizers import Tokenizer, models, pre_tokenizers
from training import VARIANT, arguments, losses, rows
from transformers import PreTrainedTokenizerFast

from flextron_trainer import FlextronTrainer
from flextron_trainer.training.teachers import readable


def tokenizer_of(count: int = 96, pad: bool = False, prefix: str = "w") -> PreTrainedTokenizerFast:
    """A tokenizer of so many words, and perhaps of padding, the token after them."""
    model = Tokenizer(models.WordLevel({f"{prefix}{i}": i for i in range(count)}, f"{prefix}0"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    if pad:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def resized(model, count: int):
    """With more tokens, of random weights."""
    model = copy.deepcopy(model)
    model.resize_token_embeddings(count, mean_resizing=False)
    return model


def run(output, teacher, model=None, tokenizer=None, **changes) -> FlextronTrainer:
    return FlextronTrainer(
        model or elastic_of(VARIANT),
        arguments(output, max_steps=3, optim="sgd", **changes),
        teacher=teacher,
        train_dataset=rows(),
        processing_class=tokenizer,
    )


def test_a_padded_teacher_teaches_as_the_one_without_padding(tmp_path):
    """As Qwen2.5-7B (152,064 tokens) does Qwen2.5-0.5B (151,936)."""
    plain, padded = run(tmp_path, parent_of(VARIANT)), run(tmp_path, resized(parent_of(VARIANT), 104))
    plain.train(), padded.train()
    for one, other in zip(losses(plain), losses(padded), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_the_parent_teaches_a_model_with_a_token_of_padding(masked, tmp_path):
    """Rows of different lengths, so that batches hold that token, under a mask or as documents of their own."""
    tokenizer, data = tokenizer_of(pad=True), rows()
    assert tokenizer.pad_token_id == 96
    if not masked:
        data = [{**row, "position_ids": list(range(len(row["input_ids"])))} for row in data]
    plain = run(tmp_path, parent_of(VARIANT))
    more = run(tmp_path, parent_of(VARIANT), resized(elastic_of(VARIANT), 97), tokenizer)
    plain.train_dataset = more.train_dataset = data
    plain.train(), more.train()
    assert losses(plain)[0]["loss"] > 0.1
    for one, other in zip(losses(plain), losses(more), strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    more.train_dataset = [{"input_ids": torch.tensor([1, 96, 3])}] * 8
    more.processing_class = None
    more.model.config.pad_token_id = 0
    with pytest.raises(ValueError, match=r"`teacher`='96 tokens' cannot be used\. .* the text has token 96\."):
        more.train()


def test_what_a_teacher_can_read():
    ids = torch.tensor([[5, 7, 9, 9]])
    assert readable({"input_ids": ids}, 8, 9)["input_ids"].tolist() == [[5, 7, 0, 0]]
    hidden = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    assert readable(hidden, 8, None)["input_ids"].tolist() == [[5, 7, 0, 0]]
    for strange in ({"input_ids": ids}, hidden | {"attention_mask": torch.ones(1, 4)}):
        with pytest.raises(ValueError, match="the text has token 9"):
            readable(strange, 8, None)


def test_a_teacher_of_another_tokenizer_is_refused_where_both_are_known(tmp_path, caplog):
    parent_of(VARIANT).save_pretrained(tmp_path / "teacher")
    teacher = parent_of(VARIANT).from_pretrained(tmp_path / "teacher")
    run(tmp_path, teacher, tokenizer=tokenizer_of())  # which of the teacher is not known
    assert "was not checked" not in caplog.text
    run(tmp_path, resized(teacher, 104), tokenizer=tokenizer_of())
    assert "The teacher has 104 tokens and the model 96: the first 96 are compared" in caplog.text
    caplog.clear()
    tokenizer_of(98).save_pretrained(tmp_path / "teacher")
    for known in (teacher, tmp_path / "teacher", resized(teacher, 104)):
        run(tmp_path, known, tokenizer=tokenizer_of(pad=True))  # 96 is padding here, and a word there
    assert not caplog.text
    tokenizer_of(prefix="v").save_pretrained(tmp_path / "teacher")
    for known in (teacher, tmp_path / "teacher"):
        with pytest.raises(ValueError, match=r"`teacher`=.*Token 0 is 'v0' in its tokenizer and 'w0' in that of the"):
            run(tmp_path, known, tokenizer=tokenizer_of())
