# `make demo` and `make test` need only python3, pip and make; each sets up .venv when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# The oldest triton that the package supports, in a folder of its own beside the newest one's environment. Its
# interpreter fails on numpy 2.4 (triton-lang/triton#9171).
OLD_TRITON := $(VENV)/triton-3.6
OLD_TRITON_TESTS := tests/test_kernels.py tests/test_op.py tests/test_compiled.py

.PHONY: demo test lint mutants clean

demo: $(VENV)/.demo-installed
	$(BIN)/python -m fused_lora demo

test: lint $(OLD_TRITON)/.installed
	$(BIN)/python -m pytest --numprocesses 2
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -m pytest --numprocesses 2 $(OLD_TRITON_TESTS) -k "kernels or triton or 90"

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: $(VENV)/.test-installed
	$(BIN)/python tests/mutants.py

$(VENV)/.%-installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable '.[triton,$*]'
	touch $@

$(OLD_TRITON)/.installed: $(VENV)/.test-installed
	$(BIN)/python -m pip install --quiet --target $(OLD_TRITON) --upgrade --no-deps triton==3.6.0 'numpy<2.4'
	touch $@

clean:
	rm -rf $(VENV)
