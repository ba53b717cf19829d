"""Save a model, and change its vocabulary; writing it in levels and uploading it is the package's.

Whatever is saved is written beside its target, and moved into place when it is complete (`checkpoint.py`).
"""

import importlib
import os
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .adapters import refuse_adapters
from .checkpoint import write_beside
from .config_files import VERSION
from .elastic import ElasticLinear
from .errors import invalid
from .permutation import FILE as PERMUTATION


class SavingMixin(PreTrainedModel):
    """`save_pretrained`, `export` and `push_to_hub` of a model that may share its parameters with another."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # `fully_shard` gives a model a class made on the spot; what is saved must name the one that has a file.
        plain = cls.__bases__[-1]
        if cls.__name__ == f"FSDP{plain.__name__}":
            cls.__name__, cls.__module__ = plain.__name__, plain.__module__

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs):
        """Save like `PreTrainedModel.save_pretrained`, beside the target, and move it into place when complete.

        Raises:
            ValueError: the model shares its parameters with another (`share`), which holds more than it runs.
        """
        refuse_shared(self, save_directory)
        if not self._hf_peft_config_loaded:  # else the base class saves the adapter, as it does for any model
            remedy = "Save the adapter with the PeftModel, or `merge_and_unload()` and save what that returns."
            refuse_adapters(self, "save_directory", str(save_directory), remedy)
        push, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None)
        both = {key: kwargs[key] for key in ("token", "max_shard_size") if key in kwargs}
        only = ("commit_message", "commit_description", "private", "create_pr", "revision", "tags")
        hub = both | {key: kwargs.pop(key) for key in only if key in kwargs}
        if not is_main_process:
            return super().save_pretrained(save_directory, is_main_process=False, **kwargs)
        levels, self.config.levels = self.config.levels, None  # those of the files that were read
        self.config.permutation = None if self.permutation is None else self.permutation.conversion
        try:
            with write_beside(save_directory, kwargs.get("variant")) as folder:
                super().save_pretrained(folder, **kwargs)
                if self.permutation is not None and not self._hf_peft_config_loaded:
                    self.permutation.save(folder / PERMUTATION)
        finally:
            self.config.levels = levels
        if push:
            self.push_to_hub(repo_id or os.path.basename(os.path.normpath(save_directory)), **hub)

    def export(self, save_directory: str | os.PathLike, max_shard_size: int | str = "5GB") -> None:
        """Write the model in levels: whoever loads it at a budget downloads and reads only what that needs.

        It needs the `flextron` package; `save_pretrained`, which writes whole tensors, does not.

        Args:
            save_directory: Folder to write.
            max_shard_size: Largest file of a level.

        Raises:
            ValueError: the model is quantized or sharded, or shares its parameters with another.
            ImportError: the package is not installed.
        """
        publisher = find_publisher()
        if publisher is None:
            raise ImportError("`export` needs the package: `pip install flextron`. `save_pretrained` does not.")
        publisher.export(self, save_directory, max_shard_size)

    def push_to_hub(self, repo_id: str, *, tokenizer: Any = None, **kwargs) -> Any:
        """Upload the model in one commit; one that fails changes nothing on the Hub and may be repeated.

        With the `flextron` package it is pushed in levels, with `tokenizer`, and a card of what was measured; without
        it as any model of transformers: in whole tensors, and a card that the repo has stays as it is.

        Args:
            repo_id: Repo to write, created when it is not there.
            tokenizer: Uploaded as well.
            kwargs: Of `flextron_trainer.publishing.push.push`, else of `PreTrainedModel.push_to_hub`.

        Raises:
            ValueError: the model shares its parameters with another (`share`), or a tokenizer without the package.
            OSError, HTTPError: the Hub refused, or could not be reached.
        """
        publisher = find_publisher()
        if publisher is not None:
            return publisher.push(self, repo_id, tokenizer=tokenizer, **kwargs)
        if tokenizer is not None:
            rule = "Without the `flextron` package the model is pushed alone."
            raise invalid("tokenizer", "given", rule, f"Call `tokenizer.push_to_hub({repo_id!r})` as well.")
        return super().push_to_hub(repo_id, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """Resize the vocabulary like `PreTrainedModel.resize_token_embeddings`, and the costs in the frontier with it.

        Raises:
            ValueError: the model shares its parameters with another (`share`).
        """
        if self.base_model._shared and (new_num_tokens is not None or args or kwargs):
            rule = "A model made by `share` has the vocabulary of the one that it was made from."
            raise invalid("new_num_tokens", new_num_tokens, rule, "Resize the original, and call its `share` again.")
        head = self.get_output_embeddings()
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        resized = self.get_output_embeddings()
        if isinstance(head, ElasticLinear) and type(resized) is nn.Linear:
            # A plain layer could not run a smaller hidden size. Embeddings stay the same Parameter when they are
            # resized; so does the head, for models that share it and for optimizers.
            head.weight.data, head.out_features = resized.weight.data, resized.out_features
            self.set_output_embeddings(head)
        self.config.validate()
        return embeddings


def refuse_shared(model: Any, save_directory: str | os.PathLike) -> None:
    """Refuse to save a model made by `share`."""
    if model.base_model._shared:
        rule = "A model made by `share` runs a part of the weights of another and has none of its own."
        raise invalid("save_directory", str(save_directory), rule, "Save the original, or `extract()` this size.")


def find_publisher() -> Any:
    """The part of the `flextron` package that writes levels and pushes them; None where it is not installed.

    Raises:
        ValueError: it is of another version than the code of this model, whose parts it would mix with its own.
    """
    try:
        publisher = importlib.import_module("flextron_trainer.publishing.push")
        installed = publisher.VERSION
    except ModuleNotFoundError as error:
        if error.name == "flextron_trainer":
            return None
        if not str(error.name).startswith("flextron_trainer."):
            raise  # it is installed, and lacks something itself
        installed = "older"
    if installed != VERSION:
        rule = f"The code of this model is Flextron {VERSION}, which its levels are written for."
        raise invalid("flextron", installed, rule, "Load it with that package's code, or install this version.")
    return publisher
