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

# Threads that wait at a barrier hold a core, which is another test's where several processes share few cores: a test of
# 75 s took 4 s with one thread each, and one of 215 s, with workers of two threads, 16 s where waiting gives the core away.
SHARED_CORES := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

# Tests start hundreds of processes. Without files of bytecode each compiles this package anew: 5.8 s for what a training
# imports, 3.6 s with them.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv python demo ui test test-fast test-cluster test-cluster-path test-faults test-install lint secrets audit format wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' Makefile

venv: $(INSTALLED)  ## create .venv and install the tested set of packages (TORCH_INDEX=… chooses torch's index)

$(INSTALLED): constraints.txt pyproject.toml | python
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(BIN)/pip install --no-deps "$(TORCH)" --index-url "$(TORCH_INDEX)")
	$(BIN)/pip install -e '.[dev,deploy]' -c constraints.txt
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

test: venv  ## every test but the long fault rounds and the cluster's, on two processes
	$(SHARED_CORES) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not faults and not cluster and not ray and not wheel"
	$(SHARED_CORES) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not faults and not cluster and (ray or wheel)"

test-fast: venv  ## the tests that need neither Ray, nor several ranks, nor a wheel
	$(SHARED_CORES) $(BIN)/python -m pytest -m "not faults and not ray and not wheel and not slow and not cluster"

test-cluster: venv  ## the path over four nodes with S3, MLflow and PostgreSQL, and what befalls clusters (needs postgresql)
	$(SHARED_CORES) $(BIN)/python -m pytest -m cluster

test-cluster-path: venv  ## of these the path alone
	$(SHARED_CORES) $(BIN)/python -m pytest -m "cluster and not faults"

test-faults: venv  ## long rounds of killed workers and broken disks
	@$(SHARED_CORES) $(BIN)/python -m pytest -n 2 --dist loadfile -m "faults and not cluster" || { code=$$?; \
	  [ $$code -eq 5 ] && echo "test-faults: there are no fault tests yet" || exit $$code; }

test-install: wheel  ## install the wheel with all its dependencies into an empty environment and run it
	rm -rf build/empty && $(PYTHON) -m venv build/empty
	build/empty/bin/pip install dist/*.whl -c constraints.txt
	cd build/empty && env -u PYTHONPATH bin/ldm --help
	cd build/empty && env -u PYTHONPATH bin/ldm encode --print-config source=a.tar destination=latents autoencoder=vae

lint: venv secrets  ## ruff (rules and format), mypy, hadolint, and a search for secrets
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint infra/Dockerfile

secrets: venv  ## look for passwords, keys and tokens in all files that git has
	$(BIN)/detect-secrets-hook --exclude-lines '^ *def ' $$(git ls-files)

audit: venv  ## ask PyPI's list of known vulnerabilities about the pinned packages (needs the network)
	@log=$$(mktemp); trap 'rm -f "$$log"' EXIT; \
	$(BIN)/pip-audit --no-deps --disable-pip --progress-spinner off -r constraints.txt 2>"$$log"; code=$$?; \
	if grep -q '^requests.exceptions' "$$log"; then \
	  echo "audit: the list of vulnerabilities cannot be reached from here: nothing was looked at" >&2; exit 1; fi; \
	cat "$$log" >&2; exit $$code

format: venv  ## rewrite the code as ruff would have it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: venv  ## build dist/ldm_pipelines-*.whl
	rm -rf dist build
	$(BIN)/python -m build --wheel --no-isolation

clean:  ## remove the environment and all that was built
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
