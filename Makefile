# Every target sets up what it needs, in .venv, with the versions of this Python's lock.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

MINOR := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
LOCK := .ci/lock-py$(MINOR).txt
LOCKED := $(patsubst .ci/lock-py%.txt,%,$(wildcard .ci/lock-py*.txt))
NEWEST = $(VENV)-newest
BARE = $(VENV)-bare
IN = .ci/in-env
RUN = $(IN) $(VENV)

.PHONY: demo demo-quick test test-all fuzz faults lint format bench bench-quick bench-scaling compare compare-report docs clean
.PHONY: lock lock-check newest test-newest wheel-check
.DEFAULT_GOAL := test

# $(call base,FOLDER,OPTIONS OF PIP): an environment with tools that build, and torch.
# torch comes first, and by its exact version: a range, asked for here or by another package, takes the newest build on
# PyPI, with gigabytes of CUDA libraries. `==2.13.0` is met by a build for the CPU (2.13.0+cpu), where pip finds one.
define base
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet $(2) --upgrade pip setuptools wheel
	$(1)/bin/pip install --quiet $(2) "$(TORCH)"
endef

# $(call everything,FOLDER,OPTIONS OF PIP): all that the targets need. Without isolation, packages are built by the
# tools and the torch of `base`, not by the newest of the day. fairscale is the AdaScale that the tests compare with;
# timm has their LAMB and LARS. timm comes without its dependencies: PyPI's torchvision does not fit torch's CPU build.
define everything
	$(call base,$(1),$(2))
	$(1)/bin/pip install --quiet $(2) --no-build-isolation -e ".[hf,megatron,examples,compare,test,lint]"
	$(1)/bin/pip install --quiet $(2) --no-build-isolation --no-deps fairscale timm
endef

# $(call freeze,FOLDER): what is installed, without `+cpu`: a lock holds for every build of torch.
freeze = $(1)/bin/pip freeze --all --exclude ds_lena | sed 's/+.*//'

$(VENV)/installed: setup.py Makefile $(LOCK)
	$(call everything,$(VENV),--constraint $(LOCK))
	touch $@

ALLOWED = allowed: $(LOCKED), for example by make PYTHON=python$(lastword $(LOCKED))
$(LOCK):
	$(error PYTHON=$(PYTHON) is Python $(or $(MINOR),?), which has no lock; $(ALLOWED))

# The newest versions that setup.py allows, but for torch: `make test-newest TORCH=torch` takes its newest too.
newest:
	rm -rf $(NEWEST)
	$(call everything,$(NEWEST))

test-newest: $(LOCK) newest
	@echo "Other than in $(LOCK):"
	@$(call freeze,$(NEWEST)) | diff $(LOCK) - | grep '^[<>] [^#]' || echo "nothing"
	$(IN) $(NEWEST) python -m pytest

# A release that breaks something is kept out by setup.py's ranges.
lock: newest
	@echo "# Made by make lock: the newest versions of the day that setup.py allows." > $(LOCK)
	$(call freeze,$(NEWEST)) >> $(LOCK)

# Nothing is installed but what the lock says, and what a CUDA build of torch brings for itself.
lock-check: $(VENV)/installed
	@! $(call freeze,$(VENV)) | grep -vxFf $(LOCK) | grep -v '^nvidia-\|^cuda-\|^triton=' \
		|| { echo "lock-check: the above is installed and not in $(LOCK); run make lock" >&2; false; }

# The wheel as a user has it: installed with DeepSpeed and nothing else, started in another folder than the repo.
wheel-check: $(LOCK)
	rm -rf $(BARE) build
	$(call base,$(BARE),--constraint $(LOCK))
	$(BARE)/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build .
	rm -rf ds_lena.egg-info  # else Python takes it for this environment's, when it is run here
	$(BARE)/bin/pip install --quiet --constraint $(LOCK) --no-build-isolation "$$(echo build/*.whl)[deepspeed]"
	cd / && PYTHONPATH= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(abspath $(IN)) $(abspath $(BARE)) \
		deepspeed --num_gpus 2 --num_nodes 1 --master_port $${MASTER_PORT:-29519} \
		$(abspath .ci/wheel_check.py) $(abspath configs/zero2.json)

demo: $(VENV)/installed
	$(RUN) bash examples/demo.sh

demo-quick: $(VENV)/installed
	DEMO_QUICK=1 $(RUN) bash examples/demo.sh

test: $(VENV)/installed
	$(RUN) python -m pytest

test-all: $(VENV)/installed
	$(RUN) python -m pytest -m "full or not full"

# Random configurations and loops: exact, or refused by name. It can be interrupted, and goes on where it was.
fuzz: $(VENV)/installed
	$(RUN) python -m tests.fuzz

# Kills ranks of real runs at random, and starts the runs again. It can be interrupted, and goes on where it was.
faults: $(VENV)/installed
	$(RUN) python -m tests.faults

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

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

# docs/keys.md and docs/support.md, from the tables in the code.
docs: $(VENV)/installed
	$(RUN) python docs/generate.py

clean:
	rm -rf $(VENV) $(NEWEST) $(BARE) build outputs
