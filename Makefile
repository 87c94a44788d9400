# make compare          the real model in real vLLM and real SGLang, with their attention and with llmir's, side by side
# make test             every test
# make lint             ruff and mypy
# make .venvs/vllm      the environment with vLLM, and with the tools for everything else
# make .venvs/sglang    the environment with SGLang
# make models           the model that tests and comparison serve
# make clean            removes caches and build leftovers; keeps environments, models and results

PYTHON ?= python3
VLLM := .venvs/vllm
SGLANG := .venvs/sglang
PIP_OPTIONS := --disable-pip-version-check
MODEL := models/smollm2-135m-instruct
# Minutes in which `make compare` ends, set-up included; what takes longer than expected, and the chart, have the last two.
COMPARE_MINUTES := 30
STARTED := $(shell date +%s)

.PHONY: compare test lint $(VLLM) $(SGLANG) models clean

compare: $(VLLM)/.llmir-installed $(SGLANG)/.llmir-installed $(MODEL)
	left=$$(( $(COMPARE_MINUTES) - 2 - ($$(date +%s) - $(STARTED)) / 60 )); \
	$(VLLM)/bin/llmir compare all --model $(MODEL) --budget $$(( left > 0 ? left : 0 )) \
		--json results/compare.json --chart results/compare.png

test: $(VLLM)/.llmir-installed $(SGLANG)/.llmir-installed $(MODEL)
	$(VLLM)/bin/python -m pytest tests
	$(VLLM)/bin/python -m pytest integration_tests --ignore=integration_tests/sglang
	$(SGLANG)/bin/python -m pytest integration_tests/sglang

lint: $(VLLM)/.llmir-installed
	$(VLLM)/bin/ruff check .
	$(VLLM)/bin/ruff format --check .
	$(VLLM)/bin/mypy

models: $(MODEL)

$(VLLM): $(VLLM)/.llmir-installed
$(SGLANG): $(SGLANG)/.llmir-installed

# The stamps are written last, so an interrupted installation is done again from the start.
.venvs/%/.requirements-installed: requirements/%-cpu.txt
	rm -rf .venvs/$*
	$(PYTHON) -m venv .venvs/$*
	.venvs/$*/bin/python -m pip $(PIP_OPTIONS) install --no-deps -r $<
	touch $@

.venvs/%/.llmir-installed: .venvs/%/.requirements-installed pyproject.toml
	.venvs/$*/bin/python -m pip $(PIP_OPTIONS) install --quiet --no-deps --no-build-isolation -e .
	touch $@

# What stands in for two packages that SGLang imports and that have no CPU build.
$(SGLANG)/.shims-installed: $(SGLANG)/.requirements-installed $(wildcard $(addprefix shims/sglang-cpu/,*.py *.pth *.toml sgl_kernel/*.py))
	$(SGLANG)/bin/python -m pip $(PIP_OPTIONS) install --quiet --no-deps --no-build-isolation ./shims/sglang-cpu
	touch $@

$(SGLANG)/.llmir-installed: $(SGLANG)/.shims-installed

$(MODEL): | $(VLLM)/.requirements-installed
	$(VLLM)/bin/python tools/fetch_smollm2.py $@

clean:
	rm -rf build shims/*/build *.egg-info shims/*/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -path ./.venvs -o -path ./models \) -prune -o -name __pycache__ -prune -exec rm -rf {} +
