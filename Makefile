# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3.11
# cpu: the CPU build. Anything else is given to pip as it is, such as TORCH="torch==2.13.0" for the CUDA build.
TORCH ?= cpu
DATA ?= sample
BACKBONE ?=
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
CPU_WHEELS := https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lab ladder bench docs check-docs readme hooks clean
.DEFAULT_GOAL := demo

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found; install Python 3.11 or give PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
ifeq ($(TORCH),cpu)
	@$(BIN)/python -c "import torch" 2>/dev/null \
	  || $(BIN)/pip install -q --no-deps --retries 0 --timeout 20 --index-url $(CPU_WHEELS) torch==2.13.0 2>/dev/null \
	  || $(BIN)/pip install -q -c constraints.txt torch==2.13.0
else
	$(BIN)/pip install -q -c constraints.txt $(TORCH)
endif
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY)  ## everything: data, training, ensemble, submission.csv, report.html
	@$(BIN)/esci-nb demo --data "$(DATA)" --backbone "$(BACKBONE)" $(ARGS)

test: $(READY)  ## all tests, library notebooks among them
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
	@CHECK_DOCS=1 $(BIN)/python -m pytest tests/test_docs.py tests/test_site.py --no-cov $(ARGS)

hooks: $(READY)  ## git commits only clean notebooks, exported and linted
	@git config core.hooksPath .github/hooks

readme: $(READY)  ## README.md from nbs/index.ipynb
	@$(BIN)/python tests/readme.py

clean:  ## remove the environment and everything that stages wrote
	rm -rf .venv build dist *.egg-info .pytest_cache
	find outputs -mindepth 1 ! -name README.md -delete
