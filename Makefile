# make test       environment, build, every test
# make bench      environment, build, bench/compare.py
# make examples   the experiments with their default settings, and the README's plots
# make fuzz       COUNT=100000 random programs through grl_ext and through plain PyTorch
# make asan       the C++ built with AddressSanitizer and UndefinedBehaviorSanitizer, and its CPU tests
# make cuda-check the CUDA build compiled, linked, imported and tested on the CPU, with the oldest supported torch; needs nvcc, no GPU
#
# make PYTHON=python3 VENV= ...  uses the environment of that Python as it is and downloads nothing.

PYTHON ?= python3
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
CUDA_HOME ?= $(firstword $(wildcard /usr/local/cuda) $(lastword $(sort $(wildcard /usr/local/cuda-*))))

TORCH = torch==2.13.0
OLDEST_TORCH = torch==2.11.0
BUILD_TOOLS = 'setuptools>=77' wheel ninja pybind11 numpy
TEST_TOOLS = pytest hypothesis expecttest scikit-learn matplotlib tqdm pillow mypy basedpyright
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

.PHONY: env build test bench examples fuzz asan cuda-check clean
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

COUNT ?= 10000
fuzz: build
	OMP_NUM_THREADS=1 $(RUN) tests/fuzz/fuzz.py --count $(COUNT)
	OMP_NUM_THREADS=1 $(RUN) tests/fuzz/fuzz.py --count $(COUNT) --path fallback

# The sanitizers' build is a copy of its own. Python and torch are not built with them: libasan goes first by LD_PRELOAD, leaks are
# theirs, and torch's own exceptions cross the border before libasan knows libstdc++, hence the latter in the preload too.
ASAN_TESTS = test_gradient_reversal.py test_grl_linear.py test_in_place_backward.py test_errors.py test_gradients_of_gradients.py \
  test_adversarial_heads.py test_linear_heads.py test_heads_*.py test_kept_memory.py fuzz/test_fuzz.py
ASAN_FLAGS = -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined
asan: env
	rm -rf build/asan && mkdir -p build/asan && cp -r setup.py pyproject.toml README.md LICENSE csrc grl_ext tests build/asan/
	rm -f build/asan/grl_ext/*.so
	cd build/asan && CFLAGS="$(ASAN_FLAGS)" LDFLAGS="-fsanitize=address,undefined" GRL_EXT_BUILD=cpu $(PY) setup.py --quiet build_ext --inplace
	cd build/asan/tests && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 GRL_EXT_REQUIRE_COMPILED=1 PYTHONPATH=$(CURDIR)/build/asan \
	  $(PY) -m pytest -q -p no:cacheprovider $(ASAN_TESTS)

# The tests run from their own folder, so that they see the installed package and not the source tree. Those of the examples and
# the benchmark do not depend on the build.
cuda-check:
	test -e $(CUDA_VENV)/.ready || { $(PYTHON) -m venv $(CUDA_VENV) && \
	  $(CUDA_VENV)/bin/python -m pip install --quiet $(OLDEST_TORCH) $(BUILD_TOOLS) $(TEST_TOOLS) && touch $(CUDA_VENV)/.ready; }
	GRL_EXT_BUILD=cuda $(CUDA_VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	cd tests && ../$(CUDA_VENV)/bin/python -m grl_ext
	cd tests && GRL_EXT_REQUIRE_COMPILED=1 ../$(CUDA_VENV)/bin/python -m pytest -q --ignore-glob='*example*' --ignore=test_bench.py \
	  --ignore=test_cuda_on_cpu.py

clean:
	rm -rf build dist *.egg-info grl_ext/*.so $(VENV) $(CUDA_VENV)
