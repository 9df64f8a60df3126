# make demo: environment, install, Japanese text through generate().  make test: the whole suite.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# a file's tests in one process, so that its models, servers and compiled kernels are made once; tests/conftest.py orders the files
SUITE = -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test coverage lint docs audit pythons gpu-test sanitize oldest clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

# with COVERAGE=1 also how much of t5_trt/ ran in it: below the floor in pyproject.toml it fails
test: $(VENV)/installed
	$(BIN)/python $(SUITE) $(if $(COVERAGE),--cov --cov-report=term:skip-covered)

coverage:
	$(MAKE) test COVERAGE=1

# types for the oldest and the newest Python: what a version between them lacks, one of them lacks too
lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --python-version 3.10
	$(BIN)/mypy --python-version 3.13
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

# warnings are errors
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

# licences and known vulnerabilities of what the library depends on
audit: $(VENV)/installed
	$(BIN)/python -m audit.licences
	$(BIN)/python -m audit.advisories

# what needs no torch, on every other supported Python that is here
pythons: $(VENV)/installed
	$(BIN)/python -m audit.pythons

# on a machine with TensorRT and an NVIDIA GPU
gpu-test: $(VENV)/installed
	$(BIN)/python -m pytest -q -m gpu tests/gpu

# memory errors and races of the kernels, on a machine with an NVIDIA GPU and CUDA's compute-sanitizer
sanitize: $(VENV)/installed
	$(BIN)/python -m benchmarks.sanitize --out build/sanitize

# the suite on the oldest supported versions, in an environment of its own. Left out is what does not depend on the versions of
# Transformers and ONNX Runtime: tools, the command's errors, packaging, documents, stores of files, HTTP around generate(), what is
# compiled or built for GPUs and the sessions over it (graphs are compared, and the 77 sets of arguments run on stand-ins, in tests
# that stay)
NOT_FOR_OLDEST = tests/audit tests/benchmarks tests/kernels tests/serving/http tests/serving/test_serving_ends.py tests/cli/test_serve.py \
    $(addprefix tests/engine/test_,faults.py rtx_build.py store.py) tests/examples/test_ray.py tests/examples/test_ray_serve.py tests/examples/test_triton.py \
    $(addprefix tests/test_,benchmarks.py documents.py imports.py install.py other_systems.py package.py release.py structure.py) \
    $(addprefix tests/runtime/test_,buffers.py cuda_*.py encoder_forms.py idle_gpu.py kernel_*.py row_positions.py torch_layers.py) \
    $(addprefix tests/runtime/test_,captured_engines.py engine_checks.py step_by_kernels.py trt_session.py) tests/tools/test_bench.py \
    $(addprefix tests/cli/test_,build_and_cache.py failures.py) tests/serving/test_serving_by_kernels.py
oldest: .venv-oldest/installed
	.venv-oldest/bin/python $(SUITE) $(NOT_FOR_OLDEST:%=--ignore-glob '%')

# starts as a copy of $(VENV), made of links: only what differs is fetched and unpacked (pip replaces files, it never writes into them)
.venv-oldest/installed: $(VENV)/installed constraints-oldest.txt
	rm -rf .venv-oldest
	$(PYTHON) -m venv --without-pip .venv-oldest
	cp --archive --link $(VENV)/lib/. .venv-oldest/lib/
	.venv-oldest/bin/python -m pip install --quiet --no-compile --constraint constraints-oldest.txt --editable ".[dev]"
	touch $@

# pip compiles nothing, which would take two thirds of its time, with one core: what is imported is compiled then
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-python3.* dist
