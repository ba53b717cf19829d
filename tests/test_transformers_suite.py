"""The model tests of transformers itself, run on our classes: tests that nobody here wrote.

`make` fetches them (`fetch_transformers_tests.py`). Two of its modules are not in the source distribution, the export
and the generation tests; empty classes stand in for them.
"""

import copy
import functools
import importlib
import json
import sys
import types
import unittest

import pytest
import torch
from fetch_transformers_tests import FILES, FOLDER
from helpers import elastic_of, parent_of
from transformers.utils import logging

from modeling_flextron import FlextronConfig, FlextronForCausalLM, FlextronForSequenceClassification, FlextronModel

if not all((FOLDER / name).is_file() for name in FILES):
    pytest.skip("run `make` or tests/fetch_transformers_tests.py first", allow_module_level=True)


ABSENT = (
    ("exporters", "test_export", "ExportTesterMixin"),
    ("generation", "test_utils", "GenerationTesterMixin"),
)


def import_suite(*modules: str) -> list:
    """Import modules of transformers' tests as a package."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(FOLDER)]
    sys.modules[package.__name__] = package
    for folder, module, name in ABSENT:
        for absent in (folder, f"{folder}.{module}"):
            sys.modules[f"{package.__name__}.{absent}"] = types.ModuleType(absent)
        setattr(sys.modules[f"{package.__name__}.{absent}"], name, type(name, (), {}))
    return [importlib.import_module(f"{package.__name__}.{module}") for module in modules]


common, training = import_suite("test_modeling_common", "test_training_mixin")


@functools.cache
def config_of(variant: str) -> FlextronConfig:
    # Untied, because a test unties config files by hand, which the costs in the frontier then contradict.
    parent = parent_of(variant, num_hidden_layers=2, tie_word_embeddings=False)
    return elastic_of(variant, parent, depth=[1]).config


class Tester:
    """What the tests ask of the tester of a model: a config, inputs and their sizes."""

    batch_size, seq_length, num_hidden_layers = 3, 7, 2
    is_training = True
    base_model_class, causal_lm_class = FlextronModel, FlextronForCausalLM

    def __init__(self, variant: str, budget=None):
        config = config_of(variant)
        self.fields = json.loads(config.to_json_string(use_diff=False))
        # The tests set a short window on every config that has one, so let a layer use it.
        self.fields |= {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5}
        self.fields["flextron_budget"] = budget
        shape = config.resolve(budget)
        self.hidden_size, self.num_attention_heads = shape.hidden, shape.heads[0]
        self.vocab_size = config.vocab_size
        torch.manual_seed(0)

    def get_config(self) -> FlextronConfig:
        return FlextronConfig.from_dict(copy.deepcopy(self.fields))

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class Suite(common.ModelTesterMixin, common.GenerationTesterMixin, training.TrainingTesterMixin):
    """The tests for one variant, whole or at a budget."""

    all_model_classes = (FlextronModel, FlextronForCausalLM, FlextronForSequenceClassification)
    model_tester = None
    variant, budget = "", None

    @pytest.fixture(autouse=True)
    def names(self, monkeypatch):
        """Enter our classes where the tests look up what kind of model a class is."""
        monkeypatch.setitem(common.MODEL_MAPPING_NAMES, "flextron", FlextronModel.__name__)
        monkeypatch.setitem(common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "flextron", FlextronForCausalLM.__name__)
        classifiers = common.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        monkeypatch.setitem(classifiers, "flextron", FlextronForSequenceClassification.__name__)
        logging.set_verbosity_warning()  # some tests read warnings
        yield
        logging.set_verbosity_error()

    def setUp(self):
        self.model_tester = Tester(self.variant, self.budget)


class LlamaTest(Suite, unittest.TestCase):
    variant = "gqa-tied-llama3"


class LlamaAtBudgetTest(Suite, unittest.TestCase):
    variant, budget = "gqa-wide-heads", {"mlp": 48, "heads": 4, "hidden": 48}


class GPT2Test(Suite, unittest.TestCase):
    variant = "gpt2"
    # Its positions are a table, which a longer text than that cannot be looked up in.
    test_model_rope_scaling_from_config_0_linear = None
    test_model_rope_scaling_from_config_1_dynamic = None
    test_model_rope_scaling_from_config_2_yarn = None


class GPTNeoXTest(Suite, unittest.TestCase):
    variant = "neox"
