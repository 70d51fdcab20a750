# make demo   environment, then a sweep on handwritten digits
# make test   environment, then the tests; make test-slow: those with a browser, killed servers and sweeps
# make test-faults   trainings killed, stopped and resumed in every way: many minutes
# make test-cluster  the shipped clusters on hosts made of namespaces; as root, some minutes
# make ui     MLflow on the runs (PORT=5001 for another port)
# make cluster-ui   MLflow's and Ray's pages of a running cluster (CLUSTER=cluster/on-prem.yaml for that one)
# make lint   format, lint and types, as CI does

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 5000
CLUSTER ?= ray_cluster.yaml

.PHONY: demo test test-slow test-faults test-cluster lint ui cluster-ui clean

demo: $(VENV)/train.stamp
	$(BIN)/python workflows/tune.py --data digits

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not faults and not cluster"

test-slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 12 -m slow

test-faults: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m faults

test-cluster: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 6 -m cluster

lint: $(VENV)/test.stamp
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

ui: $(VENV)/train.stamp
	$(BIN)/python -m workflows.ui --port $(PORT)

cluster-ui: $(VENV)/cluster.stamp
	$(BIN)/ray exec $(CLUSTER) --port-forward 5000 --port-forward 8265 'echo "MLflow: http://127.0.0.1:5000   Ray: \
	http://127.0.0.1:8265, which asks for what ray get-auth-token prints. Ctrl-C ends it."; sleep infinity'

clean:
	rm -rf $(VENV)

# One environment in two sizes. A changed dependency makes it anew, so that nothing stale stays in it.
$(VENV)/python.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; give a newer one: make PYTHON=python3.12 ..."; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	@echo "Making $(VENV): 5 GB of packages, some minutes on the first time"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/train.stamp: $(VENV)/python.stamp
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[train]'
	@touch $@

$(VENV)/cluster.stamp: $(VENV)/python.stamp
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[train,cluster]'
	@touch $@ $(VENV)/train.stamp

$(VENV)/test.stamp: $(VENV)/python.stamp
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/train.stamp $(VENV)/cluster.stamp
