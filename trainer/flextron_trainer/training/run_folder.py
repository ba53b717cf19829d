"""The folder of a run: which checkpoints in it are complete, and which of their files go to the Hub."""

import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from huggingface_hub import run_as_future
from transformers import TrainerState
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from modeling_flextron import FlextronConfig
from modeling_flextron.checkpoint import staging, sweep
from modeling_flextron.errors import invalid

from ..hub import commit_files, files_of
from .arguments import FlextronTrainingArguments
from .router_stage import FILE as ROUTERS

logger = logging.get_logger(__name__)
TRAINER_STATE = "trainer_state.json"
# What stays on this machine: the pickles of optimizer, schedule and random state, and arguments with local paths.
PRIVATE_FILES = shutil.ignore_patterns("*.pt", "*.pth", "*.bin", "training_args.json")


def last_complete_checkpoint(output_dir: str) -> str:
    """Find the newest checkpoint whose last file, the trainer's state, was written to its end.

    Raises:
        ValueError: there is none.
    """
    found = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        if match := re.fullmatch(r"checkpoint-(\d+)", folder.name):
            found[int(match[1])] = folder
    for step in sorted(found, reverse=True):
        try:
            state = TrainerState.load_from_json(str(found[step] / TRAINER_STATE))
        except (OSError, ValueError, TypeError):
            logger.warning(f"{found[step]} was not written to its end and is skipped.")
            continue
        if state.global_step == step:
            return str(found[step])
    rule = f"There is no complete checkpoint in {output_dir!r}."
    raise invalid("resume_from_checkpoint", True, rule, "Start without it, or pass the path of a checkpoint.")


def finished_state(checkpoint: str, max_steps: int) -> TrainerState | None:
    """The state of a checkpoint that has made all `max_steps` of its run already; None of any other."""
    path = Path(checkpoint, TRAINER_STATE)
    state = TrainerState.load_from_json(str(path)) if path.is_file() else None
    return state if state is not None and 0 < max_steps <= state.global_step else None


def take_config(checkpoint: str, model: Any, args: FlextronTrainingArguments) -> None:
    """Take what a checkpoint knows beside its weights: all rows, their losses, and what was run."""
    if hasattr(model, "peft_config") or not Path(checkpoint, "config.json").is_file():
        return  # a checkpoint of an adapter has no config of the model
    saved, config = FlextronConfig.from_pretrained(checkpoint), model.config
    config.frontier, config.token_routing = saved.frontier, saved.token_routing
    *before, this = saved.training_runs or [{}]
    config.training_runs = [*before, this | args.changed()]  # with the steps and tokens so far


def begin_again(checkpoint: Path) -> None:
    """Make a checkpoint folder that is about to be written again incomplete, and remove what a killed writer left."""
    if checkpoint.exists():
        (checkpoint / TRAINER_STATE).unlink(missing_ok=True)
        sweep(checkpoint)


def write_arguments(folder: Path, args: FlextronTrainingArguments) -> None:
    """Put arguments as JSON where the Trainer has written a pickle of them."""
    (folder / "training_args.bin").unlink(missing_ok=True)
    (folder / "training_args.json").write_text(args.to_json_string(), encoding="utf-8")


def push_checkpoint(
    checkpoint: Path, args: FlextronTrainingArguments, repo_id: str | None, write_card: Callable[[Path], None]
) -> Future:
    """Push a checkpoint in the background: one commit, and no pickles.

    Args:
        checkpoint: Its folder, of which a copy is pushed, because it may be rotated away before it has arrived.
        args: Of the run; `hub_strategy` says what is pushed beside the model.
        repo_id: Where to.
        write_card: Writes the model card into a folder.
    """
    kept = ExitStack()
    staged = kept.enter_context(staging(args.output_dir, "push"))
    shutil.copytree(checkpoint, staged, ignore=PRIVATE_FILES, dirs_exist_ok=True)
    write_card(staged)
    files = {name: path for name, path in files_of(staged).items() if name not in (TRAINER_STATE, ROUTERS)}
    if args.hub_strategy == HubStrategy.CHECKPOINT:
        files |= files_of(staged, "last-checkpoint/")
    elif args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
        files |= files_of(staged, f"{checkpoint.name}/")
    message = f"Training in progress, step {checkpoint.name.rpartition('-')[2]}"
    job = run_as_future(
        commit_files, files, repo_id, commit_message=message, token=args.hub_token, revision=args.hub_revision
    )

    def finish(done: Future) -> None:
        kept.close()
        if error := done.exception():
            logger.warning(f"A checkpoint was not pushed, and the next push tries again: {error}")

    job.add_done_callback(finish)
    return job
