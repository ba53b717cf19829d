"""Programs of other runtimes: the logits of the model, at a budget and with layers that differ; or a clear refusal."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers import elastic_of, flextron, let_tokens_choose, parent_of
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split, Whitespace
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM

from flextron_trainer.demo import train_tokenizer
from flextron_trainer.export.gguf import ONE_DIGIT, THREE_DIGITS, pre_tokenizer
from flextron_trainer.export.runtimes import PACKAGES, difference, empty_cache
from modeling_flextron import FlextronForCausalLM
from modeling_flextron.corrections import number_of_owner

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


def openelm(config: dict, tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits of the architecture `openelm` of mlx-lm."""
    used, size = set(), config["head_dim"]

    def weight(name: str) -> torch.Tensor:
        used.add(f"{name}.weight")
        return tensors[f"{name}.weight"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], weight(name), config["rms_norm_eps"])

    frequencies = config["rope_freq_constant"] ** (-torch.arange(0, size, 2) / size)
    angles = torch.arange(ids.shape[1])[:, None] * frequencies.repeat(2)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-right, left), dim=-1) * angles.sin()

    x = F.embedding(ids, weight("transformer.token_embeddings"))
    for i, (heads, kv_heads) in enumerate(zip(config["num_query_heads"], config["num_kv_heads"], strict=True)):
        layer = f"transformer.layers.{i}"
        qkv = F.linear(norm(f"{layer}.attn_norm", x), weight(f"{layer}.attn.qkv_proj"))
        q, k, v = qkv.unflatten(-1, (-1, size)).transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
        if config["normalize_qk_projections"]:
            q, k = norm(f"{layer}.attn.q_norm", q), norm(f"{layer}.attn.k_norm", k)
        out = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True, enable_gqa=True)
        x = x + F.linear(out.transpose(1, 2).flatten(2), weight(f"{layer}.attn.out_proj"))
        gate, up = F.linear(norm(f"{layer}.ffn_norm", x), weight(f"{layer}.ffn.proj_1")).chunk(2, dim=-1)
        assert gate.shape[-1] == int(config["ffn_multipliers"][i] * config["model_dim"] + 0.5)
        x = x + F.linear(F.silu(gate) * up, weight(f"{layer}.ffn.proj_2"))
    tied = config["share_input_output_layers"]
    logits = F.linear(norm("transformer.norm", x), weight("transformer.token_embeddings" if tied else "lm_head"))
    assert used == tensors.keys()
    return logits


@pytest.mark.parametrize("corrected", [False, True])
def test_what_is_written_for_mlx_computes_what_the_model_does(elastic, tmp_path, corrected):
    """A LLaMA, and a Qwen3 with a tied head and corrections folded in; mlx-lm itself runs in `make interop`."""
    budget: dict = LAYERS
    if corrected:
        budget = {"hidden": 32, "layers": 2, "mlp": [24, 48], "heads": 2}
        parent, elastic = parent_of("qwen3", tie_word_embeddings=True), tmp_path / "elastic"
        elastic_of("qwen3", parent, corrections=0.1, budgets=[1, 0.6]).save_pretrained(elastic)
    result = flextron("export", elastic, tmp_path / "mlx", "--format", "mlx", "--budget", json.dumps(budget))
    assert result["architecture"] == "openelm" and (tmp_path / "mlx" / "tokenizer.json").is_file() != corrected
    model = FlextronForCausalLM.from_pretrained(elastic)
    assert (number_of_owner(model.model.owners, model.resolve_budget(budget)) is not None) == corrected
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    tensors, ids = load_file(tmp_path / "mlx" / "model.safetensors"), torch.randint(96, (2, 9))
    assert config["model_type"] == "openelm"
    with torch.no_grad():
        found, expected = openelm(config, tensors, ids), model(ids, flextron_budget=budget).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "have attention_bias False"),
        ({"norm_type": "layer"}, "have norm_type 'rms'"),
        ({"sliding_window": 7, "layer_types": ["sliding_attention"] * 2}, "have sliding_window None"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "have rope_type 'default'"),
    ],
)
def test_what_mlx_cannot_hold(elastic, tmp_path, changes, message):
    config = json.loads((elastic / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        flextron("export", tmp_path, tmp_path / "refused", "--format", "mlx")
    assert not (tmp_path / "refused").exists()


def test_mlx_has_one_size_for_all_tokens(tmp_path):
    let_tokens_choose(elastic_of("mha")).save_pretrained(tmp_path / "elastic")
    with pytest.raises(ValueError, match="one size for all tokens"):
        flextron("export", tmp_path / "elastic", tmp_path / "refused", "--format", "mlx", "--budget", "auto:0.5")
