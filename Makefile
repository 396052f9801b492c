# make demo: the whole method on a real model.   make test: all tests.   make lint: ruff, pyright, import-linter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.emloc-installed
ARGS ?=

.PHONY: demo test lint install

install: $(INSTALLED)

$(INSTALLED): constraints.txt requirements-dev.txt $(wildcard packages/*/pyproject.toml)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# Python compiles what it imports; compiling all that is installed takes a minute more.
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile \
		-c constraints.txt -r requirements-dev.txt \
		-e "packages/emloc[prodigy,numba]" -e "packages/emloc-llm[demo,tensorboard]" \
		-e "packages/emloc-vlm[sentencepiece]" \
		-e packages/emloc-diffusion -e "packages/emloc-baselines[qlora]"
	# Apart from the others: torchvision beside a torch of another build breaks transformers.
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile --quiet --no-deps \
		-c constraints.txt --upgrade --target $(VENV)/timm timm torchvision
	# The kernel for GPUs is tested in Triton's interpreter; other libraries change where they see Triton.
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile --quiet --no-deps \
		--upgrade --target $(VENV)/triton triton==3.6.0
	touch $@

demo: $(INSTALLED)
	$(BIN)/emloc demo --output_dir demo-output $(ARGS)

# Most tests are many small steps: two processes of one thread each take half the time of one of two.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
