"""Least squares on second moments: the best matrix for what is left, its best low rank, the order of removal.

From second moments on calibration text of what a matrix reads, `C = E[h h^T]`, and of what it should write from that,
`T = E[y h^T]`, follow

* the matrix that writes `y` best, `W* = T C^-1` (ridge regression towards the old matrix);
* its best approximation `W + up down` of a low rank, best in the error of the output: `up` holds leading eigenvectors
  of `D C D^T` with `D = W* - W`, and `down = up^T D`; the eigenvalues say how much error each rank takes away;
* an order in which units are best removed, each time with the others making up for it (`removal_order`).
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

WRITERS = {"heads": "self_attn.o_proj", "mlp": "mlp.down_proj"}  # the matrices that write into the residual stream
RIDGE = 1e-2  # of the mean of the diagonal
METRIC_RIDGE = 0.1  # the same, of a metric of outputs: no direction is free
COMPACTED = 64  # rows that are copied at a time
MOMENT_TOKENS = 32768  # that moments are taken of: the hidden states of all of them are in memory


@dataclass
class Moments:
    """Running sums over tokens of what a matrix reads, `h` `[K]`, and of what it should write, `y` `[D]`.

    Args:
        inputs: `[K, K]`, sum of `h h^T`.
        cross: `[D, K]`, sum of `y h^T`.
        input_sum: `[K]`, sum of `h`.
        tokens: Sum of the weights of the tokens.
        count: Number of the tokens.
    """

    inputs: torch.Tensor
    cross: torch.Tensor
    input_sum: torch.Tensor
    tokens: float = 0.0
    count: int = 0

    @classmethod
    def zeros(cls, read: int, written: int, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> "Moments":
        """Of no tokens yet: `read` is `K` and `written` is `D`."""

        def empty(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(empty(read, read), empty(written, read), empty(read))

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Count tokens: inputs `[..., K]`, outputs `[..., D]` and how much each token counts, `[...]`."""
        h = inputs.flatten(0, -2).to(self.inputs.dtype)
        y = outputs.flatten(0, -2).to(self.inputs.dtype)
        w = torch.ones_like(h[:, 0]) if weights is None else weights.flatten().to(h.dtype)
        self.inputs.addmm_((h * w[:, None]).T, h)
        self.cross.addmm_((y * w[:, None]).T, h)
        self.input_sum += w @ h
        self.tokens += float(w.sum())
        self.count += len(h)

    def leading(self, count: int, weight: torch.Tensor) -> "Moments":
        """Of the first inputs alone, which are to write what a matrix `[D, K]` writes from all of them."""
        cross = weight.double() @ self.inputs[:, :count].double()
        return replace(self, inputs=self.inputs[:count, :count], cross=cross, input_sum=self.input_sum[:count])


Read = tuple[int, str, torch.Tensor, Moments]  # a layer, "heads" or "mlp", the matrix that writes, what that reads


def matrix_name(layer: int, axis: str) -> str:
    """The parameter that writes what the units of an axis, `"heads"` or `"mlp"`, do in a layer."""
    return f"model.layers.{layer}.{WRITERS[axis]}.weight"


def regularised(inputs: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """Second moments in float64 with `ridge` times the mean of the diagonal added to it."""
    c = inputs.to(torch.float64, copy=True)
    c.diagonal().add_(ridge * c.diagonal().mean().clamp_min(1e-30))
    return c


def least_squares(moments: Moments, weight: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """The change `[D, K]` of a matrix `weight` `[D, K]` that brings its outputs nearest to what they should be.

    `ridge` pulls the change towards none. The result is in float64.
    """
    missing = moments.cross.double() - weight.double() @ moments.inputs.double()
    factor = torch.linalg.cholesky(regularised(moments.inputs, ridge))
    return torch.cholesky_solve(missing.T, factor).T


def low_rank(
    change: torch.Tensor, inputs: torch.Tensor, ridge: float = RIDGE, metric: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors of a change of a matrix, best first.

    Args:
        change: `[D, K]`, of `least_squares`.
        inputs: `[K, K]`, second moments of what the matrix reads.
        ridge: That of `least_squares`.
        metric: `[D, D]`, how much errors of the output count; None for their squares. See `sensitivity.py`.

    Returns:
        `up` `[D, D]`, `down` `[D, K]` and `gains` `[D]`: the leading `r` columns and rows are the best change of rank
        `r`, and the sum of the leading `r` gains is the error that it takes away.
    """
    root = None if metric is None else torch.linalg.cholesky(regularised(metric, METRIC_RIDGE), upper=True)
    counted = change if root is None else root @ change
    taken = counted @ regularised(inputs, ridge) @ counted.T
    gains, directions = torch.linalg.eigh((taken + taken.T) / 2)
    directions = directions.flip(1)
    up = directions if root is None else torch.linalg.solve_triangular(root, directions, upper=True)
    return up, directions.T @ counted, gains.flip(0).clamp_min(0)


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


def removal_order(inputs: torch.Tensor, weight: torch.Tensor, units: torch.Tensor, chunk: int = 0) -> torch.Tensor:
    """Units in the order in which they are best kept: greedy, with the others making up for each that goes.

    Removing the columns `b` of `W` costs `tr(W_b (C^-1_bb)^-1 W_b^T)` when all others are fitted anew (Optimal Brain
    Surgeon). What goes is taken out of `C^-1` and `W` before the next one is chosen, so one order serves every size. In
    memory are these two alone, in float64.

    Args:
        inputs: `[K, K]`, second moments of the columns.
        weight: `[D, K]`.
        units: `[U, e]`, the columns of each unit.
        chunk: Remove so many at once, cheapest first, which is nearly the same and takes fewer passes; by default one
            in 96, and one by one where units have several columns.

    Returns:
        `[U]`, numbers of units, the best one first.
    """
    w = weight.to(torch.float64, copy=True)
    inverse = _inverted(regularised(inputs))
    size = units.shape[1]
    chunk = chunk or (max(1, len(units) // 96) if size == 1 else 1)
    alive = torch.arange(len(units), device=units.device)
    columns = units.flatten()
    if not torch.equal(columns, torch.arange(len(columns), device=columns.device)):  # else they are unit after unit
        inverse, w = inverse[columns][:, columns], w[:, columns]
    gone: list[torch.Tensor] = []
    while len(alive):
        count = min(chunk, len(alive))
        if size == 1:
            costs = torch.linalg.vector_norm(w, dim=0).square() / inverse.diagonal()
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
        read, written = inverse[rest[:, None], b], w[:, b]
        w = _compacted(w, torch.arange(len(w), device=w.device), rest).addmm_(written, solved, alpha=-1)
        inverse = _compacted(inverse, rest, rest).addmm_(read, solved, alpha=-1)
        alive = alive[kept]
    return torch.cat(gone).flip(0)


def _inverted(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of a positive definite matrix `[K, K]`, in its place."""
    columns = matrix.T  # LAPACK works on columns, without a copy where they are contiguous
    torch.linalg.cholesky(columns, out=columns)
    torch.cholesky_inverse(columns, out=columns)
    return matrix


def _compacted(matrix: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`matrix[rows][:, columns]` at the beginning of the memory of a contiguous matrix; both ascend."""
    small = matrix.view(-1)[: len(rows) * len(columns)].view(len(rows), len(columns))
    for start in range(0, len(rows), COMPACTED):  # no row moves to where one lies that is still to be read
        part = slice(start, start + COMPACTED)
        small[part] = matrix[rows[part]].index_select(1, columns)
    return small
