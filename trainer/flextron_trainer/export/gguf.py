"""One size of a LLaMA as a GGUF file for llama.cpp, written with the `gguf` package (`pip install flextron[gguf]`).

Equal layers become the architecture `llama`; layers that differ become `deci`, the same graph with sizes for every
layer. Other families, and tokenizers other than those of `SPLITTING`, go through `--dense` and llama.cpp's converter.
"""

import json
import os
from typing import Any

import torch

from modeling_flextron import FlextronConfig
from modeling_flextron.errors import invalid
from modeling_flextron.extraction import stock_tensors
from modeling_flextron.subnetwork import count_parameters, is_routed

from ..data import load_tokenizer
from ..files import write_file_beside
from ..models import load_elastic, read_config

ELSEWHERE = "Use `flextron export --dense` and llama.cpp's convert_hf_to_gguf.py."
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ONE_DIGIT, THREE_DIGITS = WORDS % r"\p{N}", WORDS % r"\p{N}{1,3}"
BYTES = {"type": "ByteLevel", "add_prefix_space": False}
# llama.cpp's name of a way to split text -> what does it in a tokenizer.json, one after the other
SPLITTING: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTES | {"use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": THREE_DIGITS}, "behavior": "Isolated", "invert": False},
        BYTES | {"use_regex": False},
    ],
    "qwen2": [
        {"type": "Split", "pattern": {"Regex": ONE_DIGIT}, "behavior": "Isolated", "invert": False},
        BYTES | {"use_regex": False},
    ],
}


def export_gguf(
    source: str | os.PathLike, output: str | os.PathLike, budget: Any = None, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Write a sub-network of a LLaMA as one GGUF file, in the dtype of the checkpoint.

    Args:
        source: Folder or Hub id of a Flextron model with a byte-level BPE tokenizer.
        output: File to write.
        budget: Which size; its layers may differ.
        trust_remote_code: Run the code of its tokenizer, where it brings some.

    Returns:
        `parameters` and the `architecture` that llama.cpp will run.

    Raises:
        ValueError: another family, scaled rotary positions or tokenizer than this writes, or no `gguf` package.
    """
    try:
        import gguf
    except ImportError:
        raise invalid("gguf", True, "The package `gguf` is missing.", "Install it: `pip install gguf`.") from None
    config = read_config(source, "model", FlextronConfig)
    subnetwork = config.resolve(budget)
    if config.base_model_type != "llama":
        raise invalid("model", config.base_model_type, "Only `llama` models are written as GGUF here.", ELSEWHERE)
    if is_routed(subnetwork):
        raise invalid("budget", budget, "llama.cpp has one size for all tokens.", "Name a static budget, such as 0.5.")
    if config.rope_parameters["rope_type"] not in ("default", "llama3"):
        rule = "Only `default` and `llama3` positions are written as GGUF here."
        raise invalid("rope_type", config.rope_parameters["rope_type"], rule, ELSEWHERE)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    splitting = pre_tokenizer(vocabulary)
    model = load_elastic(source, flextron_budget=subnetwork.to_dict())

    arch = gguf.MODEL_ARCH.LLAMA if subnetwork.uniform else gguf.MODEL_ARCH.DECI
    types = gguf.GGMLQuantizationType
    dtype = {torch.float16: types.F16, torch.bfloat16: types.BF16}.get(model.dtype, types.F32)
    with write_file_beside(output) as path:
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
        _write_shape(writer, gguf, config, subnetwork, dtype)
        _write_vocabulary(writer, gguf, config, tokenizer, vocabulary, splitting)
        names = gguf.get_tensor_name_map(arch, len(subnetwork.layers))
        if (factors := rotary_factors(model)) is not None:
            writer.add_tensor("rope_freqs.weight", factors.numpy())
        for name, tensor in stock_tensors(model, model.built, model.built):
            if name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
                # llama.cpp rotates neighbouring channels, transformers those of the two halves of a head
                tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
            stored = dtype if tensor.ndim > 1 else types.F32
            data = gguf.quants.quantize(tensor.float().contiguous().numpy(), stored)
            theirs: Any = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(theirs, data, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return {"parameters": count_parameters(config, subnetwork), "architecture": gguf.MODEL_ARCH_NAMES[arch]}


def pre_tokenizer(vocabulary: dict[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer splits text, found by what its `tokenizer.json` does, not by a name or hash.

    Raises:
        ValueError: it splits, normalizes or merges as none of `SPLITTING` does.
    """
    split, model = vocabulary["pre_tokenizer"] or {}, vocabulary["model"]
    # trimming changes offsets, but no tokens
    steps = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in split.get("pretokenizers", [split])]
    for name, known in SPLITTING.items():
        composes = name == "qwen2" and vocabulary["normalizer"] == {"type": "NFC"}  # llama.cpp leaves that out
        words_are_whole = model.get("ignore_merges", False) == (name == "llama-bpe")
        if steps == known and (not vocabulary["normalizer"] or composes) and model["type"] == "BPE" and words_are_whole:
            return name
    rule = f"Only byte-level BPE that splits as {', '.join(SPLITTING)} do is written as GGUF here."
    raise invalid("tokenizer", [step.get("type") for step in steps], rule, ELSEWHERE)


def rotary_factors(model: Any) -> torch.Tensor | None:
    """Compute by what llama.cpp divides the frequency of every pair of channels; None for plain positions."""
    rotary = model.model.rotary_emb
    plain, _ = rotary.compute_default_rope_parameters(model.config)
    return None if rotary.rope_type == "default" else (plain / rotary.inv_freq.cpu()).float()


def _write_shape(writer: Any, gguf: Any, config: Any, subnetwork: Any, dtype: Any) -> None:
    def sizes(values: list[int]) -> Any:
        return values[0] if subnetwork.uniform else values

    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(subnetwork.hidden)
    writer.add_block_count(len(subnetwork.layers))
    writer.add_head_count(sizes(list(subnetwork.heads)))
    writer.add_head_count_kv(sizes([config.kv_heads(heads) for heads in subnetwork.heads]))
    writer.add_feed_forward_length(sizes(list(subnetwork.mlp)))
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    kinds = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}
    writer.add_file_type(gguf.LlamaFileType[kinds[dtype.name]])


def _write_vocabulary(
    writer: Any, gguf: Any, config: Any, tokenizer: Any, vocabulary: dict[str, Any], splitting: str
) -> None:
    kinds = gguf.TokenType
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    types = [kinds.UNUSED] * config.vocab_size
    for token, i in vocabulary["model"]["vocab"].items():
        tokens[i], types[i] = token, kinds.NORMAL
    for added in vocabulary["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    merges = vocabulary["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name in ("bos", "eos", "pad"):
        if (token_id := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
