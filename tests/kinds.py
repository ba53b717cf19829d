"""One variant of each kind of layer, for tests in which the others would only repeat it."""

import pytest

# Grouped heads, biases and tied weights, windows, learned positions, halves side by side.
KINDS = ("gqa-wide-heads", "mha-tied-biased", "qwen2", "gpt2", "neox")
of_each_kind = pytest.mark.parametrize("variant", KINDS, indirect=True, scope="session")
