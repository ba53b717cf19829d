"""Let a teacher read a text once, and keep what it predicts: for runs that then need no teacher in memory."""

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_flextron.errors import invalid, is_number, require_int

from ..data import collator
from ..files import write_json
from ..losses import CHUNK_SIZE
from ..models import load_stock
from .batches import read_batch
from .teacher_cache import FILE, FORMAT, Drawn, draw_tokens, open_shard, read_about, read_rows, shard_name, write_shard
from .teachers import check_architecture, read_by_teacher

MOST_DRAWS = 255  # how often a token was drawn is kept in a byte


@torch.no_grad()
def teach(
    parent: str | os.PathLike | PreTrainedModel,
    dataset: Iterable[Any],
    cache: str | os.PathLike,
    *,
    tokenizer: Any = None,
    draws: int = 50,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    max_samples: int | None = None,
    batch_size: int = 8,
    samples_per_shard: int = 1024,
    seed: int = 0,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    **load_kwargs: Any,
) -> dict[str, Any]:
    """Write what a teacher predicts of a text, for `FlextronTrainer(teacher=cache)`.

    At every token some tokens are drawn from the teacher's probabilities (random sampling distillation, arXiv
    2503.16870): on average the loss and its gradient are those of the teacher in memory. A run that is stopped goes on
    behind the last shard when it is started again with the same arguments.

    Args:
        parent: The teacher: a model, its folder or Hub id.
        dataset: Rows of `input_ids`, as `pack` makes them, of the text that is trained on, in any order.
        cache: Folder to write.
        tokenizer: Of the text; a copy is kept, by which another tokenizer is noticed.
        draws: Of tokens, at each token of the text; more are nearer to the teacher and take more bytes.
        temperature: Of the distillation.
        vocab_size: Draw from so many of the teacher's tokens, the first ones: for a model with fewer. None for all.
        max_samples: Read no more rows than this.
        samples_per_shard: Rows in a file, behind which a run can go on.
        seed: Of the draws.
        device: Where a teacher that is loaded runs.
        trust_remote_code, load_kwargs: As in `AutoModelForCausalLM.from_pretrained`, for an id or a folder.

    Returns:
        `samples`, `tokens`, `entries` and `bytes` of the cache.

    Raises:
        ValueError: an impossible argument, an unknown architecture, text with tokens that the teacher does not have,
            or a folder with something else in it: another cache, of other rows, or no cache at all.
    """
    for name, value in (("draws", draws), ("batch_size", batch_size), ("samples_per_shard", samples_per_shard)):
        require_int(name, value)
    if draws > MOST_DRAWS:
        raise invalid("draws", draws, f"At most {MOST_DRAWS} are kept.", "Pass for instance 50.")
    if not is_number(temperature) or temperature <= 0:
        raise invalid("temperature", temperature, "It must be a positive number.", "Pass for instance 1.0.")
    if isinstance(parent, (str, os.PathLike)):
        parent = load_stock(parent, trust_remote_code=trust_remote_code, **{"dtype": "auto", **load_kwargs})
        parent = parent if device is None else parent.to(device)
    teacher: Any = parent.eval()
    check_architecture("parent", teacher)
    size = teacher.config.vocab_size if vocab_size is None else vocab_size
    require_int("vocab_size", size)
    if size > teacher.config.vocab_size:
        rule = f"The teacher has {teacher.config.vocab_size} tokens."
        raise invalid("vocab_size", size, rule, "Pass at most so many, or leave it out.")
    folder, first = Path(cache), next(iter(dataset), None)
    if first is None:
        raise invalid("dataset", type(dataset).__name__, "It holds no rows.", "Pass some text.")
    about = {
        "format": FORMAT, "teacher": Path(teacher.name_or_path).name or None, "vocab_size": size,
        "temperature": float(temperature), "draws": draws, "seed": seed, "samples_per_shard": samples_per_shard,
        "dtype": str(teacher.dtype).removeprefix("torch."), "sequence_length": len(first["input_ids"]),
    }  # fmt: skip
    _begin(folder, about, tokenizer)
    collate = collator(tokenizer)
    total = {"samples": 0, "tokens": 0, "entries": 0}
    shards = 0
    known = len(dataset) if hasattr(dataset, "__len__") else None  # type: ignore[arg-type]
    rows = islice(iter(dataset), max_samples)
    with tqdm(total=known if max_samples is None else max_samples, desc="Teaching", unit="sample") as bar:
        while part := list(islice(rows, samples_per_shard)):
            path = folder / shard_name(shards)
            parted = (part[i : i + batch_size] for i in range(0, len(part), batch_size))
            batches = [read_batch(collate(some), collate, teacher, teacher.device) for some in parted]
            keys = torch.cat([read_rows(batch)[0] for batch in batches])
            if path.exists():
                _check_rows(path, keys)
                bar.update(len(part))
            else:
                drawn: list[Drawn] = []
                for batch in batches:
                    drawn += _read(teacher, batch, about, getattr(tokenizer, "pad_token_id", None))
                    bar.update(len(batch["input_ids"]))
                write_shard(path, keys, drawn, size)
            total["samples"] += len(part)
            for name, ends in (("tokens", "token_ends"), ("entries", "entry_ends")):
                total[name] += int(open_shard(path).get_tensor(ends)[-1])
            shards += 1
    total["bytes"] = sum((folder / shard_name(number)).stat().st_size for number in range(shards))
    write_json(folder / FILE, {**about, "shards": shards, **total})
    return total


def _begin(folder: Path, about: dict[str, Any], tokenizer: Any) -> None:
    """Begin a cache in a folder, or go on with the one that is there."""
    if (folder / FILE).exists():
        found = read_about(folder)
        differing = [name for name in about if found.get(name) != about[name]]
        if differing:
            rule = f"There is a cache with {', '.join(f'{name} {found.get(name)!r}' for name in differing)}."
            remedy = "Pass the same to go on with it, or write to another folder."
            raise invalid(differing[0], about[differing[0]], rule, remedy)
        return  # whether its rows are these is seen shard by shard, and until then it stays what it is
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        rule = "There is something in it that is no cache."
        raise invalid("cache", str(folder), rule, "Write to another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_json(folder / FILE, {**about, "shards": 0, "samples": None})


def _check_rows(path: Path, keys: torch.Tensor) -> None:
    """Refuse to go on with a shard of other rows."""
    if not torch.equal(open_shard(path).get_tensor("keys"), keys):
        rule = f"Its rows are not those, in this order, that {path.name} was made of."
        raise invalid("dataset", str(path.parent), rule, "Pass the same text, or write to another folder.")


def _read(teacher: Any, inputs: dict[str, torch.Tensor], about: dict[str, Any], padding: int | None) -> Iterator[Drawn]:
    """What is drawn at the tokens of each row of a batch."""
    keys, real = read_rows(inputs)
    foretold = read_by_teacher(teacher, inputs, teacher.config.vocab_size + 1, padding).prepared(
        about["vocab_size"], teacher.dtype
    )
    for row, key in enumerate(keys.tolist()):
        states = foretold.at((row, real[row].to(teacher.device)))
        generator = torch.Generator().manual_seed((about["seed"] + key) % 2**63)
        starts = torch.rand(len(states.hidden_states), generator=generator).to(teacher.device)
        parts = []
        for start in range(0, len(starts), CHUNK_SIZE):
            some = slice(start, start + CHUNK_SIZE)
            log_probabilities = states.log_probabilities(some, about["temperature"])
            probabilities = log_probabilities.exp()
            entropies = -torch.einsum("nv,nv->n", probabilities, log_probabilities)
            parts.append((*draw_tokens(probabilities, about["draws"], starts[some]), entropies))
        yield Drawn(*(torch.cat(each).cpu() for each in zip(*parts, strict=True)))
