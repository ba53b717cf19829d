"""Scores of every sub-network on the tasks of EleutherAI's lm-eval, on one model that stays loaded."""

import importlib.metadata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from modeling_flextron.configuration_flextron import VERSION
from modeling_flextron.errors import invalid, is_number
from modeling_flextron.frontier import held


def task_manager(tasks: Sequence[str], include_path: str | Path | None = None) -> Any:
    """Make the manager that finds the tasks of lm-eval.

    Args:
        tasks: Names of tasks, groups or tags, or paths of YAML files.
        include_path: Folder with tasks of your own.

    Raises:
        ValueError: lm-eval is not installed, or does not know one of the tasks.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        rule = f"Tasks are run by lm-eval, which cannot be imported: {error}."
        raise invalid("lm_eval", tasks, rule, 'Install it: `pip install "lm-eval[hf]"`.') from error
    manager = TaskManager(include_path=include_path and str(include_path))
    for name in tasks:
        if name not in manager.task_index and not Path(name).is_file():
            remedy = "`lm_eval ls tasks` lists its tasks; the folder of your own is the include path."
            raise invalid("lm_eval", name, "lm-eval knows no task of this name.", remedy)
    return manager


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    manager: Any,
    *,
    budgets: Mapping[str, Any] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Scores of one model at many sizes, each task with the settings of its own file.

    Args:
        model: The whole family, or as much of it as the budgets need; or a stock model.
        tokenizer: Of the model.
        tasks: What to run.
        manager: `task_manager(tasks)`.
        budgets: Name -> budget; None for all that is loaded. By default every row of the
            frontier, and then the scores are written into the `metrics` of the row as well.
        limit: Samples of each task: for a trial, as such scores mean nothing.
        batch_size: Samples in a forward pass.

    Returns:
        Name -> scores such as `"arc_easy/acc"` and `"arc_easy/acc_stderr"`; with the name of the filter between where
        the task has some. Of a group the group's own.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness, results = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), {}
    measured: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    settings: dict[str, dict[str, Any]] = {}
    for name, budget in (budgets or held(model.config.frontier)).items():
        with getattr(model, "at_budget", nullcontext)(budget):  # a stock model has one size
            found: Any = simple_evaluate(harness, tasks=list(tasks), task_manager=manager, limit=limit)
        results[name] = flat_scores(found)
        for task, scores in task_scores(found).items() if budgets is None else ():
            measured[task][name], settings[task] = scores, found["configs"].get(task, {})  # a group has no settings
    for task, figures in measured.items():
        version = f"{VERSION} with lm-eval {importlib.metadata.version('lm-eval')}"
        split = settings[task].get("test_split") or settings[task].get("validation_split")
        dataset = settings[task].get("dataset_path")
        model.config.record(figures, text=task, split=split, version=version, dataset=dataset)
    return results


def flat_scores(found: Mapping[str, Any]) -> dict[str, float]:
    """Flatten what `lm_eval.simple_evaluate` returns to `task/metric` or `task/filter/metric` -> value."""
    return {name: value for scores in task_scores(found).values() for name, value in scores.items()}


def task_scores(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The same by task; of a group the group's own."""
    inner = {name for members in found["group_subtasks"].values() for name in members}
    result = {}
    for task, values in found["results"].items():
        scores = {}
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            # Some metrics have no standard error, and say so in words.
            if task not in inner and comma and is_number(value):
                scores["/".join([task, *([kind] if kind != "none" else []), metric])] = float(value)
        if scores:
            result[task] = scores
    return result
