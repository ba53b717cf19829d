"""One size as a program of ONNX Runtime, ExecuTorch or OpenVINO, made by the exporters of transformers.

The program is the model with its KV cache: tokens, their mask and the cache of what came before go in, logits and the
longer cache come out. One program reads a prompt, with an empty cache, and writes one token after the other.
"""

import importlib.util
import os
from typing import Any

import torch
from transformers import DynamicCache

from modeling_flextron import FlextronConfig
from modeling_flextron.checkpoint import write_beside
from modeling_flextron.errors import invalid
from modeling_flextron.extraction import misfit, stock_config
from modeling_flextron.subnetwork import count_parameters, is_routed

from ..data import known_tokenizer
from ..models import load_elastic, read_config

PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "executorch": ("executorch",),
    "openvino": ("openvino",),
}  # fmt: skip
TOLERANCE = 1e-4  # of a logit, as a part of the largest one
BATCH = 16  # largest one of ExecuTorch, which plans its memory ahead


def export_program(
    source: str | os.PathLike,
    output: str | os.PathLike,
    kind: str,
    budget: Any = None,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a folder with the program, in float32, and the tokenizer; run it, and compare its logits with the model's.

    `transformers.exporters.ExportedModel.from_pretrained(folder)` loads it without our code.

    Args:
        source: Folder or Hub id of a causal Flextron model.
        output: Folder to write; nothing is left there when something fails.
        kind: A key of `PACKAGES`.
        budget: Which size; its layers may differ.
        trust_remote_code: Run the code of its tokenizer, where it brings some.

    Returns:
        `parameters` and `largest_difference`, of a logit as a part of the largest one.

    Raises:
        ValueError: a package is missing; the model has a sliding window, or the budget is one of token routing; or the
            program computes something else than the model.
    """
    if missing := [name for name in PACKAGES[kind] if importlib.util.find_spec(name) is None]:
        rule = f"It needs {', '.join(missing)}, which this Python does not have."
        raise invalid("format", kind, rule, f'Install it: `pip install "flextron[{kind}]"`.')
    config = read_config(source, "model", FlextronConfig)
    subnetwork = config.resolve(budget)
    if is_routed(subnetwork):
        raise invalid("budget", budget, "A program has one size for all tokens.", "Name a static budget, such as 0.5.")
    if config.sliding_window is not None:
        rule = "A program keeps every token in its cache, and this model has a window."
        raise invalid("format", kind, rule, "Use `--dense` and another engine.")
    from transformers.exporters import AutoExportConfig, AutoHfExporter, ExportedModel

    model = load_elastic(source, flextron_budget=subnetwork.to_dict(), dtype=torch.float32).eval()
    settings: dict[str, Any] = {
        "export_format": kind,
        "dynamic_shapes": _dynamic_shapes(config, len(subnetwork.layers), kind),
    }
    if kind == "openvino":
        settings["stateful"] = False  # the cache is an input and an output everywhere
    plan = AutoExportConfig.from_dict(settings)
    exported = AutoHfExporter.from_config(plan).export(model, _inputs(model, batch=2, past=3, new=2), plan)
    # the config of a stock model, which everybody can read; layers that differ have none
    exported.config = None if misfit(config, subnetwork) else stock_config(config, subnetwork)
    exported.generation_config = model.generation_config
    with write_beside(output) as folder:
        exported.save_pretrained(folder)
        found = difference(ExportedModel.from_pretrained(folder), model)
        if not found <= TOLERANCE:
            rule = f"Its logits are off by {found:.1e} of the largest one, and {TOLERANCE:.0e} is allowed."
            raise invalid("format", kind, rule, "Try the versions that transformers names, or another format.")
        if (tokenizer := known_tokenizer(source, trust_remote_code=trust_remote_code)) is not None:
            tokenizer.save_pretrained(folder)
    return {"parameters": count_parameters(config, subnetwork), "largest_difference": found}


@torch.no_grad()
def difference(program: Any, model: Any) -> float:
    """Largest difference of a logit from the model's, as a part of the largest one: of a prompt, and what follows."""
    length, generator = 12, torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    expected, parts = model(input_ids=ids).logits, []
    cache, start = empty_cache(model), 0
    for end in (7, length - 1, length):
        mask = torch.ones(1, end, dtype=torch.long)
        output = program(input_ids=ids[:, start:end], attention_mask=mask, past_key_values=cache)
        parts.append(output.logits)
        cache, start = output.past_key_values, end
    return ((torch.cat(parts, dim=1) - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def empty_cache(model: Any, batch: int = 1) -> DynamicCache:
    """A cache of no tokens, with which a program reads a prompt."""
    cache = _inputs(model, batch, past=1, new=1)["past_key_values"]
    cache.crop(-1)  # the one token that it holds
    return cache


@torch.no_grad()
def _inputs(model: Any, batch: int, past: int, new: int) -> dict[str, Any]:
    """Arguments of a call that goes on from a cache."""
    ids, cache = torch.ones(batch, past + new, dtype=torch.long), DynamicCache(config=model.config)
    model(input_ids=ids[:, :past], past_key_values=cache)
    return {"input_ids": ids[:, past:], "attention_mask": torch.ones_like(ids), "past_key_values": cache}


def _dynamic_shapes(config: FlextronConfig, layers: int, kind: str) -> dict[str, Any]:
    """Batch and lengths are free; ExecuTorch plans memory for the largest."""
    free = torch.export.Dim.AUTO
    batch, length = (
        (free(max=BATCH), free(max=config.max_position_embeddings)) if kind == "executorch" else (free, free)
    )
    tokens = {0: batch, 1: length}
    return {"input_ids": tokens, "attention_mask": tokens, "past_key_values": [{0: batch, 2: length}] * (2 * layers)}
