"""`export` and `push_to_hub` of a model: in levels, with a card, beside the target or in one commit."""

import copy
import os
from concurrent.futures import Future
from typing import Any

from huggingface_hub import CommitInfo, create_repo
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME

from modeling_flextron.adapters import refuse_adapters
from modeling_flextron.checkpoint import write_beside
from modeling_flextron.config_files import VERSION as VERSION  # which the model asks for
from modeling_flextron.errors import invalid
from modeling_flextron.permutation import FILE as PERMUTATION
from modeling_flextron.saving import refuse_shared
from modeling_flextron.switching import divided_parameters, quantization_method

from ..hub import commit_written, retried
from .card import write_model_card
from .levels import write_levels


def export(model: Any, save_directory: str | os.PathLike, max_shard_size: int | str = "5GB") -> None:
    """Write a model in levels; see `FlextronForCausalLM.export`."""
    if divided_parameters(model):
        rule = "The weights are divided among processes."
        remedy = "`save_pretrained` on all of them, load that folder in one process, and export that."
        raise invalid("save_directory", str(save_directory), rule, remedy)
    if quantization_method(model.config) is not None:
        rule = "Quantized weights are not cut into levels."
        raise invalid("save_directory", str(save_directory), rule, "Save the model with `save_pretrained`.")
    refuse_adapters(model, "save_directory", str(save_directory), "Merge them first, with `merge_and_unload()`.")
    refuse_shared(model, save_directory)
    with write_beside(save_directory) as folder:
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.permutation = None if model.permutation is None else model.permutation.conversion
        if model.is_remote_code():
            custom_object_save(model, folder, config=model.config)
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        if model.permutation is not None:
            model.permutation.save(folder / PERMUTATION)
        config = copy.deepcopy(model.config)
        config.levels = write_levels(model, folder, max_shard_size)
        config.to_json_file(folder / CONFIG_NAME)


def push(
    model: Any,
    repo_id: str,
    *,
    tokenizer: Any = None,
    private: bool | None = None,
    token: str | bool | None = None,
    tags: list[str] | None = None,
    max_shard_size: int | str = "5GB",
    blocking: bool = True,
    **kwargs,
) -> CommitInfo | Future[CommitInfo]:
    """Upload code, config, latency tables, weights, card and plot in one commit.

    Args:
        model: An elastic model; adapters and quantized weights are saved whole.
        repo_id: Repo to write, created when it is not there; its card is written anew.
        tokenizer: Uploaded as well.
        private: Create the repo as private; one that exists stays as it is.
        token: Of a user who may write; by default the one of `hf auth login`.
        tags: More tags for the card.
        max_shard_size: Of a file of weights.
        blocking: False returns a `Future` as soon as all that is uploaded is written beside the model.
        kwargs: `commit_message`, `commit_description`, `revision` and `create_pr`; see `hub.commit_files`.

    Raises:
        ValueError: the model shares its parameters with another (`share`).
        OSError, HTTPError: as `hub.commit_files`.
    """

    def write(folder: str) -> str:
        whole = quantization_method(model.config) is not None or model._hf_peft_config_loaded
        (model.save_pretrained if whole else model.export)(folder, max_shard_size=max_shard_size)
        repo = retried(lambda: create_repo(repo_id, private=private, token=token, exist_ok=True)).repo_id
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_model_card(model, folder, repo, tags)
        return repo

    return commit_written(write, blocking, token=token, **kwargs)
