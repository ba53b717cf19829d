"""Trains routers in the stages `router` and `joint` of a `FlextronTrainer`.

With `surrogate` the losses of real slices teach a small network, and scores learn through it (`surrogate.py`). With
`gumbel` and `token` routers learn through the language model itself, in passes whose gates have gradients
(`gates.py`). Choices that were learned are brought within their budgets on integers and become rows of the frontier;
token routers get the offset at which their hard choices cost what was asked for.
"""

import random
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from modeling_flextron import FlextronForCausalLM
from modeling_flextron.budgets import cost_of, parse_budget
from modeling_flextron.errors import invalid
from modeling_flextron.measured import Figures
from modeling_flextron.static_router import StaticRouter
from modeling_flextron.token_routing import TokenRouter, bounds_of, resolve_auto

from ..evaluation.quality import score_sizes
from ..routers.gates import RelaxedSizes, RelaxedTokens, bounds_for
from ..routers.surrogate import ERROR_THRESHOLD, SurrogateLearner, smallest_budget
from .arguments import FlextronTrainingArguments
from .batches import real_tokens_of
from .checks import check_finite
from .sampling import Draw

FILE = "router.safetensors"
TOKEN_SIZES = 8  # widths that tokens choose from, at most
TEMPERATURE = (0.1, 0.02)  # of token gates, first and last, in fractions of the full width
GAP_IN_NATS = 0.5  # nats for |cost - budget| = 1, where routers learn through the model


class RouterStage:
    """The routers of a training run: `ScoreRouters` or `TokenRouters`.

    Args:
        args: Arguments with the stage `router` or `joint`.
        steps: Steps that will be made.

    Attributes:
        alone: Whether only scores learn, which are no part of the model.

    Raises:
        ValueError: a budget below the smallest sub-network, or a latency budget without a table.
    """

    alone = False

    def __init__(self, model: FlextronForCausalLM, args: FlextronTrainingArguments, steps: int):
        self.model, self.args, self.steps = model, args, max(1, steps)
        kind = "fraction" if args.router_cost == "parameters" else "latency"
        self.cost = cost_of(model.config, kind, args.router_cost, "router_cost")
        self.smallest = smallest_budget(model.config, self.cost)
        self.budgets = self._budgets()
        self._begun: int | None = None
        self._batch = 0  # of the accumulated ones of the step

    def _budgets(self) -> list[float]:
        """The wanted budgets, largest first."""
        budgets, smallest = self.args.router_budgets, self.smallest
        if budgets is None:
            named = [parse_budget(row.name) for row in self.model.config.frontier]
            budgets = [b.value for b in named if b.kind == "fraction" and smallest <= b.value < 1]
            if not budgets:
                rule = (
                    "The frontier has no row that is called by a fraction between the smallest size and the full one."
                )
                raise invalid("router_budgets", None, rule, "Pass for instance [0.5].")
        if min(budgets) < smallest:
            rule = f"The smallest sub-network costs {smallest:.4g} of the full one."
            raise invalid("router_budgets", budgets, rule, "Ask for at least that much, or allow smaller sizes.")
        return sorted(budgets, reverse=True)

    def parameters(self) -> list[torch.nn.Parameter]:
        """List the parameters that learn with `router_learning_rate`."""
        raise NotImplementedError

    def begin(self, step: int) -> None:
        """Begin a batch of a step."""
        self._batch = self._batch + 1 if step == self._begun else 0
        self._begun = step

    def freeze(self) -> list[torch.nn.Parameter]:
        """Stop the gradients of what does not learn, where nothing else does; return what stopped."""
        return []

    def join(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the routers a group of their own in an optimizer."""
        ours = self.parameters()
        for group in optimizer.param_groups:
            others = [p for p in group["params"] if not any(p is own for own in ours)]
            group["params"] = [] if self.alone else others
        optimizer.add_param_group({"params": ours, "lr": self.args.router_learning_rate, "weight_decay": 0.0})

    def average_gradients(self, accelerator: Any) -> None:
        """Average the gradients of what is outside of the model over processes, at the end of a step."""

    def draws(self, step: int, inputs: dict[str, Any]) -> list[Draw]:
        """Draw what a step of `gumbel` or `token` trains: relaxed networks, beside the full one in stage `joint`."""
        full = [Draw("full", self.model.config.built)] if self.args.stage == "joint" else []
        left = max(0.0, 1 - step / (0.9 * self.steps))  # of the exploration; the last tenth of the steps is without
        names = [f"{self.args.seed}/{step}/{i}" for i in range(max(1, self.args.subnetworks_per_step - len(full)))]
        return full + [self._draw(name, left, inputs) for name in names]

    def _draw(self, seed: str, left: float, inputs: dict[str, Any]) -> Draw:
        raise NotImplementedError

    def write(self) -> None:
        """Put what was learned into the config of the model."""

    def finish(self, batches: Callable[[], list[dict[str, torch.Tensor]]]) -> None:
        """Make what was learned final.

        Args:
            batches: Gives the inputs on which token routers are calibrated.

        Raises:
            ValueError: a surrogate does not predict well enough, and nothing is written; or there are no inputs.
        """
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write what is not in the model beside it."""

    def load(self, folder: Path) -> None:
        """Go on where `save` wrote.

        Raises:
            ValueError: the checkpoint is of another stage or method.
        """


class ScoreRouters(RouterStage):
    """One size for a budget in each layer, by scores that are no part of the model.

    Attributes:
        measures: Whether scores learn from losses of networks that run as they are, without gradients.
    """

    def __init__(self, model: FlextronForCausalLM, args: FlextronTrainingArguments, steps: int):
        super().__init__(model, args, steps)
        self.measures, self.alone = args.router_method == "surrogate", args.stage == "router"
        self._asked: list[torch.Tensor] = []  # of every batch: losses of the networks that were proposed, and tokens
        self.learner = SurrogateLearner(
            model.config,
            self.cost,
            self.smallest,
            steps=self.steps,
            latency_weight=args.latency_weight,
            uniform=args.router_uniform,
            seed=args.seed,
        )
        if model.config.static_router is not None:
            self.learner.scores.load(model.config.static_router)

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.learner.scores.parameters())

    def begin(self, step: int) -> None:
        super().begin(step)
        if self._batch == 0:
            self.learner.scores.zero_grad()  # the Trainer does so for the model alone

    def average_gradients(self, accelerator: Any) -> None:
        if accelerator.sync_gradients:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad = accelerator.reduce(parameter.grad, "mean")

    def measure(self, step: int, inputs: dict[str, Any], accelerator: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a batch through the networks whose losses the surrogate asks for; at the end of a step let it learn.

        Args:
            step: Optimizer steps so far.
            inputs: The batch, with labels.

        Returns:
            The mean loss of a token; and what the scores minimise, after its backward pass: None within a step, and
            while the surrogate is bad.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        config = self.model.config
        networks = self.learner.propose(step, self.args.subnetworks_per_step)
        asked = dict(enumerate([config.built, *(choices.subnetwork(config) for choices in networks)]))
        sums = score_sizes(self.model, inputs, asked, self.args.loss_chunk_size).sum(dim=0)
        nats, tokens = sums[:, 0], sums[0, 2]
        for number, subnetwork in asked.items():
            check_finite(nats[number], "proposed", subnetwork, step)
        self._asked.append(torch.cat([nats, tokens[None]]))
        objective = None
        if accelerator.sync_gradients:
            *total, count = accelerator.reduce(torch.stack(self._asked).sum(dim=0), "sum")
            self._asked.clear()
            mean = torch.stack(total) / count
            self.learner.learn(step, networks, mean[1:] - mean[0])
            objective = self.learner.objective(step)
        if objective is not None:
            objective.backward(inputs=self.parameters())
            objective = objective.detach()
        return nats[1:].mean() / tokens, objective

    def _draw(self, seed: str, left: float, inputs: dict[str, Any]) -> Draw:
        generator = random.Random(seed)
        scores, places = self.learner.scores, self.learner.places
        budget = generator.uniform(self.smallest, 1)
        noise = scores.noise(torch.Generator().manual_seed(generator.getrandbits(48)))
        choice = places.straight_through(scores(torch.tensor([budget]), noise * left))
        gap = (self.learner.expected(choice) - budget).abs()[0]
        relaxed = RelaxedSizes(places, choice.to(self.model.device)[0])
        return Draw("gumbel", self.model.config.built, relaxed, partial(torch.clone, gap))

    def write(self) -> None:
        """Put the static router and its rows into the config of the model."""
        if self.measures and not self.learner.trusted:
            return
        config, whole = self.model.config, float(self.cost(self.model.config.built))
        config.static_router = self.learner.scores.stored()
        router, rows = StaticRouter(config, config.static_router), {row.name: row for row in config.frontier}
        prefix = "uniform" if self.args.router_uniform else "routed"
        prefix += "-latency" if self.args.router_cost == "latency" else ""
        for budget in self.budgets:
            row = config.row(f"{prefix}-{budget:g}", router.choose(self.cost, budget * whole))
            known = rows.get(row.name)
            if known is None or known.subnetwork != row.subnetwork:
                rows[row.name] = row
        config.frontier = sorted(rows.values(), key=lambda row: row.non_embedding_parameters, reverse=True)

    def finish(self, batches: Callable[[], list[dict[str, torch.Tensor]]]) -> None:
        if self.measures:
            if not self.learner.trusted:
                count, error = len(self.learner.losses), self.learner.error
                rule = (
                    f"It was told the losses of {count} networks, and its error on a fifth of them, which it did not"
                    f" see, is {error:.2f} of that of a constant. It must be below {ERROR_THRESHOLD}, so no router is"
                    " written."
                )
                remedy = (
                    "Give it more `max_steps` or `subnetworks_per_step`, train the weights with sampler='random' first,"
                    " so that more is better, or pass 'gumbel'."
                )
                raise invalid("router_method", self.args.router_method, rule, remedy)
            self.learner.finish()
        self.write()

    def save(self, folder: Path) -> None:
        state = {"scores": self.learner.scores.table.detach(), **self.learner.state()}
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        if not (folder / FILE).is_file():
            rule = f"It has no {FILE}, so it is of another stage or method."
            raise invalid("resume_from_checkpoint", str(folder), rule, "Resume with the arguments of that run.")
        state = load_file(folder / FILE)
        with torch.no_grad():
            self.learner.scores.table.copy_(state.pop("scores"))
        self.learner.load(state)


class TokenRouters(RouterStage):
    """Routers in every layer of the model, by which each token chooses its sizes."""

    def __init__(self, model: FlextronForCausalLM, args: FlextronTrainingArguments, steps: int):
        super().__init__(model, args, steps)
        add_token_routers(model, self.budgets)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for name, p in self.model.named_parameters() if ".router." in name]

    def freeze(self) -> list[torch.nn.Parameter]:
        if self.args.stage == "joint":
            return []
        ours = {id(parameter) for parameter in self.parameters()}
        frozen = [p for p in self.model.parameters() if p.requires_grad and id(p) not in ours]
        for parameter in frozen:
            parameter.requires_grad_(False)
        return frozen

    def _draw(self, seed: str, left: float, inputs: dict[str, Any]) -> Draw:
        config, target = self.model.config, random.Random(seed).choice(self.budgets)
        bounds = resolve_auto(config, f"auto:{target}", target)
        first, last = TEMPERATURE
        ids, tokens = inputs["input_ids"], real_tokens_of(inputs)
        row = (self._batch * self.args.world_size + self.args.process_index) * self.args.train_batch_size
        routing = RelaxedTokens(config, bounds, tokens, last + (first - last) * left, seed if left else None, row)
        count = torch.tensor(ids.numel(), device=ids.device) if tokens is None else tokens.sum()
        return Draw(f"auto-{target:g}", bounds.bounds, routing, lambda: average_gap(routing.cost(), count, target))

    def finish(self, batches: Callable[[], list[dict[str, torch.Tensor]]]) -> None:
        self.calibrate(batches())

    @torch.no_grad()
    def calibrate(self, batches: Iterable[dict[str, torch.Tensor]]) -> None:
        """Give every target of the token routers the offset at which hard choices cost at most that on average."""
        config, batches = self.model.config, list(batches)
        if not batches:
            rule = "Token routers are calibrated on its first rows, and it gave none when it was read again."
            raise invalid("train_dataset", "a stream", rule, "Pass one that can be read more than once.")
        training = self.model.training
        self.model.eval()
        entries: Any = config.token_routing
        for entry in tqdm(entries["targets"], desc="Calibrating token routers", unit="target"):
            low, high = -1.0, 1.0
            entry["offset"] = low
            least = self._average_cost(entry, batches)
            for _ in range(14):
                entry["offset"] = (low + high) / 2
                if self._average_cost(entry, batches) <= entry["target"]:
                    low = entry["offset"]
                else:
                    high = entry["offset"]
            entry["offset"] = low
            entry["cost"] = self._average_cost(entry, batches) if low > -1.0 else least
        self.model.train(training)

    def _average_cost(self, entry: dict[str, Any], batches: list[dict[str, torch.Tensor]]) -> float:
        bounds = bounds_of(self.model.config, entry, entry["target"])
        costs, weights = [], []
        for batch in batches:
            inputs = {**batch, "attention_mask": real_tokens_of(batch)}
            self.model.base_model(**inputs, use_cache=False, flextron_budget=bounds)
            routing: Any = self.model.last_routing
            costs.append(routing.cost().item())
            weights.append(batch["input_ids"].numel() if routing.tokens is None else int(routing.tokens.sum()))
        return sum(cost * weight for cost, weight in zip(costs, weights, strict=True)) / sum(weights)


def average_gap(cost: torch.Tensor, count: torch.Tensor, target: float) -> torch.Tensor:
    """|cost - target| of the average over the tokens of all processes, of which `count` here cost `cost` on average.

    Its gradient is the part of these tokens, times the number of processes, over which gradients are averaged.
    """
    mine = torch.stack([cost.detach() * count, count.to(cost)])
    total, tokens = reduce(mine, "sum")
    share = cost * (count * PartialState().num_processes / tokens)
    gap = total / tokens - target
    return gap.abs() + gap.sign() * (share - share.detach())


def add_token_routers(model: FlextronForCausalLM, budgets: list[float]) -> None:
    """Give a model token routers that begin with the static choice for each budget, the same for all tokens.

    Routers that it has for the same targets stay as they are.
    """
    config = model.config
    targets = sorted(budgets)
    if config.token_routing is not None and [e["target"] for e in config.token_routing["targets"]] == targets:
        return
    config.token_routing = None  # a budget below means a static choice
    entries: list[dict[str, Any]] = []
    static, outer = {}, None
    sizes = {"mlp": spaced(config.choices("mlp"), TOKEN_SIZES), "heads": list(config.choices("heads"))}
    for target in reversed(targets):
        static[target] = subnetwork = config.resolve(target)
        entry = {"target": target, **bounds_for(config, subnetwork, outer), **Figures().figures()}
        outer = bounds_of(config, entry, target)
        entries.insert(0, entry)
    config.token_routing = {**sizes, "targets": entries}
    for i, layer in enumerate(model.base_model.layers):
        for axis, module in (("mlp", layer.mlp), ("heads", layer.self_attn)):
            module.router = TokenRouter(config.hidden_size, len(entries)).to(model.device, model.dtype)
            for number, entry in enumerate(entries):
                subnetwork = static[entry["target"]]
                if i in subnetwork.layers:
                    size = getattr(subnetwork, axis)[subnetwork.layers.index(i)]
                    with torch.no_grad():
                        module.router.bias[number] = size / sizes[axis][0]


def spaced(sizes: list[int], count: int) -> list[int]:
    """At most `count` of the sizes, evenly among them, with the largest and the smallest."""
    if len(sizes) <= count:
        return list(sizes)
    return [sizes[round(i * (len(sizes) - 1) / (count - 1))] for i in range(count)]
