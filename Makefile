# make test       environment, build, every test
# make bench      environment, build, bench/compare.py
# make examples   the experiments with their default settings, and the README's plots
# make cuda-check the CUDA build compiled, linked, imported and tested on the CPU, with the oldest supported torch; needs nvcc, no GPU
# make gpu        everything that needs a GPU, in under 25 minutes: bench/gpu.py; DRY=1 checks its command lines without one
#
# make PYTHON=python3 VENV= ...  uses the environment of that Python as it is and downloads nothing.

PYTHON ?= python3
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
CUDA_HOME ?= $(firstword $(wildcard /usr/local/cuda) $(lastword $(sort $(wildcard /usr/local/cuda-*))))

TORCH = torch==2.13.0
OLDEST_TORCH = torch==2.11.0
BUILD_TOOLS = 'setuptools>=77' wheel ninja pybind11 numpy
TEST_TOOLS = pytest hypothesis expecttest scikit-learn matplotlib tqdm pillow
# pytorch-adapt's layer alone: its full requirements include torchvision, which the layer does not need.
PEERS = pytorch-revgrad pytorch-adapt==0.0.83 pytorch-metric-learning==2.9.0 torchmetrics==1.9.0 lightning-utilities==0.15.3

export CUDA_HOME
export MPLBACKEND = Agg

ifeq ($(VENV),)
PY = $(PYTHON)
READY =
else
PY = $(CURDIR)/$(VENV)/bin/python
READY = $(VENV)/.ready
endif
RUN = PYTHONPATH=$(CURDIR) $(PY)

.PHONY: env build test bench examples cuda-check gpu clean
.DELETE_ON_ERROR:

env: $(READY)

$(VENV)/.ready: Makefile
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(TORCH) $(BUILD_TOOLS) $(TEST_TOOLS)
	$(VENV)/bin/python -m pip install --quiet --no-deps $(PEERS)
	touch $@

build: env
	$(PY) setup.py --quiet build_ext --inplace

test: build
	GRL_EXT_REQUIRE_COMPILED=1 $(RUN) -m pytest

bench: build
	$(RUN) bench/compare.py

examples: build
	for name in moons pair_digits dann_digits market; do $(RUN) examples/$$name.py --out examples/results/$$name || exit 1; done

# The tests run from their own folder, so that they see the installed package and not the source tree. Those of the examples and
# the benchmark do not depend on the build.
cuda-check:
	test -e $(CUDA_VENV)/.ready || { $(PYTHON) -m venv $(CUDA_VENV) && \
	  $(CUDA_VENV)/bin/python -m pip install --quiet $(OLDEST_TORCH) $(BUILD_TOOLS) $(TEST_TOOLS) && touch $(CUDA_VENV)/.ready; }
	GRL_EXT_BUILD=cuda $(CUDA_VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	cd tests && ../$(CUDA_VENV)/bin/python -m grl_ext
	cd tests && GRL_EXT_REQUIRE_COMPILED=1 GRL_EXT_REQUIRE_CUDA_CODE=1 ../$(CUDA_VENV)/bin/python -m pytest -q --ignore-glob='*example*' --ignore=test_bench.py \
	  --ignore=test_cuda_on_cpu.py

gpu: env
	$(RUN) bench/gpu.py $(if $(DRY),--dry)

clean:
	rm -rf build dist *.egg-info grl_ext/*.so $(VENV) $(CUDA_VENV)
