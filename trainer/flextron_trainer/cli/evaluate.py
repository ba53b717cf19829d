"""`flextron evaluate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    DATA,
    AssistantOnly,
    Boundaries,
    Device,
    Model,
    Trust,
    budget_value,
    command,
    device_or_default,
    fitting_length,
    packed,
    print_result,
)
from .refusals import invalid


def evaluate(
    model: Model,
    dataset: Annotated[str | None, typer.Argument(help=f"Held-out text: {DATA}", show_default=False)] = None,
    lm_eval: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, with commas between; the text may be left out then.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with tasks of your own, for --lm-eval.")] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(help="Samples of each task, for a trial.")] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="Measure this budget; repeatable. Default: all rows.")
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a sample: 1024")] = None,
    datasets: Annotated[
        list[str] | None, typer.Option("--dataset", help="More data, whose figures stand beside those; repeatable.")
    ] = None,
    document_boundaries: Boundaries = None,
    assistant_only: AssistantOnly = None,
    max_samples: Annotated[int, typer.Option(help="Samples to measure on.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Samples in a forward pass.")] = 8,
    write: Annotated[
        bool, typer.Option(help="Write losses and scores into the frontier of the model's config, and its card.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw loss against parameters into this PNG.")] = None,
    routing_report: Annotated[
        Path | None, typer.Option(help="Draw which tokens get more compute into this PNG; see --budget auto:0.5.")
    ] = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> dict[Path, dict[str, Any]]:
    """Measure loss, perplexity and next-token accuracy of every size, and its scores on the tasks of lm-eval.

    The loss on conversations is that of the answers alone.

    Example: `flextron evaluate elastic ./held-out --write --plot frontier.png`

    Example: `flextron evaluate elastic ./held-out --dataset chats.jsonl --write`: of text, and beside it of answers

    Example: `flextron evaluate elastic --lm-eval arc_easy,hellaswag --write` (needs `pip install "lm-eval[hf]"`)

    Example: `flextron evaluate elastic ./held-out --budget auto:0.5 --routing-report tokens.png`
    """
    from modeling_flextron import count_parameters
    from modeling_flextron.frontier import held

    from ..data import load_tokenizer
    from ..evaluation.harness import evaluate_tasks, task_manager
    from ..evaluation.plots import plot_routing
    from ..evaluation.quality import evaluate_frontier, evaluate_model, routed_widths, under
    from ..models import load_elastic, write_config
    from ..publishing.card import is_of_router, plot_frontier, write_model_card

    if dataset is None and lm_eval is None:
        raise invalid("dataset", dataset, "There is nothing to measure.", "Pass held-out text, --lm-eval, or both.")
    if dataset is None and datasets:
        raise invalid("dataset", datasets, "It stands beside another.", "Pass the first one before the options.")
    if write and budget:
        raise invalid("budget", budget, "`--write` writes a whole frontier.", "Leave out one of the two.")
    if write and not Path(model).is_dir():
        rule = "There is no such folder, and `--write` writes into one."
        raise invalid("model", model, rule, "Check the path, or download the model first.")
    if write and lm_eval_limit is not None:
        rule = "Scores of a part of a task cannot be compared with those of others."
        raise invalid("lm_eval_limit", lm_eval_limit, rule, "Leave out it or --write.")
    for name, path in (("plot", plot), ("routing_report", routing_report)):
        if path is not None and not path.parent.is_dir():
            raise invalid(name, str(path), "Its folder does not exist.", "Make the folder first.")
        if path is not None and dataset is None:
            raise invalid(name, str(path), "What it shows is measured on text.", "Pass the text, too.")
    tasks = [] if lm_eval is None else [name.strip() for name in lm_eval.split(",")]
    manager = task_manager(tasks, include_path) if tasks else None
    loaded = load_elastic(model).to(device_or_default(device))
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    asked = {text: budget_value(text) for text in budget} if budget else None
    results: dict[str, dict[str, float]] = {}
    length = fitting_length(sequence_length, loaded.config)
    for i, source in enumerate([] if dataset is None else [dataset, *(datasets or ())]):
        ((text, rows),) = packed([source], tokenizer, length, assistant_only, document_boundaries).items()
        rows = rows.select(range(min(max_samples, len(rows))))
        if routing_report is not None and i == 0:
            auto = next((text for text in budget or () if text.startswith("auto")), "auto")
            widths = routed_widths(loaded, rows[0], auto)
            tokens = [tokenizer.decode([token]) for token in rows[0]["input_ids"]]
            plot_routing(tokens, widths, routing_report, f"{model} at {auto}")
        if asked is None:
            found = evaluate_frontier(loaded, rows, batch_size, text, beside=i > 0)
        else:
            found = {name: evaluate_model(loaded, rows, batch_size, value) for name, value in asked.items()}
            if i:
                found = under(text, found)
        for name, figures in found.items():
            results[name] = results.get(name, {}) | figures
    if tasks:
        scores = evaluate_tasks(
            loaded, tokenizer, tasks, manager, budgets=asked, limit=lm_eval_limit, batch_size=batch_size
        )
        for name, figures in scores.items():
            results[name] = results.get(name, {}) | figures
    if write:
        write_config(loaded, model)
        write_model_card(loaded, model)
    if plot is not None:
        meant, curves = asked or held(loaded.frontier), dict[str, list[tuple[int, float]]]()
        for name, result in results.items():
            if not name.startswith("auto"):
                size = count_parameters(loaded.config, loaded.resolve_budget(meant[name]))
                label = f"{model}, routed" if is_of_router(name) else model
                curves.setdefault(label, []).append((size, result["loss"]))
        plot = plot if plot_frontier(curves, plot) else None
    print_result(command("export", model, "to-upload"), model=model, dataset=dataset, results=results)
    written = plot, routing_report, Path(model, "evaluate") if write else None
    return {path: {"sequence_length": length} for path in written if path is not None}
