"""The model tests of transformers itself, run on our classes: tests that nobody here wrote.

`make` fetches them (`fetch_transformers_tests.py`). Two of its modules are not in the source distribution, the export
and the generation tests: they come from GitHub where it can be reached, and empty classes stand in for them elsewhere.
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
from fetch_transformers_tests import FILES, FOLDER, MIXINS
from helpers import elastic_of, parent_of
from transformers.utils import logging

from modeling_flextron import FlextronConfig, FlextronForCausalLM, FlextronForSequenceClassification, FlextronModel

if not all((FOLDER / name).is_file() for name in FILES):
    pytest.skip("run `make` or tests/fetch_transformers_tests.py first", allow_module_level=True)


def import_suite(*modules: str) -> list:
    """Import modules of transformers' tests as a package."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(FOLDER)]
    sys.modules[package.__name__] = package
    for file, name in MIXINS.items():
        absent = f"{package.__name__}.{file.removesuffix('.py').replace('/', '.')}"
        if not (FOLDER / file).is_file():
            for module in (absent.rpartition(".")[0], absent):
                sys.modules.setdefault(module, types.ModuleType(module))
            setattr(sys.modules[absent], name, type(name, (), {}))
    return [importlib.import_module(f"{package.__name__}.{module}") for module in modules]


common, training = import_suite("test_modeling_common", "test_training_mixin")
SMALLER = {"mlp": 48, "heads": 2, "hidden": 48}


@functools.cache
def config_of(variant: str) -> FlextronConfig:
    # Untied, because a test unties config files by hand, which the costs in the frontier then contradict.
    parent = parent_of(variant, num_hidden_layers=2, tie_word_embeddings=False)
    return elastic_of(variant, parent, depth=[1]).config


class ModelTester:
    """What the tests ask of the tester of a model: a config, and inputs of the sizes and the padding of their own."""

    batch_size, seq_length, num_hidden_layers = 13, 7, 2
    is_training = True
    base_model_class, causal_lm_class = FlextronModel, FlextronForCausalLM

    def __init__(self, variant: str, budget=None, kinds=("full_attention", "sliding_attention")):
        config = config_of(variant)
        self.fields = json.loads(config.to_json_string(use_diff=False))
        # The tests set a short window on every config that has one, so let a layer use it.
        window = 5 if "sliding_attention" in kinds else None
        self.fields |= {"layer_types": list(kinds), "sliding_window": window, "flextron_budget": budget}
        shape = config.resolve(budget)
        self.hidden_size, self.num_attention_heads = shape.hidden, max(shape.heads)
        self.vocab_size = config.vocab_size
        torch.manual_seed(0)

    def get_config(self) -> FlextronConfig:
        return FlextronConfig.from_dict(copy.deepcopy(self.fields))

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class Suite(common.ModelTesterMixin, common.GenerationTesterMixin, training.TrainingTesterMixin):
    """The tests for one variant, whole or at a budget."""

    all_model_classes = (FlextronModel, FlextronForCausalLM, FlextronForSequenceClassification)
    model_tester = None
    variant, options = "", {}

    def __init_subclass__(cls, select=None):
        """Leave out the tests that `select`, called with their names, does not want."""
        super().__init_subclass__()
        for name in dir(cls):
            if name.startswith("test_") and select is not None and not select(name):
                setattr(cls, name, None)

    @pytest.fixture(autouse=True)
    def warnings(self):
        logging.set_verbosity_warning()  # some tests read them
        yield
        logging.set_verbosity_error()

    def setUp(self):
        self.model_tester = ModelTester(self.variant, **self.options)


# Of the 25 combinations of type, padding, mask and kernels that eager and sdpa attention are compared in: every pair of
# choices once in fp32, both choices of all of them in fp16 and bf16, and the one that returns attentions.
EAGER_AND_SDPA = ("00", "07", "09", "10", "12", "15", "18", "21", "24")


def generates(name: str) -> bool:
    """Tests of `generate`, without those that compile for minutes."""
    slow = ("compil", "recompile", "export")
    return hasattr(common.GenerationTesterMixin, name) and not any(word in name for word in slow)


def runs(name: str) -> bool:
    """Tests that run a model; it is saved and loaded as the others are."""
    words = (
        "determinism",
        "equivalence",
        "loss",
        "training",
        "gradient",
        "outputs",
        "hidden_states",
        "embeds",
        "window",
    )
    kept = any(word in name for word in (*words, "inference_08", "inference_09", "inference_12", "inference_13"))
    return kept and not generates(name) and "overfit" not in name


def forward(name: str) -> bool:
    """All but those of `generate`, and in few of many combinations where these are independent."""
    _, _, number = name.partition("_inference_")
    return not generates(name) and (not number or number[:2] in EAGER_AND_SDPA)


def once(name: str) -> bool:
    """All but what takes seconds and asks the same of every variant; of the attentions five."""
    _, _, number = name.partition("_inference_")
    repeated = number and number[:2] not in ("00", "09", "12", "18", "24")
    return forward(name) and not repeated and name not in ("test_training_overfit", "test_bc_torch_dtype")


class LlamaTest(Suite, unittest.TestCase, select=forward):
    variant = "gqa-tied-llama3"


class LlamaAtBudgetTest(Suite, unittest.TestCase, select=once):
    variant, options = "gqa-wide-heads", {"budget": {"mlp": 48, "heads": 4, "hidden": 48}}


class GPT2Test(Suite, unittest.TestCase, select=once):
    variant = "gpt2"
    # Its positions are a table, which a longer text than that cannot be looked up in.
    test_model_rope_scaling_from_config_0_linear = None
    test_model_rope_scaling_from_config_1_dynamic = None
    test_model_rope_scaling_from_config_2_yarn = None


class GPTNeoXTest(Suite, unittest.TestCase, select=runs):
    variant = "neox"


class MistralTest(Suite, unittest.TestCase, select=runs):
    variant, options = "mistral", {"kinds": ("sliding_attention", "sliding_attention")}


class HeterogeneousTest(Suite, unittest.TestCase, select=runs):
    variant, options = "mha", {"budget": {"mlp": [72, 48], "heads": [4, 2]}}


def at_smaller_default(base: type) -> type:
    """A class of models that run less than they hold."""

    def __init__(self, config):
        base.__init__(self, config)
        self.set_budget(SMALLER)

    return type(base.__name__, (base,), {"__init__": __init__, "_auto_class": None, "__module__": base.__module__})


class SetBudgetTest(Suite, unittest.TestCase, select=runs):
    all_model_classes = tuple(map(at_smaller_default, Suite.all_model_classes))
    variant = "mha"

    def setUp(self):
        super().setUp()
        shape = config_of(self.variant).resolve(SMALLER)
        self.model_tester.hidden_size, self.model_tester.num_attention_heads = shape.hidden, shape.heads[0]


FULL = {"kinds": ("full_attention", "full_attention")}


class GPT2GenerationTest(Suite, unittest.TestCase, select=generates):
    variant, options = "gpt2", FULL


class AtBudgetGenerationTest(Suite, unittest.TestCase, select=generates):
    variant, options = "mha", {"budget": SMALLER, **FULL}
    test_past_key_values_format = None  # reads head counts from the config of the whole
