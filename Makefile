# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
# The first of these that is a whole Python from 3.11 to 3.13; or give one: make demo PYTHON=/path/to/python
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	$$python -c "import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" 2>/dev/null && echo $$python && break; done)
# cpu: the CPU build. Anything else is given to pip as it is, such as TORCH="torch==2.13.0" for the CUDA build.
TORCH ?= cpu
DATA ?= sample
BACKBONE ?=
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
CPU_WHEELS := https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test lab ladder bench docs check-docs check-stacks readme hooks clean
.DEFAULT_GOAL := demo

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@$(if $(PYTHON),,echo "make: no Python from 3.11 to 3.13 with venv was found; install one (on Debian also python3-venv), or give PYTHON=..." >&2; exit 2)
	@"$(PYTHON)" -c "import sys" || { echo "make: $(PYTHON) does not run; give another PYTHON=..." >&2; exit 2; }
	"$(PYTHON)" -m venv .venv
ifeq ($(TORCH),cpu)
	@$(BIN)/python -c "import torch" 2>/dev/null \
	  || $(BIN)/pip install -q --no-deps --retries 0 --timeout 20 --index-url $(CPU_WHEELS) torch==2.13.0 2>/dev/null \
	  || $(BIN)/pip install -q -c constraints.txt torch==2.13.0
else
	$(BIN)/pip install -q -c constraints.txt $(TORCH)
endif
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

help:  ## what make can do
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14
	@echo "DATA, BACKBONE, ARGS, PYTHON and TORCH may be given, as in: make demo DATA=data/esci BACKBONE=microsoft/infoxlm-large"

demo: $(READY)  ## everything: data, training, ensemble, submission.csv, report.html
	@$(BIN)/esci-nb demo --data "$(DATA)" --backbone "$(BACKBONE)" $(ARGS)

test: $(READY)  ## all tests, library notebooks among them; ARGS=--cov=esci_nb counts the lines they reach
	@$(BIN)/python -m pytest $(ARGS)

lab: $(READY)  ## JupyterLab with the environment ready
	@$(BIN)/jupyter lab --notebook-dir=.

ladder: $(READY)  ## cross-validated scores of every strategy into nbs/results/ladder.csv
	@$(BIN)/esci-nb ladder nbs/grids/ladder.toml "$(DATA)" $(if $(BACKBONE),--backbones "$(BACKBONE)" --zero-shot) $(ARGS)

PEERS := .venv/.peers
$(PEERS): $(READY)
	$(BIN)/pip install -q -c constraints.txt -e ".[peers]"
	@touch $@

bench: $(PEERS)  ## speed against the peers into nbs/results/bench.csv
	@$(BIN)/esci-nb bench "$(DATA)" --backbone "$(BACKBONE)" $(ARGS)

DOCS := .venv/.docs
$(DOCS): $(READY)
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	@touch $@

docs: $(DOCS)  ## the site from the notebooks, in outputs/docs/
	@$(BIN)/esci-nb docs $(ARGS)

check-docs: $(DOCS)  ## the site in a browser (chromium must be installed), its links, and the tutorial
	@$(BIN)/pip install -q -c constraints.txt -e ".[browser]"
	@CHECK_DOCS=1 $(BIN)/python -m pytest tests/test_docs.py tests/test_site.py $(ARGS)

check-stacks: $(READY)  ## the packed submission notebook on the oldest and the newest versions that it promises to run on
	@$(BIN)/python tests/check_stacks.py $(if $(ARGS),$(ARGS),--build .venv/stacks)

hooks: $(READY)  ## git commits only clean notebooks, exported and linted
	@git config core.hooksPath .github/hooks

readme: $(READY)  ## README.md from nbs/index.ipynb
	@$(BIN)/python tests/readme.py

clean:  ## remove the environment and everything that stages wrote
	rm -rf .venv build dist *.egg-info .pytest_cache
	find outputs -mindepth 1 ! -name README.md -delete
