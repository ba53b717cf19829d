"""SIGKILL at random moments of runs of every stage, and what resuming gives: `make test-kill` (minutes on 2 cores).

    python tests/kill.py [MOMENTS] [SEED]

Every kind of run first runs undisturbed and tells how long each phase lasts. A moment is a phase of a kind (training,
evaluation, saving, pushing, or what routers do at the end), the how-manieth time it begins, and a random part of its
length: then the process is killed, whatever it is doing, so every moment meets a running program. Afterwards
`train(resume_from_checkpoint=True)` must give exactly the undisturbed logs, frontier, routers and weights; every
folder that looks like a model must load; every commit of the Hub must hold the bytes that the undisturbed run pushed
at that step, and load. Prints a table, and ends with an error when anything differs.

Processes are forked from one that has imported everything (`forkserver`), so that a run costs seconds.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from hub_server import HubServer

COMMON = {
    "max_steps": 16, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4,
    "save_total_limit": 2, "lr_scheduler_type": "linear", "per_device_eval_batch_size": 64,
}  # fmt: skip
ROUTERS = {**COMMON, "teacher": None, "router_budgets": [0.6, 0.35]}
# A model for which more is better, which random weights are not: the surrogate learns nothing from those.
BEGIN = {"max_steps": 80, "sampler": "random", "per_device_train_batch_size": 16, "teacher": None}
PUSHES = {"push_to_hub": True, "hub_strategy": "every_save", "hub_always_push": True}
KINDS = {
    "elastic": {**COMMON, "sampler": "random"},
    "pushed": {**COMMON, **PUSHES},
    "surrogate": {**ROUTERS, "stage": "router", "subnetworks_per_step": 8},
    "token": {**ROUTERS, "stage": "router", "router_method": "token"},
    "joint-gumbel": {**ROUTERS, "stage": "joint", "router_method": "gumbel"},
    "joint-token": {**ROUTERS, "stage": "joint", "router_method": "token"},
}
MOMENTS = [
    ("elastic", "saving"), ("pushed", "pushing"), ("surrogate", "training"), ("token", "saving"),
    ("elastic", "training"), ("pushed", "pushing"), ("surrogate", "finishing"), ("joint-gumbel", "saving"),
    ("elastic", "saving"), ("pushed", "pushing"), ("joint-token", "training"), ("token", "finishing"),
    ("elastic", "evaluation"), ("pushed", "pushing"), ("joint-gumbel", "training"), ("joint-token", "saving"),
    ("elastic", "saving"), ("pushed", "saving"), ("token", "training"), ("surrogate", "saving"),
]  # fmt: skip
NOT_PUSHED_THE_SAME = {"README.md", "frontier.png", "training_args.json"}  # they name the repo and the folder


# -------------------------------------------------------------------------------------------- in the killed process


def train(folder: Path, settings: dict, told, resume: bool) -> None:
    """Run or resume; `told.send((phase, begins, time))` at both ends of every phase; results land in the folder."""
    import torch
    from training import trainer
    from transformers.utils import logging

    folder.mkdir(exist_ok=True)
    log = os.open(folder / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    repo = settings.get("hub_model_id")
    if resume:
        check_what_is_left(folder, repo)
    run = trainer(folder, **settings)
    begins = []

    def tell(phase, owner, name):
        function = getattr(owner, name)

        @functools.wraps(function)
        def phased(*args, **kwargs):
            if phase == "training":
                begins.append(run.state.global_step)
            told.send((phase, True, time.monotonic()))
            value = function(*args, **kwargs)
            if phase == "pushing":  # it goes on in the background
                job = run.push_in_progress.jobs[-1]
                job.add_done_callback(lambda _: told.send((phase, False, time.monotonic())))
            else:
                told.send((phase, False, time.monotonic()))
            return value

        setattr(owner, name, phased)

    tell("training", run, "training_step")
    tell("evaluation", run, "evaluate")
    tell("saving", run, "_save_checkpoint")
    if repo is not None:
        tell("pushing", run, "_push_from_checkpoint")
    if run.routers is not None:
        tell("finishing", run.routers, "finish")
    try:
        run.train(resume_from_checkpoint=True if resume else None)
    except ValueError as error:
        if "no complete checkpoint" not in str(error):
            raise
        run.train()
    if repo is not None:
        run.push_to_hub()
    timed = ("runtime", "per_second", "total_flos")
    logs = [{k: v for k, v in log.items() if not any(word in k for word in timed)} for log in run.state.log_history]
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in run.model.parameters()))
    result = {
        "logs": [log for log in logs if "loss" in log or "eval_loss" in log],
        "frontier": [row.to_dict() for row in run.model.config.frontier],
        "static router": run.model.config.static_router,
        "token routing": run.model.config.token_routing,
        "weights": digest.hexdigest(),
        "first step": begins[0] if begins else None,
        "left": sorted(path.name for path in folder.glob(".*")),
    }
    if not resume:
        run.model.save_pretrained(folder / "final")
    (folder / "result.json").write_text(json.dumps(result))


def check_what_is_left(folder: Path, repo: str | None) -> None:
    """What looks like a model is one, on disk and on the Hub.

    But for a checkpoint that is old enough to be removed: transformers removes file by file, and may be killed there.
    """
    from huggingface_hub import list_repo_files

    from modeling_flextron import FlextronForCausalLM

    whole = sorted(int(path.parent.name.split("-")[1]) for path in folder.glob("checkpoint-*/trainer_state.json"))
    oldest = min(whole[-COMMON["save_total_limit"] :], default=0)
    for config in folder.glob("checkpoint-*/config.json"):
        if int(config.parent.name.split("-")[1]) >= oldest:
            FlextronForCausalLM.from_pretrained(config.parent)
    if repo is not None and "config.json" in list_repo_files(repo):
        FlextronForCausalLM.from_pretrained(repo, cache_dir=folder / "cache")


# ------------------------------------------------------------------------------------------- in the killing process


@dataclass
class Run:
    """A process that trains, and what it told."""

    context: multiprocessing.context.BaseContext
    folder: Path
    settings: dict
    resume: bool = False
    events: list[tuple[str, bool, float]] = field(default_factory=list)

    def __post_init__(self):
        self.told, ours = self.context.Pipe(duplex=False)
        self.process = self.context.Process(target=train, args=(self.folder, self.settings, ours, self.resume))
        self.process.start()
        ours.close()

    def listen(self, until=lambda event: False) -> bool:
        """Hear events until one is what we wait for; False when the process ended before."""
        try:
            while True:
                self.events.append(self.told.recv())
                if until(self.events[-1]):
                    return True
        except EOFError:
            return False

    def result(self) -> dict:
        """What it wrote when it was over."""
        self.listen()
        self.process.join()
        if self.process.exitcode != 0:
            log = (self.folder / "log.txt").read_text()[-3000:]
            sys.exit(f"{self.folder.name} ended with {self.process.exitcode}:\n{log}")
        return json.loads((self.folder / "result.json").read_text())

    def kill(self, phase: str, number: int, delay: float) -> str | None:
        """SIGKILL so many seconds after a phase began for the given time; what was going on, None when it had ended."""
        begun = Counter()

        def wanted(event):
            begun[event[0]] += event[1]
            return event[0] == phase and event[1] and begun[phase] == number + 1

        found = self.listen(wanted)
        if found:
            time.sleep(max(0.0, self.events[-1][2] + delay - time.monotonic()))
        self.process.kill()  # SIGKILL, if it still runs
        self.listen()
        self.process.join()
        if not found or self.process.exitcode != -signal.SIGKILL:
            return None
        going_on = Counter()
        for name, begins, _ in self.events:
            going_on[name] += 1 if begins else -1
        return " and ".join(name for name, count in going_on.items() if count > 0) or "between phases"


def lengths(events: list[tuple[str, bool, float]]) -> dict[str, list[float]]:
    """How long every phase lasted, each time."""
    began, found = defaultdict(list), defaultdict(list)
    for phase, begins, when in events:
        if begins:
            began[phase].append(when)
        else:
            found[phase].append(when - began[phase].pop(0))
    return found


def remote_differences(hub: HubServer, whole: str, repo: str) -> list[str]:
    """Files of commits that are not those which the undisturbed run pushed under the same title."""

    def commits(name):
        return [commit for commit in hub.repos[name].commits.values() if "initial" not in commit.title]

    def contents(commit):
        return {path: content for path, content in commit.files.items() if path not in NOT_PUSHED_THE_SAME}

    expected = {commit.title: contents(commit) for commit in commits(whole)}
    wrong = []
    for commit in commits(repo):
        found, wanted = contents(commit), expected[commit.title]
        wrong += [f"{commit.title}: {path}" for path in found.keys() | wanted if found.get(path) != wanted.get(path)]
    return wrong


def settings_of(kind: str, name: str) -> dict:
    """Of a run, which pushes to a repo of its own if it pushes."""
    return KINDS[kind] | ({"hub_model_id": f"me/{name}"} if "push_to_hub" in KINDS[kind] else {})


def main(moments: int = len(MOMENTS), seed: int = 0) -> None:
    generator, rows = random.Random(seed), []
    with tempfile.TemporaryDirectory() as parent, HubServer() as hub:
        os.environ.update(hub.environment(Path(parent) / "home"), OMP_NUM_THREADS="1")  # before the first process
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["training"])
        run_begin = Run(context, Path(parent) / "begin", BEGIN)
        run_begin.result()
        begin = {"begin": str(run_begin.folder / "final")}
        expected, long = {}, {}
        print(f"{'moment':28}{'killed while':26}{'resumed at':12}{'equal'}", flush=True)
        for at in range(moments):
            kind, phase = MOMENTS[at % len(MOMENTS)]
            if kind not in expected:
                whole = Run(context, Path(parent) / kind, begin | settings_of(kind, kind))
                expected[kind] = whole.result()
                long[kind] = lengths(whole.events)
            times = long[kind][phase]
            number = generator.randrange(len(times))
            for attempt in range(5):  # a phase that was shorter this time may be over
                name = f"{at}-{attempt}"
                folder, settings = Path(parent) / name, begin | settings_of(kind, name)
                hit = Run(context, folder, settings).kill(phase, number, generator.uniform(0, times[number]))
                if hit:
                    break
            found = Run(context, folder, settings, resume=True).result()
            parts = ("logs", "frontier", "static router", "token routing", "weights")
            wrong = [part for part in parts if found[part] != expected[kind][part]] + found["left"]
            if "hub_model_id" in settings:
                wrong += remote_differences(hub, f"me/{kind}", f"me/{name}")
            rows.append((hit, wrong))
            moment = f"{kind}, {phase} {number + 1}/{len(times)}"
            step = found["first step"]
            resumed = "the end" if step is None else f"step {step}"
            print(f"{moment:28}{hit or 'NOT MET':26}{resumed:12}{'yes' if not wrong else f'NO: {wrong}'}", flush=True)
    met, same = sum(hit is not None for hit, _ in rows), sum(not wrong for _, wrong in rows)
    print(json.dumps({"moments": len(rows), "met": met, "equal": same}))
    sys.exit(0 if met == same == len(rows) else 1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
