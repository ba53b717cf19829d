"""Programs of other runtimes: the logits of the model, at a budget and with layers that differ; or a clear refusal."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers import elastic_of, flextron, parent_of
from tokenizers import Regex, Tokenizer, models, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split, Whitespace
from transformers import MistralConfig, MistralForCausalLM

from flextron_trainer.demo import train_tokenizer
from flextron_trainer.export.gguf import ONE_DIGIT, THREE_DIGITS, pre_tokenizer
from flextron_trainer.export.runtimes import PACKAGES, difference, empty_cache
from modeling_flextron import FlextronForCausalLM

BYTES, PLAIN_BYTES = ByteLevel(add_prefix_space=False), ByteLevel(add_prefix_space=False, use_regex=False)
DIGITS = Sequence([Digits(individual_digits=True), BYTES])


def words(pattern: str, behavior: str = "isolated") -> Sequence:
    return Sequence([Split(Regex(pattern), behavior), PLAIN_BYTES])


LAYERS = {"mlp": [96, 48], "heads": [8, 4]}


@pytest.fixture(scope="module")
def elastic(tmp_path_factory):
    """The folder of a small elastic model, with a tokenizer."""
    folder = tmp_path_factory.mktemp("runtimes") / "elastic"
    parent = parent_of("gqa-wide-heads", vocab_size=300, num_hidden_layers=2)
    elastic_of("gqa-wide-heads", parent, mlp=[1, 0.5], hidden=[1], depth=[1], budgets=[1, 0.6]).save_pretrained(folder)
    train_tokenizer(["def main():\n    return 0\n"] * 20, vocab_size=300).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_program_computes_what_the_model_does(elastic, tmp_path, kind):
    """The verb compares them itself; here a batch is compared, too, and the file says what its layers are."""
    for package in PACKAGES[kind]:
        pytest.importorskip(package)
    from transformers.exporters import ExportedModel

    folder = tmp_path / "program"
    result = flextron("export", elastic, folder, "--format", kind, "--budget", json.dumps(LAYERS))
    assert result["format"] == kind and result["largest_difference"] < 1e-5
    assert not (folder / "config.json").exists()  # no stock class has such layers
    assert (folder / "tokenizer.json").is_file() and (folder / "generation_config.json").is_file()
    model = FlextronForCausalLM.from_pretrained(elastic, flextron_budget=LAYERS)
    program = ExportedModel.from_pretrained(folder)
    assert difference(program, model) == result["largest_difference"]
    cache = empty_cache(model, batch=3)
    ids = torch.randint(300, (3, 9))
    with torch.no_grad():
        found = program(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_runtime_that_is_not_installed_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    target = tmp_path / "kept"
    target.mkdir()
    (target / "mine.txt").write_text("kept")
    for kind, packages in PACKAGES.items():
        with pytest.raises(ValueError, match=rf"It needs {', '.join(packages)}.*pip install \"flextron\[{kind}\]\""):
            flextron("export", tmp_path / "nothing", target, "--format", kind)
    assert [path.name for path in target.iterdir()] == ["mine.txt"]


def test_what_a_program_cannot_hold(elastic, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    config = MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    elastic_of("", MistralForCausalLM(config), heads=[1], hidden=[1], depth=[1], budgets=[1]).save_pretrained(
        tmp_path / "window"
    )
    for arguments, message in (
        ((tmp_path / "window", "--format", "onnx"), "this model has a window"),
        ((elastic, "--format", "onnx", "--gguf"), "An export has one format"),
        ((elastic, "--format", "onnx", "--pad"), "for a stock class alone"),
    ):
        with pytest.raises(ValueError, match=message):
            flextron("export", arguments[0], tmp_path / "refused", *arguments[1:])
    assert not Path(tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("name", "split", "merges_ignored", "normalizer"),
    [
        ("gpt-2", BYTES, False, None),
        ("gpt-2", Sequence([BYTES]), False, None),
        ("smollm", DIGITS, False, None),
        ("llama-bpe", words(THREE_DIGITS), True, None),
        ("qwen2", words(ONE_DIGIT), False, None),
        ("qwen2", words(ONE_DIGIT), False, normalizers.NFC()),
        (None, None, False, None),
        (None, Whitespace(), False, None),
        (None, ByteLevel(add_prefix_space=True), False, None),
        (None, BYTES, False, normalizers.NFC()),
        (None, BYTES, True, None),
        (None, Sequence([Digits(individual_digits=False), BYTES]), False, None),
        (None, Sequence([BYTES, Digits(individual_digits=True)]), False, None),
        (None, Sequence([Digits(individual_digits=True), PLAIN_BYTES]), False, None),
        (None, words(THREE_DIGITS), False, None),
        (None, words(THREE_DIGITS, "removed"), True, None),
        (None, words(ONE_DIGIT + "|x"), False, None),
        (None, Sequence([Split(Regex(ONE_DIGIT), "isolated"), BYTES]), False, None),
    ],
)
def test_how_a_tokenizer_splits_text_is_recognised_by_what_it_does(name, split, merges_ignored, normalizer):
    tokenizer = Tokenizer(models.BPE(ignore_merges=merges_ignored))
    if split is not None:
        tokenizer.pre_tokenizer = split
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    vocabulary = json.loads(tokenizer.to_str())
    if name is None:
        with pytest.raises(ValueError, match="Only byte-level BPE that splits as"):
            pre_tokenizer(vocabulary)
    else:
        assert pre_tokenizer(vocabulary) == name
