"""The README of a repo, written from what was measured, with a plot of the frontier beside it.

All that it says is in the config, in the saved folder, or follows from the sizes. What others wrote there, such as
names, gets in only through the functions of `markdown.py`.
"""

import importlib.metadata
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData

from modeling_flextron.budgets import bytes_beside
from modeling_flextron.configuration_flextron import VERSION, FlextronConfig
from modeling_flextron.errors import is_number
from modeling_flextron.extraction import stock_sizes
from modeling_flextron.frontier import FrontierRow
from modeling_flextron.latency import LatencyTable
from modeling_flextron.measured import Figures, Measured
from modeling_flextron.memory import in_units
from modeling_flextron.subnetwork import SubNetwork, count_parameters, kv_cache_bytes, memory_context, weight_bytes
from modeling_flextron.token_routing import figures_of_targets

from ..files import write_file_beside
from .levels import row_bytes
from .markdown import code, literal, plain, table_of_cells
from .scores import write_eval_results

TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModel": "feature-extraction",
}
PLOT = "frontier.png"
PAPER = "https://arxiv.org/abs/2406.10260"

TEMPLATE = """\
# {title}

One checkpoint, every smaller size: {parent} made elastic with [Flextron]({paper}). Every row below is a prefix of the
same weights; `flextron_budget` says which one is loaded.

{frontier}

{notes}

{shapes}

## Use it

The code comes with the repo. Each block goes on where the one before it ended.

Load a size. `flextron_budget` is the name of a row, a fraction of the parent's non-embedding parameters (`0.5`), a
number of parameters (`"350M"`), memory for weights and KV cache (`"6GiB"`), and more:

{load}

Load the whole family and switch without reloading:

{switch}
{causal}
## Training

{training}

Versions: {versions}.

## Citation

```bibtex
@inproceedings{{cai2024flextron,
  title = {{Flextron: Many-in-One Flexible Large Language Model}},
  author = {{Cai, Ruisi and Muralidharan, Saurav and Heinrich, Greg and Yin, Hongxu and Wang, Zhangyang and Kautz, Jan
            and Molchanov, Pavlo}},
  booktitle = {{Proceedings of the 41st International Conference on Machine Learning}},
  year = {{2024}},
  url = {{{paper}}}
}}
```
"""
CAUSAL = """
Let a small size draft for the large one; the text is that of the large one:

{draft}

Write one size as a stock model for other engines:

{export}
"""


def write_model_card(
    model, folder: str | os.PathLike, repo: str | None = None, tags: Sequence[str] | None = None
) -> None:
    """Write `README.md`, scores as `.eval_results/*.yaml`, and `frontier.png` where losses were measured.

    The plot needs matplotlib.

    Args:
        model: The elastic model.
        folder: Where it and its tokenizer, if it has one, are saved.
        repo: What the snippets load; by default the name of the folder.
        tags: More tags for the metadata.
    """
    folder = Path(folder)
    title = (repo or folder.resolve().name).rpartition("/")[2]
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in model.frontier:
        if row.loss is not None:
            which = f"{title}, routed" if is_of_router(row.name) else title
            label = f"{which}, on {row.measured_on('loss').label}"
            curves.setdefault(label, []).append((row.parameters, row.loss))
    saved = FlextronConfig.from_pretrained(folder)
    plotted = bool(curves) and plot_frontier(curves, folder / PLOT)
    if not plotted:
        (folder / PLOT).unlink(missing_ok=True)
    text = TEMPLATE.format(
        title=plain(title),
        parent=parent_of(model.config),
        paper=PAPER,
        frontier=frontier_table(model, row_bytes(folder, saved), _tables(model.config, folder)),
        notes=_notes(model, plotted),
        shapes=table_of_cells(["budget", "layers", "hidden", "MLP", "heads"], [_shape(*pair) for pair in _rows(model)]),
        training=_conversion(model.config) + _training(model.config),
        versions=versions(),
        **_uses(model, repo or folder.resolve().name, _tokenizer_in(folder)),
    )
    metadata = _metadata(model, title, tags or ())
    write_eval_results((row for row, _ in _rows(model)), folder)
    with write_file_beside(folder / "README.md") as path:
        path.write_text(f"---\n{metadata.to_yaml()}\n---\n\n{text}", encoding="utf-8")


def is_of_router(name: str) -> bool:
    """Whether the name of a row says that a router chose it, which may be off the line of the others."""
    return name.startswith(("routed-", "uniform-"))


def frontier_table(model, downloads: Mapping[str, int], tables: Sequence[LatencyTable] = ()) -> str:
    """The frontier of a model as a Markdown table.

    Args:
        model: The elastic model.
        downloads: Row -> bytes that loading it fetches.
        tables: Latency tables, each of which gets a column of speed.
    """
    context = memory_context(model.config)
    figures = _figure_columns(model.frontier)
    heads = ["budget", "parameters", "download", "weights", f"KV cache, {context} tokens"]
    heads += [head for head, _ in figures]
    heads += [plain(f"tokens/s, {table.device}, {table.conditions['dtype']}") for table in tables]
    lines = []
    for i, (row, subnetwork) in enumerate(_rows(model)):
        cells = [
            code(row.name),
            f"{count_parameters(model.config, subnetwork):,}",
            in_units(downloads[row.name]),
            in_units(sum(of(model.config, subnetwork, model.dtype) for of in (weight_bytes, bytes_beside))),
            in_units(kv_cache_bytes(model.config, subnetwork, context, model.dtype)),
            *(column[i] for _, column in figures),
            *(f"{table.conditions['batch'] / table.predict(subnetwork):,.1f}" for table in tables),
        ]
        lines.append(cells)
    return table_of_cells(heads, lines)


def _figure_columns(rows: Sequence[Figures]) -> list[tuple[str, list[str]]]:
    """Head, and a cell for each row: what was measured, one text in a column, of each text the loss first."""
    result, found = list[tuple[str, list[str]]](), _measured(rows)
    texts = list(dict.fromkeys(on for _, on in found))
    for name, on in sorted(found, key=lambda pair: (texts.index(pair[1]), _metric(*pair) != "loss")):
        figures = [row.by_name if row.measured_on(name) == on else {} for row in rows]
        cells = [figure_cell(each.get(name), each.get(f"{name}_stderr")) or "not measured" for each in figures]
        metric = _metric(name, on)
        taken = plain(f"{metric} on {on.label}") in dict(result)  # by an evaluation that this one did not replace
        before = name.removesuffix(metric) if taken else ""
        result.append((plain(f"{before}{metric} on {on.label}"), cells))
        if metric == "loss":
            cells = [f"{_perplexity(each[name]):.2f}" if is_number(each.get(name)) else "" for each in figures]
            result.append((plain(f"{before}perplexity on {on.label}"), cells))
    return result or [("loss", ["not measured"] * len(rows))]


def _measured(rows: Iterable[Figures]) -> list[tuple[str, Measured]]:
    """The numbers that rows have, and on what each was measured; standard errors stand behind theirs."""
    found = dict[tuple[str, Measured], None]()
    for row in rows:
        for name, value in row.by_name.items():
            if is_number(value) and not name.endswith("_stderr"):
                found[name, row.measured_on(name)] = None
    return list(found)


def _metric(name: str, on: Measured) -> str:
    """What a figure measures; figures of further texts and of tasks have their name before a slash."""
    return name.removeprefix(f"{on.text}/")


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def plot_frontier(
    curves: Mapping[str, Sequence[tuple[int, float]]], path: str | os.PathLike, title: str = "Frontier"
) -> bool:
    """Draw loss against parameters; False where matplotlib is not installed, and nothing is drawn.

    Args:
        curves: Label -> points `(parameters, loss in nats per token)`; a single point is drawn as a star.
        path: PNG file to write.
        title: Above the plot.
    """
    try:  # it is optional
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, points in curves.items():
        sizes, losses = zip(*sorted(points), strict=True)
        single = len(points) == 1
        axes.plot(
            [size / 1e6 for size in sizes], losses, "*" if single else "o-", markersize=14 if single else 6, label=label
        )
    axes.set_xlabel("parameters (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)
    with write_file_beside(path) as file:
        figure.savefig(file, dpi=150)
    return True


def _rows(model) -> list[tuple[FrontierRow, SubNetwork]]:
    return [(row, row.subnetwork) for row in model.frontier if row.subnetwork is not None]


def figure_cell(value: Any, error: Any) -> str:
    if not is_number(value):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" + (f" ± {error:.4f}" if is_number(error) else "")


def _tokens(count: int) -> str:
    """A number of tokens as people read it."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:,}"


def _range(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)}-{max(sizes)}"


def _shape(row: FrontierRow, subnetwork: SubNetwork) -> list[str]:
    sizes = (len(subnetwork.layers), subnetwork.hidden, _range(subnetwork.mlp), _range(subnetwork.heads))
    return [code(row.name), *map(str, sizes)]


def parent_of(config) -> str:
    """The parent of a model, with its commit and its licence where these are known."""
    if config.parent_name is None:
        return f"a {config.base_model_type} model"
    if _is_repo(config.parent_name):
        name = f"[{config.parent_name}](https://huggingface.co/{config.parent_name})"
        if re.fullmatch(r"[0-9a-f]{40}", config.parent_revision or ""):
            at = f"https://huggingface.co/{config.parent_name}/tree/{config.parent_revision}"
            name += f" at commit [{config.parent_revision[:7]}]({at})"
    else:
        name = plain(config.parent_name)
    terms = config.parent_license or {}
    licence = terms.get("license_name") or terms.get("license")
    return f"{name} (licence: {plain(licence)})" if licence else name


def _is_repo(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+", name) is not None


def _tables(config, folder: Path) -> list[LatencyTable]:
    return [LatencyTable.load(folder / file, config) for file in config.latency_tables if (folder / file).is_file()]


def _notes(model, plotted: bool) -> str:
    notes = [f"Bytes are for {str(model.dtype).removeprefix('torch.')}; losses are in nats per token."]
    if model.config.latency_tables:
        notes.append("Tokens per second are those of decoding, from the measured latency tables in `latency/`.")
    if model.config.corrections:
        owned = ", ".join(
            f"{code(owner.name)} owns {owner.parameters(model.config):,} parameters" for owner in model.config.owners()
        )
        notes.append(
            f"Beside the shared weights {owned}: corrections, which loading at a size folds into its weights. A model"
            " that is loaded at a size also holds what smaller ones own, which `weights` counts."
        )
    routed = figures_of_targets(model.config.token_routing)
    for name, figures in routed.items():
        loss = "not measured"
        if figures.loss is not None:
            loss = f"{figures.loss:.4f} on {plain(figures.measured_on('loss').label)}"
        notes.append(f"`{name}`, where every token chooses its sizes, has loss {loss}.")
    sources: dict[Measured, list[str]] = {}
    for name, on in _measured([*model.frontier, *routed.values()]):
        sources.setdefault(on, []).append(plain(_metric(name, on)))
    lines = [f"- {', '.join(dict.fromkeys(names))}: {_source(on)}" for on, names in sources.items()]
    measured = "\n\nWhat was measured on what:\n\n" + "\n".join(lines) if lines else ""
    return " ".join(notes) + measured + (f"\n\n![loss against parameters]({PLOT})" if plotted else "")


def _source(on: Measured) -> str:
    """Say on what figures were measured, when, and by which code."""
    tokens = None if on.tokens is None else f"{on.tokens:,} tokens"
    parts = (plain(on.label), tokens, on.date and plain(on.date), on.version and f"by Flextron {plain(on.version)}")
    return ", ".join(part for part in parts if part)


def _conversion(config) -> str:
    if not config.conversion:
        return ""
    carried = config.conversion.get("transplanted")
    source = "" if carried is None else f" of an elastic model of {plain(str(carried.get('base')))}"
    text = f"Neurons and heads lie in the order {code(config.conversion['order'])}{source}, best first.\n\n"
    if carried is not None and carried.get("runs"):
        text += f"Of the runs below the first {int(carried['runs'])} trained that model; what changed in it was added"
        text += " to the weights of this one's parent.\n\n"
    return text


def _training(config) -> str:
    if not config.training_runs:
        repaired = ", with corrections fitted to it" if config.corrections else ""
        return f"Not trained after conversion: the smaller sizes are slices of the parent{repaired}."
    parts = []
    for run in config.training_runs:
        arguments = ((key, value) for key, value in run.items() if key not in ("tokens", "steps"))
        changed = "\n".join(f"- {code(key)}: {code(value)}" for key, value in arguments)
        amount = f" on {_tokens(run['tokens'])} tokens" if "tokens" in run else ""
        amount += f" in {run['steps']:,} steps" if "steps" in run else ""
        parts.append(f"`FlextronTrainer`{amount}, with these arguments that differ from their defaults:\n\n{changed}")
    seen = [run.get("tokens") for run in config.training_runs if run.get("stage") != "router"]  # which freezes them
    if len(seen) > 1 and all(seen):
        parts[-1] += f"\n\nThe weights were trained on {_tokens(sum(seen))} tokens in all."
    return "\n\nThen ".join(parts)


def versions() -> str:
    """Of the packages that make a model."""
    found = {"flextron": VERSION, "transformers": transformers.__version__, "torch": torch.__version__}
    found["huggingface_hub"] = importlib.metadata.version("huggingface_hub")
    return ", ".join(f"{package} {version}" for package, version in found.items())


def _metadata(model, title: str, tags: Sequence[str]) -> ModelCardData:
    config, task = model.config, TASKS[model._auto_class]
    results = []
    for row in model.frontier:
        for name, on in _measured([row]):
            if on.text is None:
                continue  # a claim that nobody could check
            data, _, metric = name.rpartition("/")
            value = row.by_name[name]
            if metric == "loss":
                metric, value = "perplexity", _perplexity(value)
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type=on.dataset or on.text,
                    dataset_name=data or on.text,
                    dataset_split=on.split,
                    dataset_args={key: getattr(on, key) for key in ("tokens", "date", "version")},
                    metric_type=metric,
                    metric_name=f"{metric} at flextron_budget={row.name}",
                    metric_value=round(value, 4),
                )
            )
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=list(dict.fromkeys(["flextron", "elastic", *([tags] if isinstance(tags, str) else tags)])),
        base_model=config.parent_name if _is_repo(config.parent_name or "") else None,
        model_name=title,
        eval_results=results or None,
        **(config.parent_license or {}),
    )


def _tokenizer_in(folder: Path) -> str | None:
    """What the tokenizer in a folder reads: `"chat"` where it has a chat template, `"text"`, or None without one."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    chat = (folder / "chat_template.jinja").is_file() or "chat_template" in json.loads(file.read_text(encoding="utf-8"))
    return "chat" if chat else "text"


def _uses(model, repo: str, tokenizer: str | None) -> dict[str, str]:
    """The snippets of the card, by their places in the template; `tokenizer` is as of `_tokenizer_in`."""
    names = [literal(row.name) for row, _ in _rows(model)]
    small, auto, where = names[-1], model._auto_class, "repo, trust_remote_code=True"
    here = f"repo = {literal(repo)}" + ("" if _is_repo(repo) else "  # the path to this folder from where Python runs")
    causal = auto == "AutoModelForCausalLM"
    run = "generate(**inputs, max_new_tokens=20" if causal else "model(**inputs"
    if tokenizer:
        inputs = 'tokenizer("Once upon a time", return_tensors="pt")'
        if tokenizer == "chat" and causal:
            inputs = """tokenizer.apply_chat_template(
    [{"role": "user", "content": "Why is the sky blue?"}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)"""
        load = f"""from transformers import {auto}, AutoTokenizer

{here}
tokenizer = AutoTokenizer.from_pretrained({where})
inputs = {inputs}
"""
    else:
        ids = 'inputs = {"input_ids": torch.tensor([[1, 2, 3]])}'
        load = f"import torch\nfrom transformers import {auto}\n\n{here}\n{ids}\n"
    call = f"model.{run}" if causal else run
    load += f"model = {auto}.from_pretrained({where}, flextron_budget={small})\noutputs = {call})"
    if tokenizer and causal:
        load += "\nprint(tokenizer.decode(outputs[0]))"
    switch = f"""model = {auto}.from_pretrained({where})
outputs = {call}, flextron_budget={small})  # for one call
with model.at_budget({small}):
    print(model.subnetwork)
model.set_budget({small})  # from now on
model.set_budget(None)  # everything again"""
    draft = f"outputs = model.generate(**inputs, max_new_tokens=20, assistant_model=model.share({small}))"
    export = _export(model, repo, tokenizer is not None)
    causal_part = CAUSAL.format(draft=_block(draft), export=_block(export)) if causal else ""
    return {"load": _block(load), "switch": _block(switch), "causal": causal_part}


def _export(model, repo: str, tokenizer: bool) -> str:
    """The smallest row that the stock class holds; the smallest one of all, filled up with zeros, where none fits."""
    rows = _rows(model)
    name, pad = rows[-1][0].name, ", pad=True"
    for row, subnetwork in reversed(rows):
        try:
            stock_sizes(model.config, subnetwork, False)
        except ValueError:
            continue
        name, pad = row.name, ""
        break
    folder = re.sub(r"[^\w.-]+", "-", f"{repo.rpartition('/')[2]}-{name}")
    text = f"model.extract({literal(name)}{pad}).save_pretrained({literal(folder)})"
    return text + (f"\ntokenizer.save_pretrained({literal(folder)})" if tokenizer else "")


def _block(text: str) -> str:
    return f"```python\n{text}\n```"
