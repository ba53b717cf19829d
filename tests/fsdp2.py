"""Training through `examples/accelerate/fsdp2.yaml` against one process: `make test-fsdp2` (minutes on 2 cores).

On a CPU accelerate falls back to DDP in silence: it takes its way for FSDP where the kind of device is in a list
(`AcceleratorState.__init__`), in which CPUs are not. Here it is made to take it (`processes.use_fsdp_on_cpu`), on gloo:
sharding, optimizer, checkpoints and resuming are then accelerate's own. Speed, NCCL and mixed precision are not tested.

    python tests/fsdp2.py [CASE ...]
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers import difference
from hub_server import HubServer
from test_processes import RUNS, SAVES, alone, history, launch, options, same_curve, save_families
from test_trainer import environment
from training import losses

from modeling_flextron import FlextronForCausalLM

CASES = (*(name for name in RUNS if not name.endswith(("surrogate", "gumbel"))), "saves")

# An optimizer without any state is not loaded by torch; a large epsilon keeps rounding small.
MOMENTS = {"optim": "adamw_torch", "adam_epsilon": 1e-3}


def main(names: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as parent, HubServer() as hub:
        folder = Path(parent)
        save_families(folder)
        plain = {name: options(folder, **(RUNS | {"saves": SAVES | MOMENTS})[name]) for name in names}
        cases = {name: {**changes, "hub_model_id": f"me/{name}"} for name, changes in plain.items()}
        if "saves" in names:
            plain["resumes"] = plain["saves"]
            cases["resumes"] = {**plain["saves"], "resume": str(folder / "saves" / "checkpoint-2")}
        cases["refused"] = {**options(folder, **RUNS["surrogate"]), "refused": "FSDP of accelerate"}
        (folder / "cases.json").write_text(json.dumps(cases))
        variables = environment() | hub.environment(folder / "home")
        subprocess.run([*launch("fsdp2"), folder], env=variables, check=True, stdout=subprocess.DEVNULL)
        for name, changes in plain.items():
            run = alone(folder / f"one-{name}", changes)
            run.train()
            same_curve(losses(run), history(folder, name)["losses"])
            weights = dict(FlextronForCausalLM.from_pretrained(folder / name / "final").named_parameters())
            far = max(difference(p, weights[n]) for n, p in run.model.named_parameters())
            assert far < 1e-5, (name, far)
            if "hub_model_id" in cases[name]:
                pushed = folder / f"pushed-{name}"
                pushed.mkdir()
                for file, content in hub.files(f"me/{name}").items():
                    (pushed / file).write_bytes(content)
                there = FlextronForCausalLM.from_pretrained(pushed)
                assert all(difference(p, weights[n]) == 0 for n, p in there.named_parameters()), name
            print(f"{name}: as one process, weights within {far:.0e}", flush=True)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(tuple(sys.argv[1:]) or CASES)
