"""SIGKILL at random moments of a run, and what resuming gives: `make test-kill` (about ten minutes on 2 cores).

    python tests/kill.py [MOMENTS] [SEED]

One run in a process of its own trains, evaluates every row, and saves. It is killed after a random time, whatever it
was doing, and resumed from its last complete checkpoint. The final weights, training losses and losses of the frontier
must be those of the run that nobody stopped, and every checkpoint folder that says it is complete must load.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "max_steps": 40, "sampler": "random", "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps",
    "eval_steps": 2, "save_total_limit": 2, "lr_scheduler_type": "linear",
}  # fmt: skip
CHILD = """
import json, sys
from pathlib import Path
import torch
from training import losses, trainer
torch.set_num_threads(1)
folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
run = trainer(folder, **settings)
print("begun", flush=True)
try:
    folder_of_last = run._last_complete_checkpoint()
except ValueError:
    folder_of_last = None
run.train(resume_from_checkpoint=folder_of_last)
evals = [{k: v for k, v in log.items() if "loss" in k or k == "step"} for log in run.state.log_history
         if "eval_loss" in log]
weights = [p.double().sum().item() for p in run.model.parameters()]
result = {"losses": losses(run), "evals": evals, "frontier": run.model.frontier, "weights": weights}
(folder / "result.json").write_text(json.dumps(result))
"""


def start(folder: Path) -> subprocess.Popen:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "trainer", ROOT / "tests")))
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-c", CHILD, str(folder), json.dumps(SETTINGS)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, folder: Path) -> dict:
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return json.loads((folder / "result.json").read_text())


def check_checkpoints(folder: Path) -> None:
    """A checkpoint whose state was written to its end has weights that load."""
    from modeling_flextron import FlextronForCausalLM

    for checkpoint in folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        FlextronForCausalLM.from_pretrained(checkpoint)


def main(moments: int = 20, seed: int = 0) -> None:
    generator, killed = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as parent:
        whole = Path(parent) / "whole"
        begun = start(whole)
        begun.stdout.readline()  # imports are over
        since = time.monotonic()
        expected = finish(begun, whole)
        length = time.monotonic() - since
        for number in range(moments):
            folder, stops = Path(parent) / str(number), 0
            process = start(folder)
            process.stdout.readline()
            delay = generator.uniform(0, length)
            time.sleep(delay)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                stops = 1
            process.communicate()
            check_checkpoints(folder)
            complete = sorted(path.parent.name for path in folder.glob("checkpoint-*/trainer_state.json"))
            if stops:
                found = finish(start(folder), folder)
                for part in ("losses", "evals", "frontier", "weights"):
                    assert found[part] == expected[part], (number, delay, part, found[part], expected[part])
            killed += stops
            print(f"{number + 1}/{moments}: killed after {delay:.2f} of {length:.2f} s, with {complete}", flush=True)
    print(json.dumps({"moments": moments, "killed": killed, "resumed_to_the_same_end": killed}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
