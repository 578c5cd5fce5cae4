# `make demo` and `make test` need git, make and any Python from 3.12; everything else is set up here.
# `make help` lists the targets. Settings: PYTHON= (an interpreter), ARGS= (more arguments),
# JOBS= (processes that run tests).

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
STAMP := $(VENV)/.installed
PY = $(VENV)/bin/python
ARGS ?=
JOBS ?= 2
# Any Python from 3.12 that can make a virtual environment will do; the first of these is taken. A
# pyenv shim may exist for a version that is not switched on, so each candidate is tried.
PYTHON ?=
PYENV := $${PYENV_ROOT:-$$HOME/.pyenv}/versions
CANDIDATES = python3.13 python3.12 \
	"$(PYENV)"/3.13.*/bin/python "$(PYENV)"/3.12.*/bin/python "$(PYENV)"/3.1[4-9].*/bin/python \
	python3.14 python3 python
FITS = -c 'import sys; from importlib.util import find_spec as has; \
	sys.exit(sys.version_info < (3, 12) or not (has("venv") and (has("ensurepip") or has("pip"))))' \
	>/dev/null 2>&1
PIP_INSTALL = install -qq --no-input --disable-pip-version-check --no-warn-script-location

# A venv whose interpreter is gone (moved, uninstalled) is made anew.
ifeq ($(wildcard $(PY)),)
.PHONY: $(STAMP)
endif

.PHONY: help
help: ## print this list
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | \
		while IFS='|' read -r target text; do printf '%-20s %s\n' "$$target" "$$text"; done

.PHONY: demo
demo: $(STAMP) ## train a teacher, a baseline and a LET student on this machine, write a report
	@$(PY) -m jaxreason.main demo $(ARGS)

.PHONY: test
test: $(STAMP) ## run the tests (ARGS="tests/core -x" for some of them)
	@$(PY) -m pytest -n $(JOBS) --dist loadfile --durations=15 $(ARGS)

.PHONY: tasks-test
tasks-test: $(STAMP) ## run the tests that need the extra [tasks] (a C compiler builds one of its packages)
	@$(PY) -m pip $(PIP_INSTALL) -e '.[dev,tasks]' -c constraints.txt
	@$(PY) -m pytest -q tests/data/test_tasks.py $(ARGS)

.PHONY: lint
lint: $(STAMP) ## check format, lint and types
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m pyright --pythonpath $(PY)

.PHONY: format
format: $(STAMP) ## format the code and mend what the linter can mend
	@$(PY) -m ruff check --fix-only --quiet .
	@$(PY) -m ruff format .

.PHONY: bench
bench: $(STAMP) ## measure the train step's speed on this machine
	@$(PY) -m benchmarks.step $(ARGS)

# Compilers for hardware that is not here: an environment of their own, 1.3 GB with the TPU's and
# 3.5 GB more with the GPU's. JAX itself runs on the CPU there.
AOT_VENV := .cache/aot-venv
AOT_PY = $(AOT_VENV)/bin/python
AOT_CI := let_1p4b_v5e_4x4,let_1p4b_v5p_2x2x4

.PHONY: aot
aot: $(AOT_VENV)/.cuda ## compile the large configs for TPU and GPU slices, hold their budgets (ARGS=--update)
	@$(AOT_PY) -m benchmarks.aot_gates $(ARGS)

.PHONY: aot-table
aot-table: $(STAMP) ## print the committed numbers of those configs; compiles nothing
	@$(PY) -m benchmarks.aot_gates --table

.PHONY: aot-test
aot-test: $(AOT_VENV)/.cuda ## let the TPU's and the GPU's compiler take the attention kernels
	@$(AOT_PY) -m pip $(PIP_INSTALL) pytest chex -c constraints.txt
	@TPU_SKIP_MDS_QUERY=1 $(AOT_PY) -m pytest -q tests/aot --override-ini=testpaths=tests/aot \
		--override-ini=addopts=--import-mode=importlib

.PHONY: aot-ci
aot-ci: $(AOT_VENV)/.tpu ## the two gates that CI holds
	@$(AOT_PY) -m benchmarks.aot_gates --only=$(AOT_CI) $(ARGS)

.PHONY: aot-scaling
aot-scaling: $(AOT_VENV)/.tpu ## bytes a chip from 16 to 512 chips, by compiling (ARGS=--update)
	@$(AOT_PY) -m benchmarks.aot_scaling $(ARGS)

$(AOT_VENV)/.tpu: VENV := $(AOT_VENV)
$(AOT_VENV)/.tpu: pyproject.toml constraints.txt
	@set -e; if [ ! -x $(PY) ]; then $(find_python); \
		echo "Setting up $(VENV) with the TPU compiler ..."; \
		rm -rf $(VENV); mkdir -p $(dir $(VENV)); $(create_venv); fi; \
	$(PY) -m pip $(PIP_INSTALL) -e '.[aot]' -c constraints.txt; touch $@

$(AOT_VENV)/.cuda: VENV := $(AOT_VENV)
$(AOT_VENV)/.cuda: $(AOT_VENV)/.tpu
	@set -e; echo "Adding the GPU compiler to $(VENV): about 3 GB to download ..."; \
	$(PY) -m pip $(PIP_INSTALL) -e '.[aot,cuda]' -c constraints.txt; touch $@

MAXTEXT_VENV := .cache/maxtext-venv

.PHONY: maxtext
maxtext: $(MAXTEXT_VENV)/.installed ## compile the same models with MaxText and here; bytes and time side by side
	@$(MAXTEXT_VENV)/bin/python -m benchmarks.maxtext $(ARGS)

$(MAXTEXT_VENV)/.installed: VENV := $(MAXTEXT_VENV)
$(MAXTEXT_VENV)/.installed:
	@set -e; $(find_python); echo "Setting up $(VENV) with maxtext[tpu] ..."; \
	rm -rf $(VENV); mkdir -p $(dir $(VENV)); $(create_venv); \
	$(PY) -m pip $(PIP_INSTALL) 'maxtext[tpu]==0.2.5' -e .; touch $@

.PHONY: venv
venv: $(STAMP) ## set up .venv with the pinned packages
	@:

$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	if ! { [ -z '$(PYTHON)' ] && $(PY) $(FITS) && $(PY) -m pip --version >/dev/null 2>&1; }; then \
		$(find_python); \
		echo "Setting up $(VENV) with $$($$python --version): about 1.4 GB, a minute or a few ..."; \
		rm -rf $(VENV); $(create_venv); \
	else echo "Bringing $(VENV) up to date ..."; fi; \
	$(PY) -m pip $(PIP_INSTALL) -e '.[dev]' -c constraints.txt; \
	touch $@

# Sets $python; says in one line what to do where there is none.
define find_python
python=; for candidate in $(if $(PYTHON),'$(PYTHON)',$(CANDIDATES)); do \
	if "$$candidate" $(FITS); then python="$$candidate"; break; fi; done; \
if [ -z "$$python" ]; then \
	echo "error: $(if $(PYTHON),PYTHON=$(PYTHON) is no Python,found no Python) from 3.12 with venv and" \
		"pip; get one (apt-get install python3.12 python3.12-venv; pyenv install 3.13; uv python" \
		"install 3.13) or name one (make PYTHON=/path/to/python3.12)" >&2; exit 2; fi
endef

# Debian packs ensurepip apart from Python; that Python's own pip can then put pip into the venv.
define create_venv
if "$$python" -c 'import ensurepip' >/dev/null 2>&1; then "$$python" -m venv $(VENV); else \
	"$$python" -m venv --without-pip $(VENV); \
	"$$python" -m pip --python $(PY) $(PIP_INSTALL) pip; fi
endef

.PHONY: constraints
constraints: VENV := .cache/constraints
constraints: ## pin anew: the newest versions that pip finds for Python 3.12, into constraints.txt
	@set -e; for python in $(if $(PYTHON),'$(PYTHON)',python3.12 "$(PYENV)"/3.12.*/bin/python); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then \
			break; fi; python=; done; \
	if [ -z "$$python" ]; then echo "error: the pins are made with Python 3.12; name one:" \
		"make constraints PYTHON=/path/to/python3.12" >&2; exit 2; fi; \
	rm -rf $(VENV); mkdir -p $(dir $(VENV)); $(create_venv); \
	$(PY) -m pip $(PIP_INSTALL) -e '.[dev,tasks]'; \
	{ echo "# Exact versions of what '.[dev,tasks]' installs, for \`make venv\`; written by \`make constraints\`"; \
	  echo "# from a fresh environment of $$($(PY) --version). pyproject.toml holds the lower bounds."; \
	  $(PY) -m pip freeze --exclude-editable; } > constraints.txt.new; \
	mv constraints.txt.new constraints.txt; rm -rf $(VENV); \
	echo "constraints.txt: $$(grep -c == constraints.txt) packages pinned"

.PHONY: clean
clean: ## remove what make made (not runs/)
	@rm -rf $(VENV) .cache .pytest_cache .ruff_cache build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
