import gc
import os

# Before anything imports huggingface_hub or torch: no network, quiet, and one thread for each test process. This file
# imports neither, as the process that deals out the tests to others would wait for them before it begins.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "OMP_NUM_THREADS": "1",
}

import pytest
from shapes import VARIANTS


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
    longest = ("processes", "transformers_suite", "hub", "cli", "trainer", "modeling")
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in longest)


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
    from helpers import parent_of

    return parent_of(variant)


@pytest.fixture(scope="session")
def elastic(variant):
    """The parent made elastic on all four axes. Shared: do not change it."""
    from helpers import elastic_of

    return elastic_of(variant)


@pytest.fixture
def ids():
    """Token ids `[2, 12]`."""
    import torch

    return torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))
