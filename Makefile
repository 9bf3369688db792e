# `make` lists the targets. Needs only Python 3.11 to 3.13; everything else is installed into .venv.

PYTHON ?= python3
# The index that torch comes from, for a CPU or another CUDA build than PyPI's:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

# What `make ui` shows, and where: make ui STORE=sqlite:///ldm-demo/mlflow.db PORT=5001
STORE ?= sqlite:///mlflow.db
PORT ?= 5000

BIN := .venv/bin
INSTALLED := .venv/.installed
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv python demo ui test test-fast test-faults test-install lint format wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' Makefile

venv: $(INSTALLED)  ## create .venv and install the tested set of packages (TORCH_INDEX=… chooses torch's index)

$(INSTALLED): constraints.txt pyproject.toml | python
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(BIN)/pip install --no-deps "$(TORCH)" --index-url "$(TORCH_INDEX)")
	$(BIN)/pip install -e '.[dev]' -c constraints.txt
	@touch $@

python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "PYTHON=$(PYTHON): is $$($(PYTHON) -V 2>&1 | head -n 1), expected Python 3.11 to 3.13;" \
	    "give one, as in: make venv PYTHON=python3.12" >&2; exit 1; }

demo: venv  ## the whole path on real handwritten digits: encode, train, serve, evaluate
	$(BIN)/ldm demo

ui: venv  ## MLflow's page on this machine's runs, at http://127.0.0.1:5000 (STORE=…, PORT=…)
	@$(BIN)/python -c 'import socket; socket.create_server(("127.0.0.1", $(PORT))).close()' 2>/dev/null || { \
	  echo "PORT=$(PORT): is in use or no port; give a free one, as in: make ui PORT=5001" >&2; exit 1; }
	MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui --backend-store-uri "$(STORE)" --host 127.0.0.1 --port $(PORT)

test: venv  ## every test but the long fault rounds; what needs no Ray on two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not faults and not ray and not wheel"
	$(BIN)/python -m pytest -m "not faults and (ray or wheel)"

test-fast: venv  ## the tests that need neither Ray, nor several ranks, nor a wheel
	$(BIN)/python -m pytest -m "not faults and not ray and not wheel and not slow"

test-faults: venv  ## long rounds of killed workers and broken disks
	@$(BIN)/python -m pytest -m faults || { code=$$?; \
	  [ $$code -eq 5 ] && echo "test-faults: there are no fault tests yet" || exit $$code; }

test-install: wheel  ## install the wheel with all its dependencies into an empty environment and run it
	rm -rf build/empty && $(PYTHON) -m venv build/empty
	build/empty/bin/pip install dist/*.whl -c constraints.txt
	cd build/empty && env -u PYTHONPATH bin/ldm --help
	cd build/empty && env -u PYTHONPATH bin/ldm encode --print-config source=a.tar destination=latents autoencoder=vae

lint: venv  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv  ## rewrite the code as ruff would have it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: venv  ## build dist/ldm_pipelines-*.whl
	rm -rf dist build
	$(BIN)/python -m build --wheel --no-isolation

clean:  ## remove the environment and all that was built
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
