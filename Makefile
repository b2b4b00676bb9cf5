# make demo    set up, make the built-in data set, train on it, evaluate, draw the predictions
# make test    set up, then the test suite, the linter and the format check
# make setup   only set up, in .venv
# make docs    build the site in build/site, in a virtual environment of its own
# make pictures  make the README's pictures anew, by the demo
#
# What can be set, e.g. `make test PYTHON=python3.12`:
#   PYTHON      the Python (3.10 or newer) that makes the virtual environment
#   TORCH       what to install as PyTorch, e.g. TORCH="torch==2.9.1 torchvision==0.24.1"; the
#               versions in constraints.txt are then not used
#   TORCH_INDEX another package index for PyTorch only, e.g. the one with its CPU builds
#   CONSTRAINTS a file of pinned versions in place of constraints.txt; empty for none
#   DETECTRON2  a folder, wheel or URL to install Detectron2 from, for machines without access to
#               its upstream repository
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
TORCH_INDEX ?=
CONSTRAINTS ?= $(if $(filter-out torch torchvision,$(TORCH)),,constraints.txt)
# The last word of the requirement is git+URL@COMMIT, and UPSTREAM is the URL in it.
PINNED_DETECTRON2 := $(lastword $(shell cat fcos_d2/detectron2.txt))
UPSTREAM := $(patsubst git+%,%,$(firstword $(subst @, ,$(PINNED_DETECTRON2))))
DETECTRON2 ?= $(PINNED_DETECTRON2)
DEMO_DIR ?= demo_output

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip
INSTALL = $(PIP) install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
# A folder or file by its full path: to pip, a bare name would be a package of the registry.
DETECTRON2_SOURCE = $(if $(wildcard $(DETECTRON2)),$(abspath $(DETECTRON2)),$(DETECTRON2))
# Another Python, PyTorch, source or pin means another Detectron2: its stamp is named after them.
DETECTRON2_KEY := $(shell { $(PYTHON) --version; echo '$(DETECTRON2) $(TORCH) $(TORCH_INDEX)'; \
  cat /dev/null $(CONSTRAINTS); } 2>&1 | cksum | cut -d' ' -f1)
DETECTRON2_STAMP = $(VENV)/.detectron2-$(DETECTRON2_KEY)
STAMP = $(VENV)/.setup-complete

.PHONY: setup demo test lint format docs pictures clean

setup: $(STAMP)

$(DETECTRON2_STAMP):
	@PYTHON='$(PYTHON)' UPSTREAM='$(UPSTREAM)' DETECTRON2='$(DETECTRON2_SOURCE)' \
	  sh tools/check_prerequisites.sh
	@$(PIP) --version >/dev/null 2>&1 && test "`$(BIN)/python --version`" = "`$(PYTHON) --version`" || \
	  $(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) 'setuptools<81' wheel
	$(if $(TORCH_INDEX),@$(PIP) uninstall --quiet --yes torch torchvision  # pip would keep them)
	$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(PIP) uninstall --quiet --yes detectron2  # pip would keep another build of the same version
	$(INSTALL) --no-build-isolation '$(DETECTRON2_SOURCE)' || { \
	  echo "Detectron2 could not be built or installed from $(DETECTRON2): see above."; exit 1; }
	@rm -f $(VENV)/.detectron2-*
	@touch $@

$(STAMP): $(DETECTRON2_STAMP) setup.py pyproject.toml
	$(INSTALL) --no-build-isolation --editable '.[test]'
	$(BIN)/python tools/doctor.py
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m fcos_d2.demo --output $(DEMO_DIR)

pictures: demo
	$(BIN)/python tools/readme_pictures.py $(DEMO_DIR) docs/pictures

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
	$(MAKE) --no-print-directory lint

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The reference is read from the sources: neither PyTorch nor Detectron2 is needed.
DOCS_VENV = build/docs_venv
PAGES = build/pages
IN_SITE = README.md CHANGELOG.md CONTRIBUTING.md CITATION.cff benchmarks configs docs

$(DOCS_VENV)/.complete: docs/site/requirements.txt constraints.txt
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --requirement $<
	@touch $@

docs: $(DOCS_VENV)/.complete
	@rm -rf $(PAGES) && mkdir -p $(PAGES)/api
	@cp -R $(IN_SITE) $(PAGES)
	@for name in `sed -n 's|.*- api/\(fcos_d2.*\)\.md|\1|p' mkdocs.yml`; do \
	  printf '# %s\n\n::: %s\n' $$name $$name >$(PAGES)/api/$$name.md; done
	@{ printf -- '---\nhide: [toc]\n---\n# Config keys\n\n```python\n'; cat fcos_d2/config.py; \
	  echo '```'; } >$(PAGES)/api/keys.md
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	@echo "The site: build/site/index.html. Its search needs a server:" \
	  "python3 -m http.server --directory build/site"

clean:
	rm -rf $(VENV) $(DEMO_DIR) build
