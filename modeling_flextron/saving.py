"""Save a model, write it in levels, upload it, and change its vocabulary.

Whatever is saved is written beside its target, and moved into place when it is complete (`checkpoint.py`).
"""

import copy
import os
from concurrent.futures import Future
from typing import Any

from huggingface_hub import CommitInfo, create_repo
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME

from .adapters import refuse_adapters
from .checkpoint import write_beside
from .elastic import ElasticLinear
from .errors import invalid
from .hub import commit_written, retried
from .level_writer import write_levels
from .model_card import write_model_card
from .permutation import FILE as PERMUTATION
from .switching import divided_parameters, quantization_method


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
        self._refuse_shared(save_directory)
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

        As `save_pretrained` otherwise, which writes whole tensors; a Trainer resumes from those alone.

        Args:
            save_directory: Folder to write.
            max_shard_size: Largest file of a level.

        Raises:
            ValueError: the model is quantized or sharded, or shares its parameters with another.
        """
        if divided_parameters(self):
            rule = "The weights are divided among processes."
            remedy = "`save_pretrained` on all of them, load that folder in one process, and export that."
            raise invalid("save_directory", str(save_directory), rule, remedy)
        if quantization_method(self.config) is not None:
            rule = "Quantized weights are not cut into levels."
            raise invalid("save_directory", str(save_directory), rule, "Save the model with `save_pretrained`.")
        refuse_adapters(self, "save_directory", str(save_directory), "Merge them first, with `merge_and_unload()`.")
        self._refuse_shared(save_directory)
        with write_beside(save_directory) as folder:
            self.config.dtype = str(self.dtype).removeprefix("torch.")
            self.config.architectures = [type(self).__name__]
            self.config.permutation = None if self.permutation is None else self.permutation.conversion
            if self.is_remote_code():
                custom_object_save(self, folder, config=self.config)
            self.config.save_pretrained(folder)
            if self.can_generate():
                self.generation_config.save_pretrained(folder)
            if self.permutation is not None:
                self.permutation.save(folder / PERMUTATION)
            config = copy.deepcopy(self.config)
            config.levels = write_levels(self, folder, max_shard_size)
            config.to_json_file(folder / CONFIG_NAME)

    def push_to_hub(
        self,
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

        A push that fails changes nothing on the Hub and may be repeated.

        Args:
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
            whole = quantization_method(self.config) is not None or self._hf_peft_config_loaded
            (self.save_pretrained if whole else self.export)(folder, max_shard_size=max_shard_size)
            repo = retried(lambda: create_repo(repo_id, private=private, token=token, exist_ok=True)).repo_id
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            write_model_card(self, folder, repo, tags)
            return repo

        return commit_written(write, blocking, token=token, **kwargs)

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

    def _refuse_shared(self, save_directory: str | os.PathLike) -> None:
        if self.base_model._shared:
            rule = "A model made by `share` runs a part of the weights of another and has none of its own."
            raise invalid("save_directory", str(save_directory), rule, "Save the original, or `extract()` this size.")
