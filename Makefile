# make train   set up and train the first experiment    make test      the check before a commit
# make format  let ruff mend what it can                make test-all  the slow tests too
# make lint    ruff and mypy                            make docs      the site, into site/
# make clean   remove the environment                   make lock      renew requirements/*.lock
#
# Python >= 3.11 and make are all it takes. PYTHON=python3.12 picks the interpreter; an
# environment made with another version is made anew, so VENV=.venv312 keeps two side by side.

VENV ?= .venv
CONFIG ?= maml_digits
WORKDIR ?= runs/$(CONFIG)
ARGS ?=

MADE := $(wildcard $(VENV)/.python-*)
PYTHON ?= $(if $(MADE),$(VENV)/bin/python,python3)
VERSION := $(or $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null),missing)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# A file's tests stay with one worker: what a module prepares is prepared once.
PYTEST = $(VENV)/bin/python -m pytest -n 2 --dist loadfile

# Bytecode is kept, also where the caller's Python is told to write none: compiling all that is
# imported takes seconds, and the tests start many processes.
export PYTHONDONTWRITEBYTECODE =
export PYTHONPYCACHEPREFIX = $(abspath $(VENV))/pycache

.DEFAULT_GOAL := help
.PHONY: help train test test-all lint docs format lock clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

train: $(VENV)/.train
	$(VENV)/bin/metalearn train --config=$(CONFIG) --workdir=$(WORKDIR) $(ARGS)

test: lint
	$(PYTEST) -m "not slow" $(ARGS)

test-all: lint
	$(PYTEST) $(ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

# Strict: a dead link, or a page that is not in the navigation, is an error.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

format: $(VENV)/.test
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

# One lock file serves Linux and macOS and every Python from 3.11 on.
COMPILE = $(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --upgrade \
	--annotation-style line --custom-compile-command "make lock" setup.cfg

lock: $(VENV)/.python-$(VERSION)
	$(PIP) install -qq uv
	$(COMPILE) --no-emit-package pyarrow --output-file requirements/train.lock
	$(COMPILE) --extra test --extra docs --output-file requirements/test.lock

clean:
	rm -rf $(VENV)

# Stamps: installed again only when the lock file or setup.cfg has changed. A lock file is complete,
# so nothing is resolved; and modules are compiled when they are first imported, most of them never.
# train.lock leaves out pyarrow, 176 MB that TensorFlow Datasets imports for Parquet files alone.
$(VENV)/.train $(VENV)/.test: $(VENV)/.%: requirements/%.lock setup.cfg $(VENV)/.python-$(VERSION)
	@echo 'Installing $< and this project into $(VENV), up to a minute'
	@$(PIP) install -qq --no-deps --no-compile --requirement $<
	@$(PIP) install -qq --no-deps --editable .
	@touch $@

$(VENV)/.python-%:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo 'metalearn needs Python 3.11 or later, and `$(PYTHON)` is $(VERSION).' \
	    'Name another one: make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo '`$(PYTHON)` cannot create environments (no venv or ensurepip). Install them' \
	    '(Debian, Ubuntu: apt install python3-venv), or name another PYTHON.' >&2; exit 1; }
	$(PYTHON) -m venv $(if $(MADE),--clear) $(VENV)
	@touch $@
