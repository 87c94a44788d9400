# make compare          the real model in real vLLM and real SGLang, with their attention and with llmir's, side by side
# make test             every test
# make unit             the tests that need no framework, without those that are slow (CONTRIBUTING.md says which)
# make cases            every case of vLLM's own CPU attention tests; make test has some of them
# make lint             ruff and mypy, with no framework installed
# make types            mypy with vLLM installed
# make .venvs/dev       the environment of `make lint` and `make unit`: no framework
# make .venvs/vllm      the environment with vLLM, and with the tools for everything else
# make .venvs/sglang    the environment with SGLang
# make models           the model that tests and comparison serve
# make gemma3           a second real model, Gemma 3 270M, for `llmir compare`: 240 MB, under Google's terms of Gemma
# make clean            removes caches and build leftovers; keeps environments, models and results

PYTHON ?= python3
DEV := .venvs/dev
VLLM := .venvs/vllm
SGLANG := .venvs/sglang
PIP_OPTIONS := --disable-pip-version-check
MODEL := models/smollm2-135m-instruct
GEMMA3 := models/gemma3-270m
# Tests at a time: an engine takes some 2 GB. SGLang's engines, whose threads and ranks wait for one another without
# pause, take turns: with two at a time five took 21 minutes, one after the other three took four (Zen 3).
TEST_PROCESSES := 2
# Minutes in which `make compare` ends, set-up included; what takes longer than expected, and the chart, have the last two.
COMPARE_MINUTES := 30
STARTED := $(shell date +%s)

.PHONY: compare test cases unit lint types $(DEV) $(VLLM) $(SGLANG) models gemma3 clean

compare: $(VLLM)/.llmir-installed $(SGLANG)/.llmir-installed $(MODEL)
	left=$$(( $(COMPARE_MINUTES) - 2 - ($$(date +%s) - $(STARTED)) / 60 )); \
	$(VLLM)/bin/llmir compare all --model $(MODEL) --budget $$(( left > 0 ? left : 0 )) \
		--json results/compare.json --chart results/compare.png

test: $(VLLM)/.llmir-installed $(SGLANG)/.llmir-installed $(MODEL)
	$(VLLM)/bin/python -m pytest tests -n $(TEST_PROCESSES) --dist loadfile
	$(VLLM)/bin/python -m pytest integration_tests --ignore=integration_tests/sglang -n $(TEST_PROCESSES) --dist loadfile
	$(SGLANG)/bin/python -m pytest integration_tests/sglang

unit: $(DEV)/.llmir-installed
	$(DEV)/bin/python -m pytest tests -m "not slow" -n auto --dist loadfile

cases: $(DEV)/.llmir-installed
	LLMIR_ALL_CASES=1 $(DEV)/bin/python -m pytest tests/kernels/test_case_matrix.py -n $(TEST_PROCESSES)

lint: $(DEV)/.llmir-installed
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy

# A cache of its own: in each environment mypy finds other packages.
types: $(VLLM)/.llmir-installed
	$(VLLM)/bin/mypy --cache-dir .mypy_cache/vllm

models: $(MODEL)
gemma3: $(GEMMA3)

$(DEV): $(DEV)/.llmir-installed
$(VLLM): $(VLLM)/.llmir-installed
$(SGLANG): $(SGLANG)/.llmir-installed

# The stamps are written last, so an interrupted installation is done again from the start.
define install-requirements
	rm -rf .venvs/$*
	$(PYTHON) -m venv .venvs/$*
	.venvs/$*/bin/python -m pip $(PIP_OPTIONS) install $(INSTALL_OPTIONS) --no-deps -r $<
	touch $@
endef

# What is imported is compiled then: most of torch never is.
$(DEV)/.requirements-installed: INSTALL_OPTIONS := --no-compile
.SECONDARY: $(DEV)/.requirements-installed

.venvs/%/.requirements-installed: requirements/%-cpu.txt
	$(install-requirements)

.venvs/%/.requirements-installed: requirements/%.txt
	$(install-requirements)

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

$(GEMMA3): | $(VLLM)/.requirements-installed
	$(VLLM)/bin/python tools/fetch_gemma3.py $@

clean:
	rm -rf build shims/*/build *.egg-info shims/*/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -path ./.venvs -o -path ./models \) -prune -o -name __pycache__ -prune -exec rm -rf {} +
