"""lm-eval on the elastic repo at several budgets, and on the dense export of the same ones: the same scores."""

from checks import WORK, failed, finish, record
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

manager = TaskManager(include_path=str(WORK / "tasks"))


def scores(**model_args) -> dict[str, float]:
    """Every metric of both tasks."""
    found = simple_evaluate(
        "hf", model_args={"dtype": "float32", **model_args}, tasks=["ppl", "mc"], task_manager=manager, device="cpu",
        batch_size=4, bootstrap_iters=0,
    )["results"]  # fmt: skip
    return {
        f"{task} {metric.partition(',')[0]}": value
        for task, metrics in found.items()
        for metric, value in metrics.items()
        if metric.endswith(",none") and isinstance(value, float) and "stderr" not in metric
    }


for folder in sorted(WORK.glob("*-dense-[01]*")):
    kind, _, budget = folder.name.split("-")
    try:
        dense = scores(pretrained=str(folder))
        elastic = scores(pretrained=str(WORK / kind), trust_remote_code=True, flextron_budget=float(budget))
        assert dense.keys() == elastic.keys() and len(dense) == 3, dense
        how = ", ".join(f"{name} {value:.4f}" for name, value in dense.items())
        record(folder.name, how, 1e-5, max(abs(dense[name] - elastic[name]) for name in dense))
    except Exception as error:
        failed(folder.name, "hf", error)
finish("lm_eval", "transformers", "torch")
