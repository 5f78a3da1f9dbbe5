# Two commands set everything up from nothing: `make ask` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

NATIVE := $(wildcard kernels/native/*.cpp kernels/native/*.h) kernels/native/build.py

.PHONY: ask native test test-slow test-gpu sanitize lint llama-cpp clean

ask: native
	$(BIN)/python -m afnext.bench.ask_demo

# Compiles the CPU's kernels beside their sources; without a compiler it says so and the CPU runs on torch.
native: build/native/.built

build/native/.built: $(INSTALLED) $(NATIVE)
	$(BIN)/python setup.py -q build_ext --inplace
	mkdir -p build/native && touch $@

# Threads that wait do not spin: the suite starts many processes, and often shares its cores with others.
test test-slow test-gpu sanitize: export OMP_WAIT_POLICY = passive

test: native
	$(BIN)/python -m pytest -m "not slow"

test-slow: native
	$(BIN)/python -m pytest -m slow

test-gpu: native
	$(BIN)/python -m pytest -m gpu

# The native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer. Python itself leaks at exit.
sanitize: $(INSTALLED)
	$(BIN)/python kernels/native/build.py build/sanitize build/sanitize/objects --sanitize
	LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 AFNEXT_NATIVE=build/sanitize \
		$(BIN)/python -m pytest -m "not slow" -k native -p no:cacheprovider tests/kernels

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lint build/lib* && $(BIN)/pip install -q --no-deps --target build/lint .
	cd build/lint && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p afnext

# llama.cpp compiled for this machine, ten minutes of a core; docs/benchmarks.md says how the bench is told to use it.
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
	$(BIN)/pip install -q -c constraints.txt -e ".[test,bench,lint]"
	touch $(INSTALLED)
