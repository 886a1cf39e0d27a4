# `make demo` and `make test` need nothing but make: tools/bootstrap finds or installs the rest.
.DELETE_ON_ERROR:
.PHONY: demo demo-restore test check lint pytest reliability dist generate api clean

VENV := .venv
PY := $(VENV)/bin/python
# A virtual environment knows where it was made. The stamp's name carries the place, so that a copied or moved checkout
# gets one of its own instead of quietly running the original's code.
STAMP := $(VENV)/installed-$(shell pwd | cksum | cut -d' ' -f1)
PUBLIC := pagenet pagenet.errors pagenet.control pagenet.dirty pagenet.qemu pagenet.testing
C_FILES := $(wildcard native/*.[ch] native/testing/*.[ch] tools/guest/*.[ch] examples/*.c)
BUILT_FROM := pyproject.toml setup.py $(wildcard native/*.[ch] native/*.py native/testing/*.[ch])

demo: $(STAMP)
	$(PY) tools/demo.py $(DEMOARGS)

# Guests restored out of a real S3 server.
demo-restore: $(STAMP)
	$(PY) tools/demo_restore.py $(DEMOARGS)

# Everything, in parts, several at a time; or, in one piece, what TESTARGS says.
test: lint pytest

pytest: $(STAMP)
	sh tools/bootstrap $(VENV) --tests
	$(if $(TESTARGS),$(PY) -m pytest $(TESTARGS),$(PY) tools/test $(PARTS))

# The figures of docs/reliability.md: make reliability ARGS="--faults 1000 --transfers 100 --rdma 40"
reliability: $(STAMP)
	sh tools/bootstrap $(VENV) --tests
	$(PY) tools/reliability.py $(ARGS)

# What takes no root and no other process: within a minute or two.
check: lint
	$(PY) -m pytest -q tests/unit

lint: $(STAMP)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(VENV)/bin/clang-format --dry-run --Werror $(C_FILES)
	$(PY) -m mypy

dist: $(STAMP)
	$(PY) -m build --outdir dist

# Manual pages and completion, after a change of options.
generate: $(STAMP)
	$(PY) tools/generate

# The API reference, from the docstrings: build/api/pagenet.html
api: $(STAMP)
	$(PY) -m pdoc --docformat restructuredtext --output-directory build/api $(PUBLIC)

$(STAMP): $(BUILT_FROM) tools/bootstrap
	test -e $@ || rm -rf $(VENV)
	test -x $(PY) || sh tools/bootstrap $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info pagenet/*.so pagenet/*/*.so pagenet/*/*/*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find pagenet native tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
