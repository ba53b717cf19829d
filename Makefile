# `make demo` and `make test` are all that a newcomer needs; both set up .venv first.
#   make demo ARGS="--device cuda --parent meta-llama/Llama-3.2-1B --dataset ./text"
#   make test ARGS="-k invariants"

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
INTEROP ?= interop-work
INSTALLED := $(VENV)/.installed
# What runs on other versions than those of constraints.txt.
PART := $(addprefix tests/test_,$(addsuffix .py,remote_code levels checkpoint invariants caches))

.PHONY: demo test test-newest test-oldest test-kill test-fsdp2 check interop clean

demo: $(INSTALLED)
	$(BIN)/flextron demo $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# What the Hub's users may have: the newest transformers that pyproject.toml allows, beside the tested one.
test-newest: $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check -q --upgrade --no-deps --target build/newest 'transformers<6'
	PYTHONPATH=build/newest $(BIN)/python -m pytest -n 2 --dist loadfile $(PART) $(ARGS)

# The lowest versions that pyproject.toml allows, beside the tested torch. The lowest huggingface-hub needs httpx. Minutes.
test-oldest: $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check -q --upgrade --no-deps --target build/oldest httpx httpcore \
		$$(sed -n 's/^    "\([a-z-]*\)>=\([0-9.]*\).*",$$/\1==\2/p' pyproject.toml | grep -v ^torch=)
	PYTHONPATH=build/oldest $(BIN)/python -m pytest -n 2 --dist loadfile $(PART) $(ARGS)

# SIGKILL at many moments of a run; every resume must give the uninterrupted one. Minutes.
test-kill: $(INSTALLED)
	PYTHONPATH=.:trainer:tests $(BIN)/python tests/kill.py $(ARGS)

# examples/accelerate/fsdp2.yaml on two CPU processes against one. Minutes.
test-fsdp2: $(INSTALLED)
	PYTHONPATH=.:trainer:tests $(BIN)/python tests/fsdp2.py $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Other engines on what we export, each in an environment of its own below $(INTEROP): a few GB, 15 minutes.
interop: $(INSTALLED)
	$(BIN)/python tests/interop/run.py $(INTEROP) $(ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	$(BIN)/python tests/fetch_transformers_tests.py
	touch $@

clean:
	rm -rf $(VENV) build dist flextron-demo interop-work real-work gpu-work .mypy_cache .pytest_cache .ruff_cache .hypothesis
