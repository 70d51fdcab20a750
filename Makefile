# make demo          create the environment, then sweep over handwritten digits
# make test-quick    create the environment, then run the tests that take no training: a minute
# make test          create the environment, then run all tests but those below
# make coverage      the same, and show the lines that no test ran, in any process
# make test-slow     run tests that use a browser or kill servers and sweeps
# make test-faults   kill, stop and resume trainings and sweeps in many ways; two hours or more
# make test-cluster  start both shipped clusters on simulated hosts (Linux namespaces); needs root
# make ui            show the runs in MLflow (PORT=5001 for another port)
# make cluster-ui    open MLflow and Ray's dashboard on a running cluster (CLUSTER=cluster/on-prem.yaml)
# make bench         compare ours with its peers, into benchmarks/results; BENCH="heart deployment" for single ones
# make docs          build the documentation into docs/_build; errors in it are errors
# make doctor        report on this installation, for a bug report
# make docs-outputs  run the commands of the documentation, and write what they print into it; half an hour
# make docs-pictures make its pictures again, from the runs of make docs-outputs
# make notebook      execute the notebook of examples/ again; four minutes
# make javascript    install the packages of javascript/, check its types and pack it; needs Node.js with npm
# make page          make a web page that draws samples, into build/page (MODEL=sampler.onnx, PAGE=folder, WEBGPU=no)
# make lint          check format, lint and types, as CI does
# make clean         remove the environment and the packages of javascript/
# TORCH=cpu makes an environment without CUDA's packages, 3.4 GB less, if pip's index has PyTorch's CPU wheels, or
# PIP_EXTRA_INDEX_URL names one that has. The other commands then keep it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The build of PyTorch: cuda or cpu; an environment that exists keeps its own.
TORCH ?= $(if $(wildcard $(VENV)/torch-cpu.stamp),cpu,cuda)
ifneq ($(filter-out cpu cuda,$(TORCH)),)
$(error TORCH=$(TORCH): give cpu or cuda)
endif
PINS := $(VENV)/constraints.txt
PIN_cuda := p
PIN_cpu := s/^(torch|torchvision)={2,3}([0-9.]+)$$/\1===\2+cpu/p; t; p
PORT ?= 5000
CLUSTER ?= ray_cluster.yaml

.PHONY: demo bench test test-quick coverage test-slow test-faults test-cluster lint doctor docs docs-outputs \
	docs-pictures javascript page notebook ui cluster-ui clean

demo: $(VENV)/train.stamp
	$(BIN)/python workflows/tune.py --data digits

# Names of benchmarks, and a folder of MNIST's images where they cannot be downloaded.
BENCH ?=
MNIST ?=

bench: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks.run $(BENCH) $(if $(MNIST),--mnist $(MNIST))

# tests/conftest.py has the order. Three processes keep two cores busy: many tests wait for others to start. Those
# that use Ray run in one of them, which starts it once.
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder
NOT_SLOW := not slow and not faults and not cluster

test: $(VENV)/test.stamp
	$(PYTEST) -n 3 --dist loadgroup -m "$(NOT_SLOW)"

test-quick: $(VENV)/test.stamp
	$(PYTEST) -n 2 -m "$(NOT_SLOW) and not long"

# Python starts coverage in every process that sees these variables.
coverage: export COVERAGE_PROCESS_START := $(CURDIR)/pyproject.toml
coverage: export COVERAGE_FILE := $(CURDIR)/.coverage/data
coverage: $(VENV)/test.stamp
	rm -rf .coverage && mkdir .coverage
	$(PYTEST) -n 3 --dist loadgroup -m "$(NOT_SLOW)"
	COVERAGE_PROCESS_START= $(BIN)/coverage combine --quiet
	COVERAGE_PROCESS_START= $(BIN)/coverage report

test-slow: $(VENV)/test.stamp
	$(PYTEST) -n 2 --durations 12 -m slow

test-faults: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m faults

test-cluster: $(VENV)/test.stamp
	$(PYTEST) -n 2 --durations 6 -m cluster

lint: $(VENV)/test.stamp
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

# As it is: without an environment the report is on Python itself, and says what is not installed.
doctor:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m workflows.doctor

docs: $(VENV)/docs.stamp
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

# Where the commands of the documentation run; make docs-pictures takes its pictures from there.
DOCS_RUNS ?= docs/_build/runs

docs-outputs: $(VENV)/test.stamp
	$(BIN)/python -m docs.run_blocks --folder $(DOCS_RUNS)

docs-pictures: $(VENV)/test.stamp
	$(BIN)/python -m docs.pictures --folder $(DOCS_RUNS)

# The champion of the newest sweep, unless another file is given.
MODEL ?= $(firstword $(shell ls -t runs/*/champion/sampler.onnx 2>/dev/null))
PAGE ?= build/page
WEBGPU ?= yes
NODE_PACKAGES := javascript/node_modules/.package-lock.json

javascript: $(NODE_PACKAGES)
	cd javascript && npm pack --silent

page: $(NODE_PACKAGES)
	@test -n "$(MODEL)" || \
	  { echo "error: runs/ has no champion; run make demo first, or give a file: make page MODEL=sampler.onnx"; exit 2; }
	@node javascript/page/build.js "$(MODEL)" "$(PAGE)" $(if $(filter no,$(WEBGPU)),--without-webgpu)
	@echo "to see it: python3 -m http.server --directory $(PAGE), then open http://localhost:8000"

notebook: $(VENV)/docs.stamp
	$(BIN)/jupyter execute --inplace --timeout 1800 examples/*.ipynb

ui: $(VENV)/train.stamp
	$(BIN)/python -m workflows.ui --port $(PORT)

cluster-ui: $(VENV)/cluster.stamp
	$(BIN)/ray exec $(CLUSTER) --port-forward 5000 --port-forward 8265 'echo "MLflow: http://127.0.0.1:5000   Ray: \
	http://127.0.0.1:8265 (its token: ray get-auth-token). Press Ctrl-C to stop."; sleep infinity'

clean:
	rm -rf $(VENV) javascript/node_modules

$(NODE_PACKAGES): javascript/package.json javascript/package-lock.json
	@command -v npm > /dev/null || { echo "error: npm is missing; on Debian: apt-get install nodejs npm"; exit 2; }
	cd javascript && npm ci --ignore-scripts  # that of onnxruntime-node would download CUDA's libraries
	@touch $@

# One environment with extras installed on demand. A changed dependency recreates it, so nothing stale remains.
$(VENV)/torch-$(TORCH).stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; give a newer one: make PYTHON=python3.12 ..."; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	@echo "Creating $(VENV): $(if $(filter cpu,$(TORCH)),2,5) GB of packages, a few minutes the first time"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# PyTorch's builds for CPUs have versions of their own.
$(PINS): $(VENV)/torch-$(TORCH).stamp
	@sed -nE '$(PIN_$(TORCH))' constraints.txt > $@

$(VENV)/train.stamp: $(PINS)
	$(BIN)/python -m pip install --disable-pip-version-check -c $(PINS) -e '.[train]'
	@touch $@

$(VENV)/cluster.stamp: $(PINS)
	$(BIN)/python -m pip install --disable-pip-version-check -c $(PINS) -e '.[train,cluster]'
	@touch $@ $(VENV)/train.stamp

$(VENV)/docs.stamp: $(PINS)
	$(BIN)/python -m pip install --disable-pip-version-check -c $(PINS) -e '.[docs]'
	@touch $@ $(VENV)/train.stamp

$(VENV)/bench.stamp: $(PINS)
	$(BIN)/python -m pip install --disable-pip-version-check -c $(PINS) -e '.[bench]'
	@touch $@ $(VENV)/train.stamp

$(VENV)/test.stamp: $(PINS)
	$(BIN)/python -m pip install --disable-pip-version-check -c $(PINS) -e '.[test]'
	@touch $@ $(VENV)/train.stamp $(VENV)/cluster.stamp $(VENV)/bench.stamp
