# make demo    set up, make the built-in data set, train on it, evaluate, draw the predictions
# make test    set up, then the test suite, the linter and the format check
# make setup   only set up, in .venv
#
# What can be set, e.g. `make test PYTHON=python3.12`:
#   PYTHON      the Python (3.10 or newer) that makes the virtual environment
#   TORCH       what to install as PyTorch, e.g. TORCH="torch==2.9.1 torchvision==0.24.1"
#   TORCH_INDEX another package index for PyTorch only, e.g. the one with its CPU builds
#   CONSTRAINTS a file of pinned versions; empty for none
#   DETECTRON2  a folder, wheel or URL to install Detectron2 from, for machines without access to
#               its upstream repository
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
TORCH_INDEX ?=
CONSTRAINTS ?= constraints.txt
UPSTREAM = https://github.com/facebookresearch/detectron2.git
DETECTRON2_COMMIT = 02b5c4e295e990042a714712c21dc79b731e8833
DETECTRON2 ?= git+$(UPSTREAM)@$(DETECTRON2_COMMIT)
DEMO_DIR ?= demo_output

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip
CONSTRAIN = $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
STAMP = $(VENV)/.setup-complete

.PHONY: setup demo test lint format clean

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "fcos_d2 needs Python 3.10 or newer; $(PYTHON) is `$(PYTHON) --version 2>&1`." \
	       "Name another one: make PYTHON=python3.12 ..."; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { \
	  echo "Detectron2 is compiled on this machine, which needs a C++ compiler: none found." \
	       "On Debian and Ubuntu: apt-get install g++"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@case '$(DETECTRON2)' in git+$(UPSTREAM)*) git ls-remote -q $(UPSTREAM) HEAD >/dev/null 2>&1 || { \
	  echo "Cannot reach Detectron2's upstream repository $(UPSTREAM)." \
	       "On a machine without access to it, name a folder, wheel or URL that holds Detectron2:" \
	       "make DETECTRON2=/path/to/detectron2 ..."; exit 1; };; esac
	$(PIP) install --quiet $(CONSTRAIN) 'setuptools<81' wheel
	$(PIP) install --quiet $(CONSTRAIN) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install --quiet $(CONSTRAIN) --no-build-isolation '$(DETECTRON2)' || { \
	  echo "Detectron2 could not be built or installed from $(DETECTRON2): see above."; exit 1; }
	$(PIP) install --quiet $(CONSTRAIN) --no-build-isolation --editable '.[test]'
	$(BIN)/python -m fcos_d2.doctor
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m fcos_d2.demo --output $(DEMO_DIR)

test: $(STAMP)
	$(BIN)/python -m pytest
	$(MAKE) --no-print-directory lint

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO_DIR)
