"""Stage `blocks`: layers learn one by one (`blockwise.py`), and what has learned lies in the output folder at once.

A run begins from a model in memory or from a folder, of which it reads one layer after the other. Each layer that has
learned is a file in `OUT/blocks/`, and a run that was stopped goes on behind the last one. At the end of a run from a
folder these files become shards of the model in `OUT`.
"""

import copy
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.trainer_utils import SchedulerType
from transformers.utils import logging

from modeling_flextron import FlextronConfig, FlextronForCausalLM
from modeling_flextron.checkpoint import UNFINISHED, write_beside
from modeling_flextron.errors import invalid
from modeling_flextron.frontier import held
from modeling_flextron.level_reader import empty_model, stored_state, stored_tensors
from modeling_flextron.loading import HUB_DEFAULTS, find_files
from modeling_flextron.modeling_flextron import FlextronRotaryEmbedding
from modeling_flextron.permutation import FILE as PERMUTATION

from ..blockwise import BlockRecipe, Errors, check_blocks, distill_blocks
from ..files import write_file_beside, write_json
from ..layerwise import Blocks, Text, digest, positions_of
from ..models import kind_of, read_config, refuse_tensors, write_config
from .arguments import FlextronTrainingArguments
from .batches import real_tokens_of

logger = logging.get_logger(__name__)
FOLDER = "blocks"  # in the output folder: layers that have learned, and states that are too large for memory
RUN = "run.json"
PREFIX = "model.layers."
UNUSED = {
    "kd_weight", "ce_weight", "temperature", "sampler", "sampling_weights", "subnetworks_per_step", "loss_chunk_size",
    "neftune_noise_alpha", "activation_checkpointing",
}  # fmt: skip
LARGE = 2**24  # numbers; a tensor of more gets a file of its own, because a file is made in memory


def check_block_run(model: Any, args: FlextronTrainingArguments, given: dict[str, Any]) -> None:
    """Refuse what this stage cannot do, or would leave out in silence.

    Args:
        model: The elastic model, in memory or on the meta device.
        given: Other keywords of the trainer.

    Raises:
        ValueError: a model or an argument of this kind.
    """
    check_blocks(model, args.block_parameters)
    alone, device = "Each layer learns in one process, with all of its weights.", "one GPU is enough for any size."
    end, later = "The model is whole again only at the end.", "Evaluate what comes of it: `flextron evaluate`."
    fixed: dict[str, tuple[Any, Any, str, str]] = {
        "world_size": (args.world_size, 1, alone, f"Launch one process; {device}"),
        "fsdp": (bool(args.fsdp), False, alone, f"Leave it out; {device}"),
        "teacher": (given.get("teacher"), None, "The model's own full network teaches its layers.", "Leave it out."),
        "eval_dataset": (given.get("eval_dataset"), None, end, later),
        "eval_strategy": (args.eval_strategy.value, "no", end, later),
        "gradient_accumulation_steps": (
            args.gradient_accumulation_steps, 1, "One layer alone is in memory.", "Pass a larger batch size instead.",
        ),
        "fp16": (args.fp16, False, "Gradients are not scaled here.", "Pass bf16=True, or neither."),
        "float32_weights": (args.float32_weights, True, "What learns is float32 meanwhile.", "Leave it out."),
        "push_to_hub": (args.push_to_hub, False, "The model is whole only at the end.", "Then `flextron push` it."),
    }  # fmt: skip
    for name, (found, wanted, rule, remedy) in fixed.items():
        if found != wanted:
            raise invalid(name, found, f"Stage 'blocks': {rule}", remedy)
    if args.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise invalid("optim", args.optim.value, "Stage 'blocks' has an AdamW for each layer.", "Leave it out.")
    for name in ("optimizers", "callbacks"):
        if any(one is not None for one in given.get(name) or ()):
            rule = "Stage 'blocks': Every layer has an optimizer of its own, and no steps of a trainer."
            raise invalid(name, given[name], rule, "Leave it out.")
    for name in sorted(UNUSED & set(args.changed())):
        rule = "Stage 'blocks': It is of training the whole model."
        raise invalid(name, args.changed()[name], rule, "Leave it out.")


def steps_of(args: FlextronTrainingArguments, rows: Any) -> int:
    """Optimizer steps of each layer.

    Raises:
        ValueError: neither the arguments nor the rows say how many.
    """
    if args.max_steps > 0:
        return args.max_steps
    if not hasattr(rows, "__len__"):
        rule = "A stream does not say how long it is."
        raise invalid("max_steps", args.max_steps, rule, "Pass the steps of each layer.")
    return math.ceil(args.num_train_epochs * len(rows) / args.per_device_train_batch_size)


def recipe_of(args: FlextronTrainingArguments, steps: int) -> BlockRecipe:
    """Make the recipe of the layers from training arguments."""
    return BlockRecipe(
        steps,
        args.per_device_train_batch_size,
        learning_rate=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        epsilon=args.adam_epsilon,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        scheduler=SchedulerType(args.lr_scheduler_type).value,
        scheduler_kwargs=args.lr_scheduler_kwargs or None,
        warmup_steps=args.get_warmup_steps(steps),
        seed=args.seed,
        parameters=args.block_parameters,
        inputs=str(args.block_inputs),
        autocast=torch.bfloat16 if args.bf16 else None,
        quiet=args.disable_tqdm,
    )


def text_of(rows: Any, count: int, seed: int, collate: Callable[[list[Any]], dict[str, torch.Tensor]]) -> Text:
    """At most so many rows as one text: of a dataset with a length any of them, of a stream the first ones.

    Raises:
        ValueError: there are none.
    """
    if hasattr(rows, "__len__"):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed), device="cpu")
        chosen = [rows[place] for place in order[:count].tolist()]
    else:
        chosen = list(islice(rows, count))
    if not chosen:
        raise invalid("train_dataset", rows, "It has no rows.", "Pass some.")
    batch = collate(chosen)
    return Text(batch["input_ids"], real_tokens_of(batch), batch.get("position_ids"))


class StoredBlocks:
    """The layers of a saved model, each read from its files when it is needed; what is not in use is on no device.

    Args:
        folder: Of the model.
        device: Where layers run.

    Raises:
        ValueError, OSError: the folder does not hold all tensors of a causal language model.
    """

    def __init__(self, folder: str | os.PathLike, device: torch.device):
        self.config: Any = read_config(folder, "model", FlextronConfig)
        self.config.flextron_budget = None
        if kind_of(self.config) is not FlextronForCausalLM:
            rule = "The layers of a causal language model learn one by one."
            raise invalid("model", self.config.architectures[0], rule, "Train the model that it was made from.")
        if Path(folder, UNFINISHED).exists():
            rule = "Something is being saved into it."
            raise invalid("model", str(folder), rule, "Try again when that has ended.")
        files, index = find_files(folder, self.config, None, dict(HUB_DEFAULTS))
        self.model = empty_model(FlextronForCausalLM, self.config)
        self.config = self.model.config
        self.tensors = stored_tensors(self.model, files, index)
        state, remedy = stored_state(self.model), "Save or download it again."
        refuse_tensors("model", folder, "missing", set(state) - set(self.tensors), remedy)
        refuse_tensors("model", folder, "unexpected", set(self.tensors) - set(self.model.state_dict()), remedy)
        shapes = {name: tuple(self.tensors[name].get_shape()) for name in state}
        wrong = [name for name in state if shapes[name] != tuple(state[name].shape)]
        refuse_tensors("model", folder, "mismatched", wrong, remedy)
        self.owners, self.device = self.model.model.owners, device
        dtype = self.config.dtype or self.tensor("model.norm.weight").dtype
        self.dtype: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        learned = self.config.learned_positions
        self.rotary_emb = None if learned else FlextronRotaryEmbedding(self.config).to(device)

    def tensor(self, name: str) -> torch.Tensor:
        """A stored tensor, which may be a view of its file."""
        return self.tensors[name][...]

    def embed(self, text: Text) -> torch.Tensor:
        def rows(name: str, ids: torch.Tensor) -> torch.Tensor:
            found = torch.nn.functional.embedding(ids.cpu(), self.tensor(f"model.{name}.weight"))
            return found.to(self.device, self.dtype)

        states = rows("embed_tokens", text.input_ids)
        if not self.config.learned_positions:
            return states
        return states + rows("embed_positions", positions_of(states, text))

    @contextmanager
    def layer(self, number: int) -> Iterator[torch.nn.Module]:
        layer = self.model.model.layers[number].to(self.dtype).to_empty(device=self.device)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.copy_(self.tensor(f"{PREFIX}{number}.{name}"))
        try:
            yield layer.eval()
        finally:
            layer.to("meta")

    def head(self) -> tuple[torch.Tensor, torch.Tensor]:
        name = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        return self.tensor(name), self.tensor("model.norm.weight")


class KeptBlocks:
    """Layers that have learned, each in a file of a folder.

    Args:
        output: The output folder of the run.
        run: What tells this run from others, which would have learned something else.
        resume: Go on from what is there; otherwise it goes.

    Raises:
        ValueError: what is there is of another run.
    """

    def __init__(self, output: str | os.PathLike, run: dict[str, Any], resume: bool):
        self.folder = Path(output, FOLDER)
        if resume and not (self.folder / RUN).is_file():
            rule = f"There are no layers in {str(self.folder)!r} to go on from."
            raise invalid("resume_from_checkpoint", True, rule, "Begin anew, or name the output folder of the run.")
        if resume:
            before = json.loads((self.folder / RUN).read_text(encoding="utf-8"))
            if differing := [name for name in run if before.get(name) != run[name]]:
                rule = f"The layers in {str(self.folder)!r} are of another run: {', '.join(differing)} differ."
                raise invalid("resume_from_checkpoint", True, rule, "Begin anew, or with the same arguments and text.")
        else:
            self.remove()
            self.folder.mkdir(parents=True)
            write_json(self.folder / RUN, run)

    def path(self, number: int) -> Path:
        """The file of a layer."""
        return self.folder / f"layer-{number:05}.safetensors"

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and self.path(number).is_file()

    @torch.no_grad()
    def restore(self, number: int, layer: torch.nn.Module) -> Errors:
        parameters = dict(layer.named_parameters())
        with safe_open(self.path(number), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no dict
                parameters[name.removeprefix(f"{PREFIX}{number}.")].copy_(file.get_tensor(name))
            errors = json.loads((file.metadata() or {}).get("errors", "{}"))
        return {name: (before, after) for name, (before, after) in errors.items()}

    def save(self, number: int, layer: torch.nn.Module, errors: Errors) -> None:
        tensors = {f"{PREFIX}{number}.{name}": p.detach().cpu().contiguous() for name, p in layer.named_parameters()}
        with write_file_beside(self.path(number)) as path:
            save_file(tensors, path, metadata={"format": "pt", "errors": json.dumps(errors)})

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def train_blocks(
    blocks: Blocks, args: FlextronTrainingArguments, rows: Any, collate: Callable, resume: bool
) -> tuple[KeptBlocks, dict[str, float]]:
    """Let the layers of a model learn from rows of a dataset.

    Args:
        args: Of the run; `max_steps` are those of each layer.
        rows: As the trainer takes them.
        collate: Makes a batch of rows.
        resume: Go on from what a run with the same arguments left in the output folder.

    Returns:
        The layers that have learned, in their folder; and means over the layers of the errors of each row, before as
        `block_error_before_<row>` and after as `block_error_<row>`.
    """
    steps = steps_of(args, rows)
    recipe = recipe_of(args, steps)
    seed = args.seed if args.data_seed is None else args.data_seed
    text = text_of(rows, steps * recipe.batch_size, seed, collate)
    plain = {name: value for name, value in vars(recipe).items() if name != "quiet"}
    run = {
        "recipe": repr(plain),
        "text": [None if part is None else fingerprint_of(part) for part in vars(text).values()],
        "weights": _weights(blocks),
        "rows": repr([(name, row) for name, row in held(blocks.config.frontier).items()]),
    }
    kept = KeptBlocks(args.output_dir, run, resume)
    errors = distill_blocks(blocks, text, recipe, kept=kept, folder=kept.folder)
    read = {"steps": steps, "tokens": steps * recipe.batch_size * text.input_ids.shape[1]}
    blocks.config.training_runs = [*(blocks.config.training_runs or []), args.changed() | read]
    blocks.config.forget_measurements()
    means = {}
    for name, changes in errors.items():
        for key, values in zip(("block_error_before", "block_error"), zip(*changes, strict=True), strict=True):
            means[f"{key}_{name}"] = sum(values) / len(values)
    return kept, means


def fingerprint_of(tensor: torch.Tensor) -> str:
    """Make a short text that tells numbers apart."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def _weights(blocks: Blocks) -> list[str]:
    """What tells the weights from those of other models, in their dtype."""
    found = [str(blocks.dtype), digest(zip(("head", "norm"), blocks.head(), strict=True))]
    for number in range(blocks.config.num_hidden_layers):
        with blocks.layer(number) as layer:
            found.append(digest(layer.named_parameters()))
    return found


def train_folder(
    source: Path, args: FlextronTrainingArguments, rows: Any, collate: Callable, resume: bool, **given: Any
) -> tuple[FlextronForCausalLM, KeptBlocks, dict[str, float]]:
    """Let the layers of a saved model learn, of which one at a time is in memory, and write it to the output folder.

    Args:
        source: Folder of the model.
        args, rows, collate, resume: As in `train_blocks`.
        given: Keywords that a trainer takes and this stage refuses, such as `teacher`.

    Returns:
        The model without its weights, its layers that have learned, to be removed when all is written, and the errors.
    """
    if Path(args.output_dir).resolve() == source.resolve():
        rule = "Its layers are read from there till the end, and a run that is stopped goes on from them."
        raise invalid("output_dir", args.output_dir, rule, "Write to another folder.")
    blocks = StoredBlocks(source, args.device)
    check_block_run(blocks.model, args, given)
    kept, errors = train_blocks(blocks, args, rows, collate, resume)
    with write_beside(args.output_dir) as folder:
        _write(blocks, kept, Path(source), folder)
    return blocks.model, kept, errors


def _write(blocks: StoredBlocks, kept: KeptBlocks, source: Path, folder: Path) -> None:
    """Write a model whose layers lie in files: these are its shards, beside those of what is outside of layers."""
    outside = [name for name in stored_state(blocks.model) if not name.startswith(PREFIX)]
    numbers = {name: math.prod(blocks.tensors[name].get_shape()) for name in outside}
    large, small = ([name for name in outside if (numbers[name] > LARGE) is kind] for kind in (True, False))
    groups, layers = [*([name] for name in large), small], range(blocks.config.num_hidden_layers)
    total, size, places = len(groups) + len(layers), 0, dict[str, str]()
    for place in range(total):
        name = f"model-{place + 1:05}-of-{total:05}.safetensors"
        if place < len(groups):
            tensors = {each: blocks.tensor(each).to(blocks.dtype).contiguous() for each in groups[place]}
            save_file(tensors, folder / name, metadata={"format": "pt"})
        else:
            _link(kept.path(layers[place - len(groups)]), folder / name)
        with safe_open(folder / name, framework="pt") as file:
            held: Sequence[str] = list(file.keys())
            size += sum(math.prod(file.get_slice(each).get_shape()) for each in held) * blocks.dtype.itemsize
        places |= dict.fromkeys(held, name)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    config = copy.deepcopy(blocks.config)
    config.levels, config.dtype = None, str(blocks.dtype).removeprefix("torch.")
    config.architectures = [type(blocks.model).__name__]
    write_config(blocks.model, folder, config)
    for file_name in ("generation_config.json", PERMUTATION, *config.latency_tables):
        if (source / file_name).is_file():
            (folder / file_name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file_name, folder / file_name)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
