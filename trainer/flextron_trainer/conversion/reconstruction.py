"""What is lost when units are cut, and how much of it linear algebra brings back, without training.

A row of the frontier runs the leading `k` of the units that `down_proj` and `o_proj` read. From second moments of
these units on calibration text, `C = E[h h^T]` and `T = E[y h^T]` with what the matrix should write, `y`, follow

* the matrix that writes `y` best from what is left, `W* = T C^-1` (ridge regression towards the old matrix);
* its best approximation `W + up down` of a low rank, best in the error of the output: `up` holds leading eigenvectors
  of `D C D^T` with `D = W* - W`, and `down = up^T D`; the eigenvalues say how much error each rank takes away;
* an order in which units are best removed, each time with the others making up for it (`removal_order`).

Errors are relative to the size of the residual stream at each token: a norm comes behind it, so that is what the next
layer sees, and errors of all layers can be compared.

A row owns its corrections. The weights that it shares with the other rows stay as they are, so the full network stays
the parent.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from modeling_flextron.positions import MASKS
from modeling_flextron.subnetwork import SubNetwork, count_parameters

RIDGE = 1e-2  # of the mean of the diagonal
MATRICES = ("self_attn.o_proj", "mlp.down_proj")


# ------------------------------------------------------------------------------------------------ the algebra


@dataclass
class Moments:
    """Running sums over tokens of what a matrix reads, `h` `[K]`, and of what it should write, `y` `[D]`.

    Args:
        inputs: `[K, K]`, sum of `h h^T`.
        cross: `[D, K]`, sum of `y h^T`.
        input_sum: `[K]`, sum of `h`.
        output_sum: `[D]`, sum of `y`.
        energy: Sum of `|y|^2`.
        tokens: Sum of the weights of the tokens.
    """

    inputs: torch.Tensor
    cross: torch.Tensor
    input_sum: torch.Tensor
    output_sum: torch.Tensor
    energy: float = 0.0
    tokens: float = 0.0

    @classmethod
    def zeros(cls, read: int, written: int, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> "Moments":
        """Of no tokens yet: `read` is `K` and `written` is `D`."""

        def empty(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(empty(read, read), empty(written, read), empty(read), empty(written))

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Count tokens: inputs `[..., K]`, outputs `[..., D]` and how much each token counts, `[...]`."""
        h = inputs.flatten(0, -2).to(self.inputs.dtype)
        y = outputs.flatten(0, -2).to(self.inputs.dtype)
        w = torch.ones_like(h[:, 0]) if weights is None else weights.flatten().to(h.dtype)
        self.inputs += (h * w[:, None]).T @ h
        self.cross += (y * w[:, None]).T @ h
        self.input_sum += w @ h
        self.output_sum += w @ y
        self.energy += float((w * y.square().sum(-1)).sum())
        self.tokens += float(w.sum())

    def centred(self) -> "Moments":
        """The same of what is left without the means, for a fit with a bias."""
        h, y = self.input_sum / self.tokens, self.output_sum / self.tokens
        return Moments(
            self.inputs - torch.outer(self.input_sum, h),
            self.cross - torch.outer(self.output_sum, h),
            torch.zeros_like(h),
            torch.zeros_like(y),
            self.energy - float(self.output_sum @ y),
            self.tokens,
        )

    def error(self, weight: torch.Tensor) -> float:
        """Mean of `|y - W h|^2` over tokens, of a matrix `[D, K]`."""
        w = weight.double()
        fitted = 2 * (w * self.cross.double()).sum() - ((w @ self.inputs.double()) * w).sum()
        return (self.energy - float(fitted)) / self.tokens


def regularised(inputs: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """Second moments in float64 with `ridge` times the mean of the diagonal added to it."""
    c = inputs.double()
    return c + (ridge * c.diagonal().mean().clamp_min(1e-30)) * torch.eye(len(c), dtype=c.dtype, device=c.device)


def least_squares(moments: Moments, weight: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """The change `[D, K]` of a matrix `weight` `[D, K]` that brings its outputs nearest to what they should be.

    `ridge` pulls the change towards none. The result is in float64.
    """
    missing = moments.cross.double() - weight.double() @ moments.inputs.double()
    factor = torch.linalg.cholesky(regularised(moments.inputs, ridge))
    return torch.cholesky_solve(missing.T, factor).T


def low_rank(
    change: torch.Tensor, inputs: torch.Tensor, ridge: float = RIDGE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors of a change of a matrix, best first.

    Args:
        change: `[D, K]`, of `least_squares`.
        inputs: `[K, K]`, second moments of what the matrix reads.
        ridge: That of `least_squares`.

    Returns:
        `up` `[D, D]`, `down` `[D, K]` and `gains` `[D]`: the leading `r` columns and rows are the best change of rank
        `r`, and the sum of the leading `r` gains is the error that it takes away.
    """
    taken = change @ regularised(inputs, ridge) @ change.T
    gains, up = torch.linalg.eigh((taken + taken.T) / 2)
    up = up.flip(1)
    return up, up.T @ change, gains.flip(0).clamp_min(0)


def allocate(gains: Mapping[str, torch.Tensor], costs: Mapping[str, int], budget: float) -> dict[str, int]:
    """A rank for every matrix: the next one goes where it takes away the most error for what it costs.

    Args:
        gains: Name of a matrix -> the error that each of its ranks takes away, descending.
        costs: Name -> what one rank costs.
        budget: What all may cost together.
    """
    ranks = dict.fromkeys(gains, 0)
    values = {name: found.tolist() for name, found in gains.items()}
    queue = [(-value[0] / costs[name], name) for name, value in values.items() if value]
    heapq.heapify(queue)
    while queue:
        gain, name = heapq.heappop(queue)
        if gain >= 0 or costs[name] > budget:
            continue
        budget -= costs[name]
        ranks[name] += 1
        if ranks[name] < len(values[name]):
            heapq.heappush(queue, (-values[name][ranks[name]] / costs[name], name))
    return ranks


def norm_scale(parent: torch.Tensor, reduced: torch.Tensor) -> torch.Tensor:
    """The factor on the weight of a norm `[d]` that brings its outputs nearest to those of the parent.

    Args:
        parent, reduced: Sums over tokens, per channel, of products of the outputs of both norms and of squares of
            those of the reduced one.
    """
    return torch.where(reduced > 0, parent / reduced.clamp_min(1e-30), 1.0)


def removal_order(
    inputs: torch.Tensor, weight: torch.Tensor, units: torch.Tensor, ridge: float = RIDGE, chunk: int = 0
) -> torch.Tensor:
    """Units in the order in which they are best kept: greedy, with the others making up for each that goes.

    Removing the columns `b` of `W` costs `tr(W_b (C^-1_bb)^-1 W_b^T)` when all others are fitted anew (Optimal Brain
    Surgeon). What goes is taken out of `C^-1` and `W` before the next one is chosen, so one order serves every size.

    Args:
        inputs: `[K, K]`, second moments of the columns.
        weight: `[D, K]`.
        units: `[U, e]`, the columns of each unit.
        ridge: See `regularised`.
        chunk: Remove so many at once, cheapest first, which is nearly the same and takes fewer passes; by default one
            in 96, and one by one where units have several columns.

    Returns:
        `[U]`, numbers of units, the best one first.
    """
    w = weight.double().clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(regularised(inputs, ridge)))
    size = units.shape[1]
    chunk = chunk or (max(1, len(units) // 96) if size == 1 else 1)
    alive = torch.arange(len(units), device=units.device)
    columns = units.flatten()
    inverse, w = inverse[columns][:, columns], w[:, columns]  # unit after unit
    gone: list[torch.Tensor] = []
    while len(alive):
        count = min(chunk, len(alive))
        if size == 1:
            costs = w.square().sum(0) / inverse.diagonal()
        else:
            blocks = inverse.view(len(alive), size, len(alive), size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            parts = w.view(len(w), len(alive), size).permute(1, 2, 0)  # [U, e, D]
            costs = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
        order = costs.argsort(stable=True)
        out, kept = order[:count], order[count:].sort().values
        gone.append(alive[out])
        places = torch.arange(len(alive) * size, device=units.device).view(-1, size)
        b, rest = places[out].flatten(), places[kept].flatten()
        # Those left make up for what goes, and the inverse becomes that of their own moments.
        solved = torch.linalg.solve(inverse[b][:, b], inverse[b][:, rest])
        w = w[:, rest] - w[:, b] @ solved
        inverse = inverse[rest][:, rest] - inverse[rest][:, b] @ solved
        alive = alive[kept]
    return torch.cat(gone).flip(0)


# ------------------------------------------------------------------------------------------------ corrections


@dataclass(frozen=True)
class Corrections:
    """What one row of the frontier adds to the weights that it shares with the others.

    Names are those of the parameters of the full elastic model, so `layers.3` is layer 3 whether or not others are
    dropped. `d` and `k` are the sizes of the row, `r` the rank, which differs between matrices.

    Args:
        low_rank: Name of a matrix -> `up` `[d, r]` and `down` `[r, k]`; the row runs `W[:d, :k] + up @ down`.
        vectors: Name of a norm's weight or of a bias -> `[d]`, which the row uses in its place.
    """

    low_rank: dict[str, tuple[torch.Tensor, torch.Tensor]]
    vectors: dict[str, torch.Tensor]

    def parameters(self) -> int:
        """How many numbers the row owns."""
        return sum(up.numel() + down.numel() for up, down in self.low_rank.values()) + sum(
            vector.numel() for vector in self.vectors.values()
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """One flat table, as files hold it: `NAME.up` and `NAME.down` for a matrix `NAME`, and the vectors."""
        found = dict(self.vectors)
        for name, (up, down) in self.low_rank.items():
            found |= {f"{name}.up": up.contiguous(), f"{name}.down": down.contiguous()}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "Corrections":
        """Those of a table that `tensors` made."""
        low_rank = {
            name.removesuffix(".up"): (up, tensors[f"{name.removesuffix('.up')}.down"])
            for name, up in tensors.items()
            if name.endswith(".up")
        }
        vectors = {name: tensor for name, tensor in tensors.items() if not name.endswith((".up", ".down"))}
        return cls(low_rank, vectors)

    def cut(self, ranks: Mapping[str, int]) -> "Corrections":
        """Those of lower ranks."""
        kept = {name: ranks.get(name, 0) for name in self.low_rank}
        low_rank = {
            name: (up[:, : kept[name]].clone(), down[: kept[name]].clone())
            for name, (up, down) in self.low_rank.items()
            if kept[name]
        }
        return Corrections(low_rank, self.vectors)


@contextmanager
def corrected(model: torch.nn.Module, corrections: Corrections) -> Iterator[None]:
    """Fold the corrections of a row into the weights inside the `with` block: only that row is right there."""
    parameters = dict(model.named_parameters())
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        try:
            for name, (up, down) in corrections.low_rank.items():
                part = parameters[name].data[: len(up), : down.shape[1]]
                before.append((part, part.clone()))
                part += (up.to(part) @ down.to(part)).to(part)
            for name, vector in corrections.vectors.items():
                part = parameters[name].data[: len(vector)]
                before.append((part, part.clone()))
                part.copy_(vector)
            yield
        finally:
            for part, values in reversed(before):
                part.copy_(values)


# ------------------------------------------------------------------------------------------------ running layers


class Halves:
    """The two halves of each layer of a decoder, run one after the other on states that are given.

    Args:
        decoder: A `FlextronModel`, in the evaluation mode.
    """

    def __init__(self, decoder: Any):
        self.decoder, self.config = decoder, decoder.config

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """States `[B, S, D]` before the first layer."""
        decoder = self.decoder
        states = decoder.embed_tokens(ids)
        if decoder.embed_positions is None:
            return states
        return states + decoder.embed_positions(torch.arange(ids.shape[1], device=ids.device)[None])

    def read_by_output(self, layer: int, normed: torch.Tensor, heads: int, hidden: int) -> torch.Tensor:
        """What `o_proj` reads, `[B, S, heads E]`, of states that are normed already."""
        decoder, found = self.decoder, list[torch.Tensor]()
        positions = torch.arange(normed.shape[1], device=normed.device)[None]
        embeddings = None
        if decoder.rotary_emb is not None:
            cos, sin = decoder.rotary_emb(normed, positions)
            embeddings = cos.unsqueeze(1), sin.unsqueeze(1)
        mask = MASKS[self.config.layer_types[layer]](self.config, normed, None, None)
        decoder.layers[layer].self_attn(
            normed, embeddings, mask, heads=heads, hidden=hidden, observe=lambda _, __, states: found.append(states)
        )
        return found[0]

    def read_by_down(self, layer: int, normed: torch.Tensor, mlp: int, hidden: int) -> torch.Tensor:
        """What `down_proj` reads, `[B, S, mlp]`, of states that are normed already."""
        found: list[torch.Tensor] = []
        self.decoder.layers[layer].mlp(normed, mlp, hidden, observe=lambda _, __, states: found.append(states))
        return found[0]


@torch.no_grad()
def input_moments(model: Any, batches: Sequence[torch.Tensor]) -> Iterator[tuple[int, str, torch.Tensor, Moments]]:
    """Second moments of what `o_proj` and `down_proj` of every layer read in the whole model.

    One matrix at a time: in memory are `4 K^2` bytes for its `K` inputs and `4 T (2 D + K)` for the states of `T`
    tokens, whatever the number of layers. Tokens are weighted as in `reconstruct`; outputs are not counted.

    Args:
        model: A `FlextronForCausalLM`, at full size.
        batches: Token ids `[B, S]`.

    Yields:
        Number of the layer, `"heads"` or `"mlp"`, the matrix `[D, K]`, and the moments of what it reads.
    """
    halves, built = Halves(model.model), model.model.built
    states = [halves.embed(ids.to(model.device)) for ids in batches]
    for i, layer in enumerate(tqdm(model.model.layers, desc="Second moments", unit="layer")):
        entering = states
        for axis, matrix in (("heads", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
            moments = Moments.zeros(matrix.in_features, 0, model.device)
            following = []
            for x, first in zip(states, entering, strict=True):
                if axis == "heads":
                    h = halves.read_by_output(i, layer.input_layernorm(x), built.heads[i], built.hidden)
                else:
                    normed = layer.post_attention_layernorm(first if layer.parallel_residual else x)
                    h = halves.read_by_down(i, normed, built.mlp[i], built.hidden)
                following.append(x + matrix(h))
                moments.add(h, h[..., :0], _token_weights(following[-1]))
            states = following
            yield i, axis, matrix.weight, moments


def _token_weights(stream: torch.Tensor) -> torch.Tensor:
    """`[B, S]`: makes squared errors of states `[B, S, D]` relative to their size, which the next norm takes away."""
    return 1 / stream.float().square().mean(-1).clamp_min(1e-12)


def _fits(
    model: Any,
    subnetwork: SubNetwork,
    batches: Sequence[torch.Tensor],
    *,
    sequential: bool,
    stream: bool = True,
    weighted: bool = True,
    norms: bool = False,
    vectors: dict[str, torch.Tensor] | None = None,
    answers: dict[str, torch.Tensor] | None = None,
) -> Iterator[tuple[str, Moments, torch.Tensor]]:
    """Walk through the layers of the parent and of a row side by side, and show each matrix of the row its moments.

    Whoever iterates puts the matrix that the row is to run into `answers` under its name before the next step.

    Yields:
        Name of the matrix, its moments, and the matrix `[d, k]` itself.
    """
    halves, decoder, d = Halves(model.model), model.model, subnetwork.hidden
    answers, vectors = {} if answers is None else answers, {} if vectors is None else vectors
    device = model.device
    parent = [halves.embed(ids.to(device)) for ids in batches]
    reduced = [states[..., :d] for states in parent]
    at = {layer: i for i, layer in enumerate(subnetwork.layers)}
    built = model.model.built

    def normed(name: str, module: Any, ours: list[torch.Tensor], whole: list[torch.Tensor]) -> list[torch.Tensor]:
        outputs = [module(states) for states in ours]
        if norms:
            aims = [module(states)[..., :d] for states in whole]
            both = sum((a.double() * o.double()).flatten(0, -2).sum(0) for a, o in zip(aims, outputs, strict=True))
            own = sum(o.double().square().flatten(0, -2).sum(0) for o in outputs)
            scale = norm_scale(both, own)
            for kind, parameter in module.named_parameters():
                vectors[f"{name}.{kind}"] = (parameter[:d].double() * scale).to(parameter.dtype)
            outputs = [o * scale.to(o.dtype) for o in outputs]
        return outputs

    for i, layer in enumerate(tqdm(decoder.layers, desc="Reconstructing", unit="layer", leave=False)):
        prefix = f"model.layers.{i}"
        o, down = layer.self_attn.o_proj, layer.mlp.down_proj
        middle, after, reads = [], [], []
        for states in parent:  # the parent, which is what the row is to become
            h = halves.read_by_output(i, layer.input_layernorm(states), built.heads[i], built.hidden)
            middle.append(states + torch.nn.functional.linear(h, o.weight, o.bias))
            inner = layer.post_attention_layernorm(states if layer.parallel_residual else middle[-1])
            h = halves.read_by_down(i, inner, built.mlp[i], built.hidden)
            after.append(middle[-1] + torch.nn.functional.linear(h, down.weight, down.bias))
        if i not in at:
            parent = after
            if not sequential:
                reduced = [states[..., :d] for states in parent]
            continue
        heads, mlp = subnetwork.heads[at[i]], subnetwork.mlp[at[i]]
        before, start = parent, reduced
        for name, module, aims in ((f"{prefix}.self_attn.o_proj", o, middle), (f"{prefix}.mlp.down_proj", down, after)):
            if module is o:
                inputs = normed(f"{prefix}.input_layernorm", layer.input_layernorm, start, parent)
                reads = [halves.read_by_output(i, states, heads, d) for states in inputs]
            else:
                sides = (start, parent) if layer.parallel_residual else (reduced, middle)
                key = f"{prefix}.post_attention_layernorm"
                inputs = normed(key, layer.post_attention_layernorm, *sides)
                reads = [halves.read_by_down(i, states, mlp, d) for states in inputs]
            weight = module.weight[:d, : reads[0].shape[-1]]
            moments = Moments.zeros(weight.shape[1], weight.shape[0], device)
            bias = 0 if module.bias is None else module.bias[:d]
            for aim, came, states, h in zip(aims, before, reduced, reads, strict=True):
                aimed = aim[..., :d] - (states if stream else came[..., :d])
                size = _token_weights(aim) if weighted else None
                moments.add(h, aimed - bias, size)
            yield f"{name}.weight", moments, weight
            weight = answers.pop(f"{name}.weight", weight).to(weight.dtype)
            bias = vectors.get(f"{name}.bias", module.bias if module.bias is None else module.bias[:d])
            if sequential:
                outputs = [torch.nn.functional.linear(h, weight, bias) for h in reads]
                reduced = [states + out for states, out in zip(reduced, outputs, strict=True)]
            else:
                reduced = [states[..., :d] for states in aims]
            before = middle
        parent = after
    if norms:
        normed("model.norm", decoder.norm, reduced, parent)


@torch.no_grad()
def reconstruct(
    model: Any,
    subnetwork: SubNetwork,
    batches: Sequence[torch.Tensor],
    *,
    ranks: Mapping[str, int] | None = None,
    sequential: bool = True,
    stream: bool = True,
    weighted: bool = True,
    norms: bool = False,
    bias: bool = False,
    ridge: float = RIDGE,
    dtype: torch.dtype = torch.float32,
) -> tuple[Corrections, dict[str, torch.Tensor]]:
    """The corrections with which a row writes what the parent writes, as nearly as linear algebra gets.

    Args:
        model: A `FlextronForCausalLM` at full size; it is not changed.
        subnetwork: The row.
        batches: Calibration batches `[B, S]`.
        ranks: Name of a matrix -> its rank; None for full ranks, an upper bound.
        sequential: Each layer reads what the corrected layers before it write; otherwise what the parent's write.
        stream: A matrix is to bring the residual stream to where the parent's is, and so makes up for what was lost
            before it; otherwise it is to write what the parent's matrix writes.
        weighted: Count errors relative to the residual stream of each token.
        norms: Fit the weights of the norms, too, channel by channel to the parent's outputs. It helps some parents much
            and harms others.
        bias: Fit a bias, too, where the family has one.
        ridge: See `least_squares`.
        dtype: Of the corrections.

    Returns:
        The corrections; and of each matrix that was fitted the error that each rank takes away.
    """
    low, vectors, gains = {}, dict[str, torch.Tensor](), {}
    answers: dict[str, torch.Tensor] = {}
    walk = _fits(
        model, subnetwork, batches, sequential=sequential, stream=stream, weighted=weighted, norms=norms,
        vectors=vectors, answers=answers,
    )  # fmt: skip
    for name, moments, weight in walk:
        used, rank, fitted = moments.centred() if bias else moments, (ranks or {}).get(name, 0), weight.double()
        if ranks is None or rank:
            change = least_squares(used, weight, ridge)
            up, down, worth = low_rank(change, used.inputs, ridge)
            gains[name] = worth.float().cpu()
            up, down = (up, down) if ranks is None else (up[:, :rank], down[:rank])
            low[name] = up.to(dtype), down.to(dtype)
            fitted = fitted + up @ down
        answers[name] = fitted
        if bias:
            shift = (moments.output_sum.double() - fitted @ moments.input_sum.double()) / moments.tokens
            key = name.replace(".weight", ".bias")
            old = dict(model.named_parameters()).get(key)
            vectors[key] = (shift if old is None else shift + old[: len(shift)]).to(dtype)
    return Corrections(low, vectors), gains


def within(
    model: Any, subnetwork: SubNetwork, batches: Sequence[torch.Tensor], share: float = 0.03, **how: Any
) -> Corrections:
    """Corrections that are at most `share` of the non-embedding parameters of a row.

    A first pass at full rank shows what each rank of each matrix takes away; a second one fits those that are kept.

    Args:
        model, subnetwork, batches: As in `reconstruct`.
        share: Of the row's parameters, norms included. Too little for the norms alone gives these.
        how: Options of `reconstruct`.
    """
    full, gains = reconstruct(model, subnetwork, batches, **how)
    costs = {name: len(up) + down.shape[1] for name, (up, down) in full.low_rank.items()}
    own = sum(vector.numel() for vector in full.vectors.values())
    budget = share * count_parameters(model.config, subnetwork, embeddings=False) - own
    ranks = allocate(gains, costs, budget)
    if not how.get("sequential", True):
        return full.cut(ranks)
    return reconstruct(model, subnetwork, batches, ranks=ranks, **how)[0]
