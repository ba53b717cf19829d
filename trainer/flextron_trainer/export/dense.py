"""One size as a stock checkpoint that needs no code of ours: weights, tokenizer, generation settings and a card."""

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from modeling_flextron import FlextronConfig
from modeling_flextron.checkpoint import write_beside
from modeling_flextron.extraction import changes, stock_sizes
from modeling_flextron.subnetwork import SubNetwork

from ..data import load_tokenizer
from ..models import load_elastic, read_config
from ..publishing.card import parent_of, versions
from ..publishing.markdown import code, plain


def export_dense(
    source: str | os.PathLike,
    output: str | os.PathLike,
    budget: Any = None,
    *,
    pad: bool = False,
    snap: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a stock model of the parent's family.

    Args:
        source: Folder or Hub id of a Flextron model.
        output: Folder to write.
        budget: Which size; None for all of it.
        pad: Where the stock class cannot hold it, fill it up with zeros.
        snap: There, write the largest size that the class can hold and that costs no more.
        trust_remote_code: Run the code of its tokenizer, where it brings some.

    Returns:
        `parameters`, and `changed`: what padding or snapping did to the sizes, empty for nothing.

    Raises:
        ValueError: the budget means nothing, or no stock model can hold what it means.
    """
    config = read_config(source, "model", FlextronConfig)
    asked = config.resolve(budget)
    sizes = stock_sizes(config, asked, pad, snap)  # refused before anything is read
    given = sizes if snap else asked
    model = load_elastic(source, flextron_budget=given.to_dict())
    stock = model.extract(pad=pad)
    changed = changes(asked, sizes)
    with write_beside(output) as folder:
        stock.save_pretrained(folder)
        _edit(folder / "config.json", for_other_readers)
        try:
            load_tokenizer(source, trust_remote_code=trust_remote_code).save_pretrained(folder)
            _edit(folder / "tokenizer_config.json", tokenizer_for_other_readers)
            tokenizer = "The tokenizer is the parent's."
        except ValueError:
            tokenizer = "No tokenizer was copied: there was none."
        card = dense_card(config, Path(output).resolve().name, budget, given, stock, tokenizer)
        if changed:
            card += (
                f"\nThe stock class could not hold the sizes asked for: {changed} ({'zeros' if pad else 'snapped'}).\n"
            )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return {"parameters": stock.num_parameters(), "changed": changed}


def for_other_readers(config: dict[str, Any]) -> dict[str, Any]:
    """A saved config with the names that transformers 4 and llama.cpp's converter read; transformers 5 takes both."""
    new = dict(config)
    if "n_positions" in config:
        new["n_ctx"] = config["n_positions"]
    rope = dict(config.get("rope_parameters") or {})
    if rope:
        theta, part = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", 1.0)
        if config["model_type"] == "gpt_neox":
            new |= {"rotary_emb_base": theta, "rotary_pct": part}
        else:
            new["rope_theta"] = theta
        if rope["rope_type"] != "default":
            new["rope_scaling"] = config["rope_parameters"]
    return new


def tokenizer_for_other_readers(config: dict[str, Any]) -> dict[str, Any]:
    """A saved tokenizer config that transformers 4 can read."""
    new = dict(config)
    if new.get("tokenizer_class") == "TokenizersBackend":
        new["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(new.get("extra_special_tokens"), list):
        new["additional_special_tokens"] = new.pop("extra_special_tokens")
    return new


def dense_card(
    config: FlextronConfig, title: str, budget: Any, subnetwork: SubNetwork, stock: Any, tokenizer: str
) -> str:
    """The README of an exported model: what it is, of what, how good it was measured to be, how it was made."""
    losses = [
        f"{row.loss:.4f} nats per token on {plain(row.measured_on('loss').label)}, measured before the export"
        for row in config.frontier
        if row.loss is not None and row.subnetwork == subnetwork
    ]
    card = (files(__package__) / "templates" / "dense_card.md").read_text(encoding="utf-8")
    return card.format(
        title=plain(title),
        kind=type(stock).__name__,
        parent=parent_of(config),
        budget=code("full" if budget is None else budget),
        parameters=f"{stock.num_parameters():,}",
        share=f"{config.row('', subnetwork).non_embedding_parameters / config.parent_size():.3g}",
        sizes=json.dumps(subnetwork.to_dict()),
        loss=losses[0] if losses else "not measured",
        tokenizer=tokenizer,
        versions=versions(),
    )


def _edit(path: Path, change: Any) -> None:
    if path.is_file():
        data = change(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
