# make demo        train a tiny GLM-4.5V from real images to a Hugging Face folder (VARIANT=dense: GLM-4.1V)
# make demo-rl     let a tiny GLM-4.1V learn from rewards, and draw what it gains
# make demo-data   the shards that configs/tiny trains on
# make test        the tests; test-fast: the inner loop (3 minutes); test-full: the slow ones too
# make test-te     the part of the tests that looks at the Transformer Engine backend, without a GPU
# make test-urls   weights in S3 and on the Hub, from servers on this machine; a part of test-full
# make test-engines exports in vLLM and SGLang, rollouts by vLLM, also on Ray, on the CPU; a part of test-full
# make test-new    the model's tests with the newest megatron-core and Transformer Engine; test-new-fast: a third of them
# make test-gpu    what only a GPU can tell, on a machine that has one; a part of it: PART="bf16 runs"
# make check       format, lint, types; make format fixes what can be fixed
# make docs        the table of keys in docs/training.md, from the comments in the code
# make clean       remove .venv, caches and demo_out
#
# Every target makes .venv with the versions of constraints.txt first, where they are missing.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
VENV := .venv
BIN := $(VENV)/bin
VARIANT ?= moe
HIDE_GPUS := CUDA_VISIBLE_DEVICES=
PYTEST := $(BIN)/python -m pytest --forbid-skips

# Transformer Engine's Python, laid over .venv for its tests alone: where megatron-core can import it, it uses it.
TE := .venv-te
WITH_TE := $(HIDE_GPUS) PYTHONPATH=$(TE)
PYTEST_TE := $(WITH_TE) $(PYTEST) -p tests.te.stand_in tests/te

# Both ends of the tested versions, each laid over .venv: only their Python, so that the same interpreter runs both.
NEW := .venv-new
NEW_ENDS := oldest newest engine
NEWEST := $(CURDIR)/$(NEW)/newest
PYTEST_NEW := $(HIDE_GPUS) PYTHONPATH=$(NEWEST) $(PYTEST)
PYTEST_NEW_TE := $(HIDE_GPUS) PYTHONPATH=$(NEWEST):$(CURDIR)/$(NEW)/engine:$(CURDIR)/$(TE) $(PYTEST) -p tests.te.stand_in

# Weights & Biases and MLflow, likewise.
TRACKERS := .venv-trackers
PYTEST_TRACKERS := $(HIDE_GPUS) PYTHONPATH=$(TRACKERS) $(PYTEST) tests/trackers

# s3fs and moto's S3 server, likewise.
URLS := .venv-urls
PYTEST_URLS := $(HIDE_GPUS) PYTHONPATH=$(URLS) $(PYTEST) tests/urls

# vLLM for CPUs, with torch and transformers of its own, and beside it SGLang's Python: they serve what is exported.
ENGINES := .venv-engines
PIP_ENGINES := $(ENGINES)/bin/python -m pip install -qq --disable-pip-version-check --no-deps

export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-rl demo-data test test-parts test-runs test-te test-new test-new-fast test-urls test-engines test-gpu test-fast test-full te-tables check format docs clean

demo: $(VENV)/installed
	$(BIN)/python -m demo --variant $(VARIANT)

demo-rl: $(VENV)/installed
	$(BIN)/python -m demo.reinforcement

demo-data: $(VENV)/installed
	$(BIN)/python -m demo.data --out demo_out

# The output of the two halves is mixed line by line, as it comes; each line begins with the name of its half.
test: $(VENV)/installed $(TE)/installed
	$(MAKE) --jobs=2 --no-print-directory LABEL=yes test-parts test-runs

labelled = $(if $(LABEL), 2>&1 | sed -u 's/^/$@: /')

# Two halves that run at the same time and take about as long: the parts of the program; the repository and whole runs.
PARTS := common data_pipeline demo model planning rewards rl slurm streaming tools

test-parts: $(VENV)/installed $(TE)/installed
	$(HIDE_GPUS) $(PYTEST) -m "not slow" $(PARTS:%=tests/%)$(labelled)
	$(PYTEST_TE) -m "not slow"$(labelled)

test-runs: $(VENV)/installed
	$(HIDE_GPUS) $(PYTEST) -m "not slow" tests $(PARTS:%=--ignore=tests/%)$(labelled)

test-te: $(TE)/installed
	$(PYTEST_TE)

test-new: $(NEW)/installed
	$(PYTEST_NEW) -m "not slow" tests/model tests/planning tests/training tests/sft tests/rl
	$(PYTEST_NEW_TE) tests/te
	$(HIDE_GPUS) $(PYTEST) tests/new

test-new-fast: $(NEW)/installed
	$(PYTEST_NEW) -m "fast and not slow" tests/model tests/planning
	$(PYTEST_NEW) -m "not slow" tests/model/test_parity.py tests/model/test_checkpoint.py tests/rl/test_policy_loss.py
	$(PYTEST_NEW_TE) tests/te/test_specs.py
	$(HIDE_GPUS) $(PYTEST) -m fast tests/new

test-urls: $(URLS)/installed
	$(PYTEST_URLS)

test-engines: $(ENGINES)/installed
	$(HIDE_GPUS) $(PYTEST) tests/engines

# Each part is a file tests/gpu/test_PART.py, takes less than three minutes and ends with a table of its results.
PART ?= $(patsubst tests/gpu/test_%.py,%,$(wildcard tests/gpu/test_*.py))

test-gpu: $(VENV)/installed
	failed=; for part in $(PART); do $(PYTEST) tests/gpu/test_$$part.py || failed+=" $$part"; done; \
	  if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

test-fast: $(VENV)/installed
	$(HIDE_GPUS) $(PYTEST) -m "fast and not slow"

test-full: $(VENV)/installed $(TE)/installed $(TRACKERS)/installed $(URLS)/installed $(ENGINES)/installed
	$(HIDE_GPUS) $(PYTEST)
	$(PYTEST_TE)
	$(PYTEST_TRACKERS)
	$(PYTEST_URLS)
	$(MAKE) test-engines
	$(MAKE) test-new

te-tables: $(TE)/installed  # write tests/te/golden again
	$(WITH_TE) $(BIN)/python -m tests.te.write_tables

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/installed
	$(BIN)/python -m tools.config_keys

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: setup.py constraints.txt tools/venv.sh tools/debian.sh
	bash tools/venv.sh $(VENV)
	bash tools/debian.sh
	touch $@

$(TE)/installed: tests/te/requirements.txt $(VENV)/installed
	rm -rf $(TE)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(TE) -r $<
	touch $@

$(NEW)/installed: $(NEW_ENDS:%=tests/new/%.txt) $(TE)/installed
	rm -rf $(NEW)
	for end in $(NEW_ENDS); do \
	    $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --ignore-requires-python \
	        --target $(NEW)/$$end -r tests/new/$$end.txt || exit 1; \
	done
	ln -s ../../$(TE)/triton $(NEW)/newest/triton
	touch $@

$(TRACKERS)/installed: tests/trackers/requirements.txt $(VENV)/installed
	rm -rf $(TRACKERS)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(TRACKERS) -r $<
	touch $@

$(URLS)/installed: tests/urls/requirements.txt $(VENV)/installed
	rm -rf $(URLS)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(URLS) -r $<
	touch $@

$(ENGINES)/installed: tests/engines/vllm.txt tests/engines/sglang.txt tests/engines/torchvision_operators.py $(VENV)/installed
	rm -rf $(ENGINES)
	$(BIN)/python -m venv $(ENGINES)
	$(PIP_ENGINES) -r tests/engines/vllm.txt
	$(PIP_ENGINES) --target $(ENGINES)/sglang -r tests/engines/sglang.txt
	site=$$($(ENGINES)/bin/python -c 'import site; print(site.getsitepackages()[0])') && \
	  cp tests/engines/torchvision_operators.py $$site && \
	  echo "import torchvision_operators" > $$site/torchvision_operators.pth
	touch $@

clean:
	rm -rf $(VENV) $(TE) $(NEW) $(TRACKERS) $(URLS) $(ENGINES) demo_out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
