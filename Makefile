# Two commands set everything up from nothing: `make ask` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RAY := build/ray-venv

NATIVE := $(wildcard kernels/native/*.cpp kernels/native/*.h) kernels/native/build.py

FUZZ_SECONDS ?= 1200
# Processes that share the tests: one per core, and at most four, since each holds a model.
TEST_PROCESSES ?= -n auto --maxprocesses 4 --dist worksteal
# CI repeats a failed test, since its machine may stall for seconds; the summary lists each repetition.
TEST_RERUNS ?= $(if $(CI),--reruns 2)
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_EMULATOR ?= qemu-aarch64 -L /usr/aarch64-linux-gnu
ARM_CPUS ?= max cortex-a72

.PHONY: ask browser native test test-slow test-gpu test-ray test-ray-quick test-arm sanitize fuzz lint docs llama-cpp clean

ask: native
	$(BIN)/python -m afnext.bench.ask_demo

# Compiles the CPU's kernels beside their sources; without a compiler it says so and the CPU runs on torch.
native: build/native/.built

build/native/.built: $(INSTALLED) $(NATIVE)
	$(BIN)/python setup.py -q build_ext --inplace
	mkdir -p build/native && touch $@

# Threads that wait do not spin: the suite starts many processes, and often shares its cores with others.
test test-slow test-gpu test-ray test-ray-quick test-arm sanitize fuzz: export OMP_WAIT_POLICY = passive

test: native
	$(BIN)/python -m pytest -m "not slow" $(TEST_PROCESSES) $(TEST_RERUNS)

test-slow: native
	$(BIN)/python -m pytest -m slow

test-gpu: native
	$(BIN)/python -m pytest -m gpu

# The fleet's tests on a Ray cluster of this machine. Ray has an environment of its own, which adds it to the other one.
test-ray: native $(RAY)/.installed
	$(RAY)/bin/python -m pytest -p no:cacheprovider tests/fleet

# Without what takes minutes: one fleet is started, and no batch.
test-ray-quick: native $(RAY)/.installed
	$(RAY)/bin/python -m pytest -p no:cacheprovider -m "not slow" $(TEST_RERUNS) tests/fleet

$(RAY)/.installed: $(INSTALLED)
	rm -rf $(RAY) && $(PYTHON) -m venv $(RAY)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> "$$($(RAY)/bin/python -c 'import site; print(site.getsitepackages()[0])')/afnext.pth"
	$(RAY)/bin/pip install -q -c constraints.txt "ray[serve]>=2.60"
	touch $@

# The native kernels of ARM, in an emulator: of a CPU with every extension, and of one without any.
test-arm: native
	@for tool in $(ARM_CXX) $(firstword $(ARM_EMULATOR)); do command -v $$tool >/dev/null || \
		{ echo "$$tool is missing: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	CXX="$(ARM_CXX)" $(BIN)/python kernels/native/build.py build/arm build/arm/objects
	$(ARM_CXX) -std=c++17 -O1 -Wall tests/support/arm_runner.cpp -ldl -o build/arm/arm_runner
	for cpu in $(ARM_CPUS); do \
		AFNEXT_ARM=build/arm AFNEXT_ARM_EMULATOR="$(ARM_EMULATOR) -cpu $$cpu" PYTHONPATH=tests \
			$(BIN)/python -m pytest -p support.arm_emulation -m "not slow" -k native- $(TEST_PROCESSES) $(TEST_RERUNS) \
			tests/kernels || exit 1; \
	done

# The native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer. Python itself leaks at exit.
sanitize: $(INSTALLED)
	$(BIN)/python kernels/native/build.py build/sanitize build/sanitize/objects --sanitize
	LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 AFNEXT_NATIVE=build/sanitize \
		$(BIN)/python -m pytest -m "not slow" -k native -p no:cacheprovider tests/kernels

# Every module of tests/fuzz in turn, FUZZ_SECONDS in all; what it finds goes to build/fuzz.
fuzz: native
	$(BIN)/python tests/fuzz --seconds $(FUZZ_SECONDS)

# What the browser's tests need beside Python packages. Where nobody may install it, they skip and say why.
browser:
	@if command -v chromium >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; \
	else echo "chromium is not installed, the browser's tests will skip: apt-get install chromium"; fi

# mypy sees the checkout as the packages that it becomes: `afnext` with its floors inside, and `training`.
TYPES := build/types
FLOORS := kernels quant runtime bench serve

.PHONY: $(TYPES)
$(TYPES):
	rm -rf $(TYPES) && mkdir -p $(TYPES)/afnext
	ln -s $(addprefix $(CURDIR)/,$(wildcard afnext/*.py) afnext/py.typed $(FLOORS)) $(TYPES)/afnext/
	ln -s $(CURDIR)/training $(TYPES)/

lint: $(INSTALLED) $(TYPES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror kernels/native/*.cpp kernels/native/*.h
	MYPYPATH=$(TYPES) $(BIN)/mypy --cache-dir .mypy_cache -p afnext -p training

# The site of README and docs, in build/site. A broken link or reference is an error.
docs: $(INSTALLED) $(TYPES)
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/python -m mkdocs build --strict

# llama.cpp compiled for this machine, ten minutes of a core; docs/benchmarks.md says how to use it.
# gcc takes _tile_loadconfig to read 8 of its 64 bytes and drops the rest of the configuration unless it escapes.
llama-cpp: build/llama.cpp/bin/libmtmd.so

build/llama.cpp/bin/libmtmd.so: | $(INSTALLED)
	rm -rf build/llama.cpp && mkdir -p build/llama.cpp/source
	$(BIN)/pip download -q --no-deps --no-binary xllamacpp -c constraints.txt -d build/llama.cpp xllamacpp
	tar -xf build/llama.cpp/xllamacpp-*.tar.gz -C build/llama.cpp/source --strip-components 1
	sed -i 's/^ *_tile_loadconfig(&tc);/asm volatile("" : : "r"(\&tc) : "memory");&/' \
		build/llama.cpp/source/thirdparty/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp
	cmake -S build/llama.cpp/source/thirdparty/llama.cpp -B build/llama.cpp -DCMAKE_BUILD_TYPE=Release \
		-DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF \
		-DLLAMA_OPENSSL=OFF
	cmake --build build/llama.cpp --target mtmd

clean:
	rm -rf $(VENV) build *.egg-info kernels/native/*.so

# Asking for the exact torch first lets pip take a locally provided build of it before any dependency asks for another.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade-strategy only-if-needed -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e ".[test,bench,serve,lint]"
	touch $(INSTALLED)
