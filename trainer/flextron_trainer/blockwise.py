"""Block-wise local distillation: every layer of every row learns to write what the parent's layer writes, one by one.

The parent is the model itself at full size, before it learns: what it writes behind each layer is kept (`States`), and
a layer learns when all that it needs of the layers behind it is there. So one layer is in memory at a time with its
gradients and its optimizer, no second model, and no logits (block-wise local distillation: arXiv 2411.19146, and arXiv
2510.14444, by which it needs a tenth of the data of retraining).

All rows that keep a layer learn in the same steps. A row aims at the leading channels of what the parent has at the
entry of the next layer that the row keeps, so the layer before a dropped one learns what that one wrote. Errors are
relative to the size of the residual stream of each token: a norm comes behind it, and errors of all layers can be
compared (`Metric`). The full network is one of the rows: its error begins at zero, and keeps what the others share from
being forgotten.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from modeling_flextron.corrections import owner_number
from modeling_flextron.errors import invalid
from modeling_flextron.frontier import held
from modeling_flextron.switching import quantization_method

from .layerwise import FULL, Blocks, Sizes, Text, run_layer, sizes_of

PARAMETERS, INPUTS = ("all", "corrections"), ("own", "parent")
IN_MEMORY = 2**28  # bytes of the states behind one layer; more of them go to a file
MEASURED = 8  # sequences on which the error of a layer is measured, before and after
Errors = dict[str, tuple[float, float]]  # of a layer: name of a row -> its error before and after


@dataclass(frozen=True)
class BlockRecipe:
    """How each layer learns.

    Args:
        steps: Optimizer steps of each layer.
        batch_size: Sequences of a step.
        learning_rate, betas, epsilon, weight_decay, max_grad_norm: Of AdamW, which every layer begins anew.
        scheduler, scheduler_kwargs, warmup_steps: Of the learning rate within a layer, by their names in transformers.
        seed: Of the order of sequences, another one in each layer.
        parameters: `"all"`, or `"corrections"` for what rows own alone: the full network stays exactly as it is.
        inputs: What a row reads: `"own"`, what it wrote in the layers before, which makes up for their errors and keeps
            states for each row; or `"parent"`, what the parent's layer reads, which is better where corrections alone
            learn.
        autocast: Dtype of matrix products; None for float32.
        quiet: Show no progress bar.
    """

    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    scheduler: str = "cosine"
    scheduler_kwargs: dict[str, Any] | None = None
    warmup_steps: int = 0
    seed: int = 0
    parameters: str = "all"
    inputs: str = "own"
    autocast: torch.dtype | None = None
    quiet: bool = False


class Kept(Protocol):
    """Where layers are kept that have learned, for a run that goes on."""

    def __contains__(self, number: object) -> bool:
        """Whether a layer has learned."""

    def restore(self, number: int, layer: torch.nn.Module) -> Errors:
        """Bring a layer to where it was."""

    def save(self, number: int, layer: torch.nn.Module, errors: Errors) -> None:
        """Keep a layer."""


@dataclass(frozen=True)
class Part:
    """A row in a layer, with its sizes there; `aim` is the layer whose entry it aims at."""

    name: str
    sizes: Sizes
    aim: int


class States:
    """Hidden states `[N, S, D]`: in memory, or in a file, which is read batch by batch and not mapped.

    Args:
        shape: Of all of them.
        dtype: Of a number.
        path: Of the file, which goes with `close`; None for memory.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, path: Path | None = None):
        self.shape, self.dtype, self.path = shape, dtype, path
        self.memory = torch.empty(shape, dtype=dtype, device="cpu") if path is None else None
        self.file = None if path is None else open(path, "w+b")  # noqa: SIM115  # until `close`

    def read(self, places: Sequence[int]) -> torch.Tensor:
        """Some sequences, `[B, S, D]` on the CPU."""
        if self.memory is not None:
            return self.memory[list(places)]
        assert self.file is not None
        found = torch.empty(len(places), *self.shape[1:], dtype=self.dtype, device="cpu")
        for one, place in zip(found, places, strict=True):
            self.file.seek(place * self._bytes)
            if self.file.readinto(one.view(torch.uint8).numpy().data) != self._bytes:
                raise OSError(f"{self.path} ends too early.")
        return found

    def write(self, start: int, states: torch.Tensor) -> None:
        """Put sequences at a place."""
        states = states.to("cpu", self.dtype)
        if self.memory is not None:
            self.memory[start : start + len(states)] = states
            return
        assert self.file is not None
        self.file.seek(start * self._bytes)
        self.file.write(states.contiguous().view(torch.uint8).numpy().tobytes())

    def close(self) -> None:
        """Give up memory and file."""
        self.memory = None
        if self.file is not None and self.path is not None:
            self.file.close()
            self.path.unlink(missing_ok=True)

    @property
    def _bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize


class Streams:
    """What the parent has at the entry of each layer, made when it is asked for: its layers must not have learned yet.

    Args:
        text: The sequences.
        batch_size: Sequences of a forward pass.
        folder: For what is too large for memory; None for memory in any case.
    """

    def __init__(self, blocks: Blocks, text: Text, batch_size: int, folder: Path | None = None):
        self.blocks, self.text, self.folder = blocks, text, folder
        self.shape = (*text.input_ids.shape, blocks.config.hidden_size)
        self.batches = [part.tolist() for part in torch.arange(self.shape[0], device="cpu").split(batch_size)]
        self.at: dict[int, States] = {}
        self.own: dict[str, States] = {}  # of rows that read what they wrote themselves
        self.numbers = count()  # of files

    @torch.no_grad()
    def reach(self, number: int) -> States:
        """States at the entry of a layer; behind the last layer, of one more."""
        if not self.at:
            self.at[0] = self._made(None, None, FULL)
        for following in range(max(self.at) + 1, number + 1):
            before = following - 1
            with self.blocks.layer(before) as layer:
                self.at[following] = self._made(layer, self.at[before], FULL)
        return self.at[number]

    def read_by(self, part: Part, number: int) -> States:
        """What a row reads in a layer."""
        return self.own.get(part.name) or self.reach(number)

    @torch.no_grad()
    def go_on(self, parts: Sequence[Part], number: int, layer: torch.nn.Module) -> None:
        """Let rows read what they wrote in a layer from here on."""
        for part in parts:
            before = self.read_by(part, number)
            self.own[part.name] = self._made(layer, before, part.sizes)
            if before is not self.at.get(number):
                before.close()

    def forget(self, number: int) -> None:
        """Give up the states at the entry of a layer."""
        if number in self.at:
            self.at.pop(number).close()

    def close(self) -> None:
        """Give up all states."""
        for states in (*self.at.values(), *self.own.values()):
            states.close()

    def _made(self, layer: torch.nn.Module | None, before: States | None, sizes: Sizes) -> States:
        """States behind a layer, of those before it, batch by batch; without a layer those before the first one."""
        path = None
        if self.folder and prod(self.shape) * self.blocks.dtype.itemsize > IN_MEMORY:
            path = self.folder / f"states-{next(self.numbers)}"
        states = States((*self.shape[:-1], sizes["hidden"] or self.shape[-1]), self.blocks.dtype, path)
        for places in self.batches:
            text = self.text.at(places, self.blocks.device)
            if layer is None or before is None:
                made = self.blocks.embed(text)
            else:
                made = run_layer(self.blocks, layer, before.read(places).to(self.blocks.device), text, sizes)
            states.write(places[0], made)
        return states


def parts_of(blocks: Blocks, number: int, recipe: BlockRecipe) -> list[Part]:
    """The rows that learn in a layer, the largest first."""
    built, found = blocks.config.built, []
    rows = {"full": built, **held(blocks.config.frontier)}
    if built in held(blocks.config.frontier).values():
        del rows["full"]
    for name, row in rows.items():
        if number not in row.layers:
            continue
        sizes = sizes_of(blocks, row)[number]
        if sizes["owner"] is None and recipe.parameters == "corrections":
            continue
        aim = (*row.layers, len(built.layers))[row.layers.index(number) + 1]
        found.append(Part(name, sizes, aim))
    return found


@dataclass(frozen=True)
class Metric:
    """How errors of the residual stream are measured.

    Args:
        readout: `[D, D]`, see `readout_metric`.
        centred: Whether the norms of the model take the mean away.
    """

    readout: torch.Tensor
    centred: bool

    def errors(self, states: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
        """Errors `[B, S]` of `states` `[B, S, d]`, relative to the size of their aim, of which leading channels count.

        Half of it is the squared error; the other half what it changes in the predictions of a head that read it here.
        """
        size = states.shape[-1]
        states, aim = states.float(), aim[..., :size].float()
        squared = (states - aim).square().mean(-1) / aim.square().mean(-1).clamp_min(1e-12)
        error = self._normed(states) - self._normed(aim)
        return squared + (error @ self.readout[:size, :size].to(error) * error).mean(-1)

    def _normed(self, states: torch.Tensor) -> torch.Tensor:
        if self.centred:
            states = states - states.mean(-1, keepdim=True)
        return states * (states.square().mean(-1, keepdim=True) + 1e-12).rsqrt()


@torch.no_grad()
def readout_metric(head: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor, device: Any = None) -> torch.Tensor:
    """How much an error of the last normed states changes what the head predicts, `[D, D]`, without any logits.

    It is the curvature of the KL divergence at one prediction for all places, the frequencies p of tokens in the text:
    the covariance under p of the rows of the head, each channel times the weight of the norm before; mean diagonal 1.

    Args:
        head: `[V, D]`.
        scale: Weight of the norm, `[D]`.
        ids: Token ids of the text.
        device: Of the result and the products.
    """
    tokens, width = head.shape
    share = torch.bincount(ids.flatten().cpu(), minlength=tokens).to(device, torch.float32) + 0.1
    share = share / share.sum()
    mean, square = torch.zeros(width, device=device), torch.zeros(width, width, device=device)
    for start in range(0, tokens, 4096):
        rows = head[start : start + 4096].to(device, torch.float32) * scale.to(device, torch.float32)
        weighted = share[start : start + 4096, None] * rows
        mean += weighted.sum(0)
        square.addmm_(weighted.T, rows)
    square -= torch.outer(mean, mean)
    return square / square.diagonal().mean().clamp_min(1e-12)


def check_blocks(model: Any, parameters: str) -> None:
    """Refuse a model whose layers cannot learn one by one.

    Raises:
        ValueError: it has nothing smaller than itself, owns nothing where only that is to learn, is quantized, or its
            tokens choose their sizes.
    """
    config = model.config
    if all(row == config.built for row in held(config.frontier).values()):
        rule = "Its frontier has the full network alone, from which its layers would learn."
        raise invalid("model", type(model).__name__, rule, "Convert the parent with smaller budgets.")
    if parameters == "corrections" and not config.corrections:
        rule = "No row owns anything that could learn while the shared weights stay."
        raise invalid("block_parameters", parameters, rule, "Convert with corrections=0.03, or train 'all'.")
    if quantization_method(config) is not None:
        rule = "Quantized weights do not learn."
        raise invalid("model", quantization_method(config), rule, "Load it without, and quantize what was trained.")
    if config.token_routing is not None:
        rule = "Its tokens choose their sizes by routers that were made for these weights."
        raise invalid("model", "token routing", rule, "Train the blocks first, and then the routers.")


def learning_parameters(layer: torch.nn.Module, parameters: str) -> list[torch.nn.Parameter]:
    """What of a layer learns: nothing that has no gradients."""
    own = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    return [p for name, p in own.items() if parameters == "all" or owner_number(name) is not None]


def decay_groups(parameters: Sequence[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Groups of an optimizer for a layer: norms and biases, its only vectors, do not decay, as in a `Trainer`."""
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) is kind] for kind in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def distill_blocks(
    blocks: Blocks, text: Text, recipe: BlockRecipe, *, kept: Kept | None = None, folder: Path | None = None
) -> dict[str, list[tuple[float, float]]]:
    """Let every layer learn, the first one first.

    Args:
        text: Sequences; those beyond `steps * batch_size` are left out by the caller, as all of them run.
        recipe: How.
        kept: Keeps each layer as soon as it has learned, and has those that had learned before.
        folder: For states that are too large for memory.

    Returns:
        Name of a row -> its errors before and after in each layer that learned.

    Raises:
        FloatingPointError: an error is no number; the layers before are kept.
    """
    depth, found = blocks.config.num_hidden_layers, dict[str, list[tuple[float, float]]]()
    done = [kept is not None and number in kept for number in range(depth)]
    streams = Streams(blocks, text, recipe.batch_size, folder)
    ids = text.input_ids if text.attention_mask is None else text.input_ids[text.attention_mask.bool()]
    readout = readout_metric(*blocks.head(), ids, blocks.device)
    metric = Metric(readout, blocks.config.norm_type == "layer")
    bar = tqdm(total=done.count(False) * recipe.steps, desc="Blocks", unit="step", disable=recipe.quiet)
    try:
        for number in range(depth):
            parts = parts_of(blocks, number, recipe)
            streams.reach(max([number + 1, *(part.aim for part in parts)]))  # before this layer changes
            with blocks.layer(number) as layer:
                if kept is not None and done[number]:
                    errors = kept.restore(number, layer)
                else:
                    bar.set_postfix_str(f"layer {number}", refresh=False)
                    learns = parts and learning_parameters(layer, recipe.parameters)
                    errors = _learn(number, layer, parts, streams, metric, recipe, bar) if learns else {}
                    if kept is not None:
                        kept.save(number, layer, errors)
                if recipe.inputs == "own" and number + 1 < depth:
                    streams.go_on(parts, number, layer)
            streams.forget(number)
            for name, change in errors.items():
                found.setdefault(name, []).append(change)
    finally:
        streams.close()
        bar.close()
    return found


def _learn(
    number: int, layer: torch.nn.Module, parts: list[Part], streams: Streams, metric: Metric, recipe: BlockRecipe,
    bar: tqdm,
) -> Errors:  # fmt: skip
    """Let one layer learn; the errors of its parts before and after."""
    from transformers import get_scheduler  # PEFT comes with it

    errors = partial(_errors, number, layer, parts, streams, metric, recipe.autocast)
    sequences, r = streams.shape[0], recipe
    few = list(range(min(MEASURED, sequences)))
    with _learning(layer, r.parameters) as parameters:
        with torch.no_grad():
            before = {part.name: error.item() for part, error in errors(few)}
        optimizer = torch.optim.AdamW(
            decay_groups(parameters, r.weight_decay), r.learning_rate, r.betas, r.epsilon, fused=True
        )
        schedule = get_scheduler(
            r.scheduler, optimizer, r.warmup_steps, r.steps, scheduler_specific_kwargs=r.scheduler_kwargs
        )
        for step, places in enumerate(batches_of(sequences, r, number)):
            for part, error in errors(places):
                if not torch.isfinite(error):
                    raise FloatingPointError(
                        f"The error of row {part.name!r} in layer {number} is {error.item()} at step {step}. The layers"
                        " before are kept. Resume with a lower learning rate, or look for broken samples."
                    )
                error.backward()
            if r.max_grad_norm > 0:
                torch.nn.utils.clip_grad_norm_(parameters, r.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            bar.update()
        optimizer.state.clear()  # optimizer and schedule are a circle of references, which waits for a collection
        optimizer.param_groups.clear()
        with torch.no_grad():
            return {part.name: (before[part.name], error.item()) for part, error in errors(few)}


def _errors(
    number: int, layer: torch.nn.Module, parts: list[Part], streams: Streams, metric: Metric,
    autocast: torch.dtype | None, places: Sequence[int],
) -> Iterator[tuple[Part, torch.Tensor]]:  # fmt: skip
    """Each part of a layer and its mean error over the tokens of some sequences, one after the other."""
    blocks = streams.blocks
    rows = streams.text.at(places, blocks.device)
    with torch.autocast(blocks.device.type, autocast, enabled=autocast is not None):
        for part in parts:
            states = streams.read_by(part, number).read(places).to(blocks.device, torch.float32)
            aim = streams.reach(part.aim).read(places).to(blocks.device)
            error = metric.errors(run_layer(blocks, layer, states, rows, part.sizes), aim)
            real = torch.ones_like(error) if rows.attention_mask is None else rows.attention_mask.to(error)
            yield part, (error * real).sum() / real.sum().clamp_min(1)


@contextmanager
def _learning(layer: torch.nn.Module, parameters: str) -> Iterator[list[torch.nn.Parameter]]:
    """Let what learns of a layer have gradients, in float32; afterwards all is as before."""
    asked = {name: (p.requires_grad, p.dtype) for name, p in layer.named_parameters()}
    layer.float()
    found = learning_parameters(layer, parameters)
    layer.requires_grad_(False)
    for parameter in found:
        parameter.requires_grad_(True)
    try:
        yield found
    finally:
        for name, parameter in layer.named_parameters():
            learns, dtype = asked[name]
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(learns)


def batches_of(sequences: int, recipe: BlockRecipe, number: int) -> Iterator[list[int]]:
    """The batches of sequences of a layer, all of them once before any comes again."""
    generator = torch.Generator(device="cpu").manual_seed(recipe.seed * 1_000_003 + number)
    waiting: list[int] = []
    for _ in range(recipe.steps):
        while len(waiting) < recipe.batch_size:
            waiting += torch.randperm(sequences, generator=generator, device="cpu").tolist()
        yield waiting[: recipe.batch_size]
        del waiting[: recipe.batch_size]
