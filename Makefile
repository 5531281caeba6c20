# Every target sets up what it needs, in .venv. The versions below are the tested ones.
PYTHON ?= python3
VENV ?= .venv
TORCH = torch==2.13.0
TESTED = deepspeed==0.19.8 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
ADASCALE = fairscale==0.4.13
TIMM = timm==1.0.31
BIN = $(VENV)/bin
# The launcher and the ranks that it starts must find this environment first.
RUN = PATH="$(abspath $(BIN)):$$PATH" HF_HUB_OFFLINE=1

.PHONY: demo demo-quick test test-all lint format bench bench-quick bench-scaling compare compare-report clean
.DEFAULT_GOAL := test

# torch comes first: another package would pull its newest build, with gigabytes of CUDA libraries.
# fairscale is built without isolation for the same reason; it is the AdaScale that the tests compare with. timm has
# their LAMB and LARS; it comes without its dependencies, since torchvision has no build for this torch without CUDA.
$(VENV)/installed: setup.py Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "setuptools<81" wheel
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet $(TESTED) -e ".[hf,examples,compare,test,lint]"
	$(BIN)/pip install --quiet --no-build-isolation --no-deps $(ADASCALE)
	$(BIN)/pip install --quiet --no-deps $(TIMM)
	touch $@

demo: $(VENV)/installed
	$(RUN) bash examples/demo.sh

demo-quick: $(VENV)/installed
	$(RUN) DEMO_QUICK=1 bash examples/demo.sh

test: $(VENV)/installed
	$(RUN) python -m pytest

test-all: $(VENV)/installed
	$(RUN) python -m pytest -m "full or not full"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed
	$(RUN) python -m benchmarks

bench-quick: $(VENV)/installed
	$(RUN) python -m benchmarks --quick --out outputs/benchmarks-quick

bench-scaling: $(VENV)/installed
	$(RUN) python -m benchmarks.scaling

# Hours on two cores; it can be interrupted, and goes on where it was.
compare: $(VENV)/installed
	$(RUN) python -m examples.compare run

compare-report: $(VENV)/installed
	$(RUN) python -m examples.compare report

clean:
	rm -rf $(VENV) outputs
