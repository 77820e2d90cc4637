# Needs Python 3.11, pip and make. Every target first makes .venv with the locked packages, if it is not there yet.
#   make test                               the tests; PYTEST_ARGS="-k lora -x" narrows them
#   make reproduce PAPER=textual_inversion  the paper's claims in the toy world; QUICK=1 only checks that it runs
#   make notebooks                          runs all notebooks in place; PAPER=textual_inversion only that one
#   make install                            only .venv
#   make lint                               ruff and the import rules
#   make clean                              removes .venv and what the tools left behind

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
STAMP := $(VENV)/installed
OUTPUT ?= $(if $(QUICK),runs/quick/$(PAPER))

# Nothing is downloaded from a hub while testing.
export HF_HUB_OFFLINE = 1

# tcmalloc makes CPU training faster where it is installed; nothing needs it.
TCMALLOC := $(firstword $(shell PATH="$$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null \
	| sed -n 's/.*libtcmalloc\(_minimal\)\{0,1\}\.so\.4 .*=> //p'))
FAST := $(if $(TCMALLOC),LD_PRELOAD="$(TCMALLOC)$${LD_PRELOAD:+:$$LD_PRELOAD}")

.PHONY: test reproduce notebooks lint clean install paper_given

test: install
	$(FAST) $(VENV)/bin/python -m pytest $(PYTEST_ARGS)

reproduce: paper_given install
	$(FAST) $(VENV)/bin/pcs reproduce $(PAPER) $(if $(QUICK),--quick) $(if $(OUTPUT),--output $(OUTPUT))

notebooks: install
	$(FAST) $(VENV)/bin/python notebooks/execute.py $(wildcard notebooks/$(or $(PAPER),*).ipynb)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache

clean:
	rm -rf .venv runs/quick build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find common papers tests -name __pycache__ -type d -prune -exec rm -rf {} +

install: $(STAMP)

paper_given:
	@test -n "$(PAPER)" || { echo "make reproduce: name a paper, as in: make reproduce PAPER=textual_inversion" >&2; exit 2; }

$(STAMP): requirements.lock requirements.no-deps.lock pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "Python 3.11 is needed (found: $(PYTHON)); name it, as in: make PYTHON=/path/to/python3.11 test" >&2; exit 2; }
	"$(PYTHON)" -m venv "$(VENV)"
	"$(VENV)/bin/python" -m pip install --disable-pip-version-check -r requirements.lock
	"$(VENV)/bin/python" -m pip install --disable-pip-version-check --no-deps -r requirements.no-deps.lock
	"$(VENV)/bin/python" -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch "$@"
