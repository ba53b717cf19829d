"""What a teacher predicts of a text, on disk: drawn tokens, found again by the rows of the text.

A cache is a folder: `teacher_cache.json`, the tokenizer, and shards `teacher-00000.safetensors`. At every token of the
text some tokens are drawn from the teacher's probabilities, and kept with how often (`losses.SampledTeacher`).
Points at equal distances on their cumulated sum, behind a random start, are drawn together: each token as often as by
independent draws on average, and less by chance. A shard holds, for its rows R, tokens of the text T and entries E:

    keys [R] int64                      what a row is found by: a hash of its ids and of where its documents begin
    token_ends, entry_ends [R] int64    where rows end
    sizes [T] uint8, entropies [T] float16
    ids [E] uint16, high_ids [E] uint8  the latter where the teacher has more than 65,536 tokens
    counts [E] uint8                    how often each was drawn
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import pad

from modeling_flextron.errors import invalid

from ..data import check_tokens, known_tokenizer
from ..files import write_file_beside
from ..losses import SampledTeacher
from .batches import real_tokens_of

FILE = "teacher_cache.json"
FORMAT = 1
LOW_IDS = 2**16
LOOKED_AT = 64  # rows of a text before training; every other one is looked for when its turn comes
AGAIN = "Run `flextron teach` again, which goes on where it was stopped."
OTHER = "Make one for this run with `flextron teach`."


@dataclass(frozen=True)
class Drawn:
    """What was drawn at T tokens of a text: `ids` and `counts` `[E]`, `sizes` of them at each token, `entropies`."""

    ids: torch.Tensor
    counts: torch.Tensor
    sizes: torch.Tensor
    entropies: torch.Tensor


def draw_tokens(probabilities: torch.Tensor, draws: int, starts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Draw tokens, of which each is on average drawn `draws * p` times.

    Args:
        probabilities: `[n, V]`.
        draws: How many at each of the n.
        starts: Random numbers from 0 to 1, `[n]`.

    Returns:
        Ids in their order and how often they were drawn `[E]`; how many ids there are at each of the n.
    """
    ends = probabilities.cumsum(-1)
    points = (torch.arange(draws, device=ends.device) + starts[:, None]) / draws * ends[:, -1:]
    found = torch.searchsorted(ends, points, right=True).clamp_(max=ends.shape[-1] - 1)
    first = torch.ones_like(found, dtype=torch.bool)
    first[:, 1:] = found[:, 1:] != found[:, :-1]
    places = first.flatten().nonzero()[:, 0]
    counts = torch.diff(places, append=places.new_tensor([found.numel()]))
    return found[first], counts, first.sum(-1)


def read_rows(inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tell the rows of a batch apart, whatever they are padded to.

    Args:
        inputs: `input_ids`, and perhaps `attention_mask` or `position_ids`.

    Returns:
        Keys of the rows `[B]` int64; which tokens are theirs, `[B, S]`.
    """
    ids = inputs["input_ids"].cpu()
    positions, real = inputs.get("position_ids"), real_tokens_of(inputs)
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.cpu()
    keys = []
    for row, chosen in enumerate(real):
        places = torch.arange(int(chosen.sum())) if positions is None else positions[row].cpu()[chosen]
        digest = hashlib.blake2b(torch.stack([ids[row][chosen], places]).long().numpy().tobytes(), digest_size=8)
        keys.append(int.from_bytes(digest.digest(), "little", signed=True))
    return torch.tensor(keys), real


class TeacherCache:
    """A cache that was read: a teacher of the text that it was made for.

    Args:
        folder: Of the cache.

    Attributes:
        about: What `teacher_cache.json` says.

    Raises:
        ValueError: it is not a cache, not all of it, or damaged.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder, self.about = Path(folder), read_about(folder)
        if self.about["samples"] is None:
            rule = "Not all of its text has been read by the teacher."
            raise invalid("teacher", str(folder), rule, AGAIN)
        names = [shard_name(number) for number in range(self.about["shards"])]
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            rule = f"Shards of the cache are missing: {', '.join(missing[:3])}."
            raise invalid("teacher", str(folder), rule, "Copy them again, or run `flextron teach` again.")
        self._files = [open_shard(self.folder / name) for name in names]
        rows = [file.get_tensor("keys") for file in self._files]
        self._keys, order = torch.cat(rows).sort()
        self._places = torch.tensor([(i, j) for i, keys in enumerate(rows) for j in range(len(keys))])[order]
        if len(order) != self.about["samples"]:
            rule = f"Its shards hold {len(order)} samples, and {FILE} says {self.about['samples']}."
            raise invalid("teacher", str(folder), rule, "Copy them again, or run `flextron teach` again.")
        ends = [{name: file.get_tensor(name) for name in ("token_ends", "entry_ends")} for file in self._files]
        self._ends = [{name: pad(each, (1, 0)) for name, each in both.items()} for both in ends]  # 0, where it begins

    @property
    def vocab_size(self) -> int:
        """The number of tokens that were drawn from: the first ones of the teacher."""
        return self.about["vocab_size"]

    def check(self, vocab_size: int, temperature: float, tokenizer: Any) -> None:
        """Refuse a run that this teacher was not read for.

        Args:
            tokenizer: The `processing_class` of a trainer, or None.

        Raises:
            ValueError: another tokenizer, a smaller vocabulary or another temperature.
        """
        name = str(self.folder)
        if temperature != self.about["temperature"]:
            rule = f"Tokens were drawn at temperature {self.about['temperature']}, and the run has {temperature}."
            raise invalid("teacher", name, rule, OTHER)
        if self.vocab_size > vocab_size:
            rule = f"They were drawn from {self.vocab_size} tokens, and the model has {vocab_size}."
            raise invalid("teacher", name, rule, f"Run `flextron teach --vocab-size {vocab_size}` for it.")
        theirs = known_tokenizer(self.folder) if hasattr(tokenizer, "get_added_vocab") else None
        if theirs is not None:
            check_tokens("teacher", name, theirs, tokenizer, OTHER)

    def check_text(self, dataset: Any, collate: Any) -> None:
        """Look for some rows of a training text, from its first to its last, before the first step.

        Raises:
            ValueError: one of them was not read by the teacher.
        """
        count = min(LOOKED_AT, len(dataset))
        self._find(collate([dataset[i * (len(dataset) - 1) // max(1, count - 1)] for i in range(count)]))

    def read(self, inputs: Mapping[str, torch.Tensor]) -> SampledTeacher:
        """What was drawn at the tokens of a batch; at padding nothing.

        Args:
            inputs: Of the model that learns.

        Raises:
            ValueError: a row that the teacher has not read.
        """
        found, real = self._find(inputs)
        device, draws = inputs["input_ids"].device, self.about["draws"]
        parts = [self._row(shard, row) for shard, row in found]
        sizes = torch.cat([part.sizes for part in parts]).long()
        most = int(sizes.max())
        filled = torch.arange(most) < sizes[:, None]
        ids, shares = torch.zeros(filled.shape, dtype=torch.long), torch.zeros(filled.shape)
        ids[filled] = torch.cat([part.ids for part in parts])
        shares[filled] = torch.cat([part.counts for part in parts]).float() / draws

        def spread(values: torch.Tensor) -> torch.Tensor:
            result = values.new_zeros(*real.shape, *values.shape[1:])
            result[real] = values
            return result.to(device)

        entropies = torch.cat([part.entropies for part in parts]).float()
        return SampledTeacher(spread(ids), spread(shares), spread(entropies), self.vocab_size)

    def _find(self, inputs: Mapping[str, torch.Tensor]) -> tuple[list[list[int]], torch.Tensor]:
        """For each row of a batch its shard and its place there; which tokens are its own."""
        keys, real = read_rows(inputs)
        places = torch.searchsorted(self._keys, keys).clamp_(max=len(self._keys) - 1)
        unknown = (self._keys[places] != keys).nonzero()[:, 0].tolist()
        if unknown:
            tokens, length = int(real[unknown[0]].sum()), self.about["sequence_length"]
            rule = f"{len(unknown)} of {len(keys)} rows of the training text are not among its {len(self._keys)}"
            rule += f", which have at most {length} tokens; the first of these has {tokens}."
            remedy = "Make one of this text, or of all texts of a mixture: same tokenizer, `sequence_length`,"
            remedy += " document boundaries, `max_samples`."
            raise invalid("teacher", str(self.folder), rule, remedy)
        return self._places[places].tolist(), real

    def _row(self, shard: int, row: int) -> Drawn:
        ends = self._ends[shard]
        tokens, entries = (slice(*ends[name][row : row + 2].tolist()) for name in ("token_ends", "entry_ends"))
        file = self._files[shard]
        ids = file.get_slice("ids")[entries].long()
        if self.vocab_size > LOW_IDS:
            ids += LOW_IDS * file.get_slice("high_ids")[entries].long()
        counts, sizes, entropies = (
            file.get_slice(name)[part] for name, part in (("counts", entries), ("sizes", tokens), ("entropies", tokens))
        )
        return Drawn(ids, counts, sizes, entropies)


def is_cache(source: str | os.PathLike) -> bool:
    """Whether a folder says that it is a cache."""
    return (Path(source) / FILE).is_file()


def read_about(folder: str | os.PathLike) -> dict[str, Any]:
    """What a cache says about itself.

    Raises:
        ValueError: it says nothing that this version reads.
    """
    path = Path(folder) / FILE
    fields = {"format", "vocab_size", "temperature", "draws", "sequence_length", "samples", "shards"}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(about, dict) or not fields <= about.keys() or about["format"] != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
    except (ValueError, OSError) as error:
        rule = f"{FILE} is none of a cache of a teacher ({error})."
        raise invalid("teacher", str(folder), rule, OTHER) from error
    return about


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"teacher-{number:05d}.safetensors"


def write_shard(path: Path, keys: torch.Tensor, rows: Sequence[Drawn], vocab_size: int) -> None:
    """Write what was drawn for the rows of a shard."""
    whole = {name: torch.cat([getattr(row, name) for row in rows]) for name in ("ids", "counts", "sizes", "entropies")}
    ids = whole["ids"]
    tensors = {
        "keys": keys,
        "token_ends": torch.tensor([len(row.sizes) for row in rows]).cumsum(0),
        "entry_ends": torch.tensor([len(row.ids) for row in rows]).cumsum(0),
        "sizes": whole["sizes"].to(torch.uint8),
        "entropies": whole["entropies"].half(),
        "ids": (ids % LOW_IDS).to(torch.uint16),
        "counts": whole["counts"].to(torch.uint8),
    }
    if vocab_size > LOW_IDS:
        tensors["high_ids"] = (ids // LOW_IDS).to(torch.uint8)
    with write_file_beside(path) as beside:
        save_file(tensors, beside)


def open_shard(path: Path) -> Any:
    """Open a shard, of which parts are read when they are asked for.

    Raises:
        ValueError: it is damaged.
    """
    try:
        file = safe_open(path, framework="pt")
        file.get_slice("keys"), file.get_slice("counts")
    except Exception as error:  # safetensors raises a bare exception class of its own
        rule = f"It is damaged ({error})."
        raise invalid("teacher", str(path), rule, "Delete it, and run `flextron teach` again.") from error
    return file
