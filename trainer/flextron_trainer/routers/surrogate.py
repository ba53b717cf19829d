"""Static routers while they learn: a table of scores, and a surrogate of the language loss to learn them from.

With the surrogate method (Flextron, arXiv 2406.10260, figure 3) the language model is frozen and runs real slices. A
small network, the surrogate, learns how much loss a sub-network adds to that of the full network on the same batch,
which varies far less than the loss itself. While it predicts well, the scores are updated through it, with a term that
pulls the cost to the budget.

A choice in a place is a distribution over the sizes there: one-hot for a real sub-network, soft while scores learn.
Shapes: N networks or budgets; A budgets that have scores; places are `hidden`, `depth`, then `mlp` and `heads` of
every layer; C sizes of all places together; c sizes that are scored, fewer than C where layers are kept equal.
"""

import random
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from modeling_flextron import FlextronConfig
from modeling_flextron.static_router import Candidate, StaticRouter
from modeling_flextron.subnetwork import Cost, smallest_subnetwork

from ..conversion.search import candidate_of, fill, random_candidate

ERROR_THRESHOLD = 0.7  # error of the surrogate, as a fraction of that of a constant, above which nothing learns
SCORED = 9  # budgets that have scores, from the smallest to 1
UPDATES_PER_STEP = 20  # of the surrogate
ASKED = 128  # budgets at which the scores learn in a step
FINAL_UPDATES = 500  # of the scores, when the surrogate does not change any more
GAP_IN_DEVIATIONS = 6.0  # of |cost - budget|, in standard deviations of the losses
SHARPEST = 0.1  # last temperature of the soft choices through which scores learn; the first is 1


class Places:
    """Every place of a network where a size is chosen, and the sizes that may stand there, largest first."""

    def __init__(self, config: FlextronConfig):
        self.config = config
        self.layers = config.num_hidden_layers
        per_layer = [config.choices("mlp")] * self.layers + [config.choices("heads")] * self.layers
        self.sizes = [config.choices("hidden"), config.choices("depth"), *per_layer]
        self.counts = [len(sizes) for sizes in self.sizes]
        kept = [config.kept_layers(depth) for depth in config.choices("depth")]
        self.kept = torch.tensor([[float(layer in layers) for layer in range(self.layers)] for layers in kept])

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """`[N, C]` as one tensor `[N, sizes]` for each place."""
        return list(flat.split(self.counts, dim=-1))

    def each(self, flat: torch.Tensor, function) -> torch.Tensor:
        """`[N, C]` with a function on every place."""
        return torch.cat([function(part) for part in self.split(flat)], dim=-1)

    def straight_through(self, scores: torch.Tensor) -> torch.Tensor:
        """The best sizes of `[N, C]` as one-hot choices forward, with the gradient of the soft ones."""
        soft = self.each(scores, lambda part: part.softmax(dim=-1))
        hard = self.each(soft, lambda part: F.one_hot(part.argmax(dim=-1), part.shape[-1]).to(part.dtype))
        return hard + soft - soft.detach()

    def encode(self, candidate: Candidate) -> torch.Tensor:
        """The one-hot choices `[C]` of a sub-network."""
        wanted = [candidate.hidden, candidate.depth, *candidate.mlp, *candidate.heads]
        parts = [F.one_hot(torch.tensor(s.index(w)), len(s)) for s, w in zip(self.sizes, wanted, strict=True)]
        return torch.cat(parts).float()

    def keep(self, flat: torch.Tensor) -> torch.Tensor:
        """How likely each layer is kept, `[N, layers]`."""
        return self.split(flat)[1] @ self.kept.to(flat)


class ExpectedCost:
    """A cost as a differentiable function of independent soft choices `[N, C]`, as a fraction of the full cost."""

    def __init__(self, places: Places, cost: Cost):
        self.places = places
        config = places.config
        mlp, heads, full = config.choices("mlp"), config.choices("heads"), float(cost(config.built))
        at = config.choices("hidden")
        self.rest = torch.tensor([cost.rest(h) for h in at]) / full  # [hidden]
        # A layer costs the sum of what its neurons and its heads do.
        self.mlp = torch.tensor([[float(cost.layer(h, m, heads[-1])) for m in mlp] for h in at]) / full
        more = [[cost.layer(h, mlp[-1], a) - cost.layer(h, mlp[-1], heads[-1]) for a in heads] for h in at]
        self.heads = torch.tensor(more, dtype=torch.float32) / full
        cache = [[float(cost.cache(layer, a)) for a in heads] for layer in range(places.layers)]
        self.cache = torch.tensor(cache) / full  # [layers, heads]

    def __call__(self, flat: torch.Tensor) -> torch.Tensor:
        """Expected cost `[N]`."""
        hidden, _, *rest = self.places.split(flat)
        mlp = torch.stack(rest[: self.places.layers], dim=1) @ self.mlp.T.to(flat)  # [N, layers, hidden]
        chosen = torch.stack(rest[self.places.layers :], dim=1)
        heads = chosen @ self.heads.T.to(flat) + (chosen * self.cache.to(flat)).sum(dim=-1, keepdim=True)
        layers = (self.places.keep(flat)[..., None] * (mlp + heads)).sum(dim=1)
        return (hidden * (self.rest.to(flat) + layers)).sum(dim=-1)


class ScoreTable(nn.Module):
    """Scores of every size at a few budgets: what a `StaticRouter` holds, as parameters.

    Args:
        places: Where sizes are chosen.
        budgets: The budgets `[A]` that have scores, ascending fractions of the full cost.
        uniform: Give all layers the same scores.
    """

    def __init__(self, places: Places, budgets: list[float], uniform: bool = False):
        super().__init__()
        self.places, self.budgets = places, budgets
        counts = places.counts
        index = torch.arange(sum(counts))
        if uniform:
            parts, layers = list(index.split(counts)), places.layers
            parts[2:] = [parts[2]] * layers + [parts[2 + layers]] * layers
            index = torch.cat(parts).unique(return_inverse=True)[1]
        self.index = index  # [C]: which score each size has
        self.table = nn.Parameter(torch.zeros(len(budgets), int(index.max()) + 1))

    def near(self, budgets: torch.Tensor) -> torch.Tensor:
        """Where budgets `[N]` lie between those with scores: `[N, A]`, rows sum to 1."""
        at = torch.tensor(self.budgets)
        upper = torch.searchsorted(at, budgets.contiguous()).clamp(1, len(at) - 1)
        weight = ((budgets - at[upper - 1]) / (at[upper] - at[upper - 1])).clamp(0, 1)
        low, high = F.one_hot(upper - 1, len(at)), F.one_hot(upper, len(at))
        return (1 - weight)[:, None] * low + weight[:, None] * high

    def forward(self, budgets: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Scores `[N, C]` of the sizes at budgets `[N]`, with noise `[1, c]`."""
        scores = self.near(budgets) @ self.table
        return (scores if noise is None else scores + noise)[:, self.index]

    def noise(self, generator: torch.Generator) -> torch.Tensor:
        """Independent Gumbel noise `[1, c]`."""
        uniform = torch.rand(1, self.table.shape[1], generator=generator).clamp(1e-9, 1 - 1e-7)
        return -(-uniform.log()).log()

    @torch.no_grad()
    def stored(self) -> dict[str, Any]:
        """The router as a config holds it; see `StaticRouter`."""
        parts = [part.double().round(decimals=5).tolist() for part in self.places.split(self.table[:, self.index])]
        layers = self.places.layers
        return {
            "budgets": self.budgets,
            "hidden": parts[0],
            "depth": parts[1],
            "mlp": [[layer[i] for layer in parts[2 : 2 + layers]] for i in range(len(self.budgets))],
            "heads": [[layer[i] for layer in parts[2 + layers :]] for i in range(len(self.budgets))],
        }

    @torch.no_grad()
    def load(self, stored: dict[str, Any]) -> None:
        """Take the scores of a router, at these budgets; of layers that are kept equal, the mean."""
        router = StaticRouter(self.places.config, stored)
        rows = [router.scores(budget) for budget in self.budgets]
        flat = torch.tensor([[*r["hidden"], *r["depth"], *chain(*r["mlp"], *r["heads"])] for r in rows])
        index = self.index.expand(len(rows), -1)
        self.table.zero_().scatter_reduce_(1, index, flat.to(self.table), "mean", include_self=False)

    def router(self) -> StaticRouter:
        """The router that these scores make."""
        return StaticRouter(self.places.config, self.stored())


class Surrogate(nn.Module):
    """Predicts from choices `[N, C]` the loss `[N]` that they add to the full network.

    Every increment of a size that is missing does some damage, and the loss is an increasing, convex function of all
    damage together. So it never predicts that less is better, which a search, or scores that learn through it, would
    find out at once.
    """

    scale: torch.Tensor

    def __init__(self, places: Places):
        super().__init__()
        self.places = places
        self.damage = nn.Parameter(torch.full((sum(places.counts),), -4.0))
        self.curve = nn.Parameter(torch.tensor([0.0, -3.0]))
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, flat: torch.Tensor) -> torch.Tensor:
        """Predicted difference in nats."""
        total = (1 - self.features(flat)) @ F.softplus(self.damage)
        slope, curvature = F.softplus(self.curve)
        return self.scale * (self.bias + slope * total + curvature * total.square())

    def features(self, flat: torch.Tensor) -> torch.Tensor:
        """How likely each place has at least each size; what dropped layers would have does not count."""
        at_least = self.places.split(self.places.each(flat, lambda part: part.cumsum(dim=-1)))
        keep = self.places.keep(flat)
        counted = [part * keep[:, i % self.places.layers, None] for i, part in enumerate(at_least[2:])]
        return torch.cat([*at_least[:2], *counted], dim=-1)

    def squared_errors(self, flat: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """Squared errors `[N]`; those of large losses count less, because good networks are what matters."""
        return self._weights(losses) * (self(flat) - losses).square()

    @torch.no_grad()
    def error(self, flat: torch.Tensor, losses: torch.Tensor) -> float:
        """The error on these networks, as a fraction of that of the best constant; 1 is to know nothing."""
        weights = self._weights(losses)
        constant = (weights * losses).sum() / weights.sum()
        spread = (weights * (losses - constant).square()).mean()
        return (self.squared_errors(flat, losses).mean() / spread.clamp(min=1e-12)).sqrt().item()

    def _weights(self, losses: torch.Tensor) -> torch.Tensor:
        return 1 / (losses.clamp(min=0) + self.scale / 2).square()


class SurrogateLearner:
    """Learns scores through a surrogate: proposes sub-networks, is told their losses, updates both.

    Everything random follows from the seed and the step, so that processes which are told the same losses stay equal,
    and a resumed run continues as if it had not stopped.

    Args:
        cost: What budgets limit.
        smallest: Smallest budget, a fraction of the full cost.
        steps: Steps that will be made.
        latency_weight: Factor on the weight of |cost - budget| beside the predicted loss.
        uniform: Keep the layers equal.
    """

    def __init__(
        self, config: FlextronConfig, cost: Cost, smallest: float, *, steps: int, latency_weight: float,
        uniform: bool = False, seed: int = 0,
    ):  # fmt: skip
        self.config, self.cost, self.smallest, self.steps = config, cost, smallest, steps
        self.latency_weight, self.uniform, self.seed = latency_weight, uniform, seed
        self.whole = float(cost(config.built))
        self.places = Places(config)
        budgets = [round(smallest + (1 - smallest) * i / (SCORED - 1), 6) for i in range(SCORED)]
        self.scores = ScoreTable(self.places, budgets, uniform)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.surrogate = Surrogate(self.places)
        self.optimizer = torch.optim.Adam(self.surrogate.parameters(), lr=2e-2)
        self.expected = ExpectedCost(self.places, cost)
        self.asked = torch.empty(0, sum(self.places.counts))  # [networks, C]
        self.losses = torch.empty(0)  # what they add to the full network
        self.error = float("inf")

    def propose(self, step: int, count: int) -> list[Candidate]:
        """Networks whose losses are wanted next: random ones, and ones near what the scores choose."""
        generator = random.Random(f"{self.seed}/{step}/propose")
        router, result = self.scores.router(), []
        for _ in range(count):
            budget = generator.uniform(self.smallest, 1)
            if not self.trusted or generator.random() < 0.25:
                candidate = random_candidate(self.config, generator, self.uniform)
            else:
                candidate = candidate_of(self.config, router.choose(self.cost, budget * self.whole))
                for _ in range(generator.choice((0, 1, 2, 4))):
                    lower = list(candidate.steps(self.config, False, self.uniform))
                    candidate = candidate.after(generator.choice(lower)) if lower else candidate
            result.append(fill(self.config, candidate, self.cost, budget * self.whole, generator, self.uniform))
        return result

    @property
    def trusted(self) -> bool:
        """Whether the surrogate predicts well enough to learn from."""
        return self.error < ERROR_THRESHOLD

    def learn(self, step: int, networks: list[Candidate], losses: torch.Tensor) -> None:
        """Take the losses `[networks]` that networks add to the full one, and improve the surrogate."""
        generator = torch.Generator().manual_seed(_seed(self.seed, step, "learn"))
        self.asked = torch.cat([self.asked, torch.stack([self.places.encode(one) for one in networks])])
        self.losses = torch.cat([self.losses, losses.cpu().float()])
        held = torch.arange(len(self.losses)) % 5 == 4
        seen, values = self.asked[~held], self.losses[~held]
        if len(values) < 2:
            return
        self.surrogate.scale.copy_(values.std().clamp(min=1e-6))
        for _ in range(UPDATES_PER_STEP):
            batch = torch.randint(len(values), (min(128, len(values)),), generator=generator)
            self.optimizer.zero_grad()
            self.surrogate.squared_errors(seen[batch], values[batch]).mean().backward()
            self.optimizer.step()
        if held.sum() >= 8:
            self.error = self.surrogate.error(self.asked[held], self.losses[held])

    def objective(self, step: int) -> torch.Tensor | None:
        """The loss of the scores at some budgets; None while the surrogate is not trusted."""
        if not self.trusted:
            return None
        generator = torch.Generator().manual_seed(_seed(self.seed, step, "objective"))
        return self._loss(step / self.steps, generator)

    def _loss(self, done: float, generator: torch.Generator) -> torch.Tensor:
        budgets = self.smallest + (1 - self.smallest) * torch.rand(ASKED, generator=generator)
        temperature = SHARPEST ** min(1.0, done)
        choice = self.places.each(self.scores(budgets) / temperature, lambda part: part.softmax(dim=-1))
        weight = GAP_IN_DEVIATIONS * self.latency_weight * self.surrogate.scale
        return (self.surrogate(choice) + weight * (self.expected(choice) - budgets).abs()).mean()

    def finish(self) -> None:
        """Learn the scores once more from the surrogate as it is at the end: the first steps knew a worse one."""
        if not self.trusted:
            return
        generator = torch.Generator().manual_seed(_seed(self.seed, "finish"))
        self.scores.table.data.zero_()
        optimizer = torch.optim.Adam(self.scores.parameters(), lr=0.1)
        for step in range(FINAL_UPDATES):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (1 - 0.9 * step / FINAL_UPDATES)
            loss = self._loss(step / FINAL_UPDATES, generator)
            optimizer.zero_grad()
            loss.backward(inputs=list(self.scores.parameters()))
            optimizer.step()

    # ---------------------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that a later process needs to go on, as tensors."""
        result = {f"surrogate.{name}": value for name, value in self.surrogate.state_dict().items()}
        for i, entry in self.optimizer.state_dict()["state"].items():
            result |= {f"optimizer.{i}.{name}": value for name, value in entry.items()}
        return result | {"asked": self.asked, "losses": self.losses, "error": torch.tensor(self.error)}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Go on where `state` was taken."""
        surrogate: dict[str, torch.Tensor] = {}
        entries: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in state.items():
            kind, _, rest = name.partition(".")
            if kind == "surrogate":
                surrogate[rest] = value
            elif kind == "optimizer":
                number, _, field = rest.partition(".")
                entries.setdefault(int(number), {})[field] = value
        self.surrogate.load_state_dict(surrogate)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": entries})
        self.asked, self.losses, self.error = state["asked"], state["losses"], state["error"].item()


def smallest_budget(config: FlextronConfig, cost: Cost) -> float:
    """The cost of the smallest sub-network, as a fraction of the full one."""
    return cost(smallest_subnetwork(config)) / cost(config.built)


def _seed(*parts: object) -> int:
    return random.Random("/".join(map(str, parts))).getrandbits(48)  # hashed the same way everywhere
