import gc
import os

# Before anything imports huggingface_hub or torch: no network, quiet, and one thread for each test process.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "OMP_NUM_THREADS": "1",
}

import datasets
import pytest
import torch
from helpers import VARIANTS, elastic_of, parent_of

torch.set_num_threads(1)
datasets.disable_progress_bars()


def pytest_configure(config):
    """Make the markers known that the tests of transformers carry."""
    for name in ["accelerate", "flash_attn", "flash_attn_3", "flash_attn_4", "torch_compile"]:
        suffix = "tests" if name == "accelerate" else "test"
        config.addinivalue_line("markers", f"{name}_{suffix}: of transformers")
    for name in [
        "is_training_test",
        "generate",
        "torch_export_test",
        "onnx_export_test",
        "executorch_export_test",
        "timeout",
    ]:
        config.addinivalue_line("markers", f"{name}: of transformers")


def pytest_collection_modifyitems(items):
    """Put the longest files first, so that at the end no process of `make test` is left alone with one."""
    longest = ("test_processes.py", "test_transformers_suite.py", "test_hub.py", "test_cli.py", "test_bench.py")
    items.sort(key=lambda item: item.path.name not in longest)


@pytest.fixture(scope="module", autouse=True)
def unwatched_libraries():
    """Spare `gc.collect()`, which every run of the Trainer calls, the objects of the libraries: half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", params=VARIANTS)
def variant(request):
    """Name of a small parent: four LLaMAs (MHA or GQA, tied or not, biases, wide heads) and the other families."""
    return request.param


@pytest.fixture(scope="session")
def parent(variant):
    """A stock model with random weights. Shared: do not change it."""
    return parent_of(variant)


@pytest.fixture(scope="session")
def elastic(variant):
    """The parent made elastic on all four axes. Shared: do not change it."""
    return elastic_of(variant)


@pytest.fixture
def ids():
    """Token ids `[2, 12]`."""
    return torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))
