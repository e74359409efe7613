# `make demo` and `make test` need python3 (3.11 or newer) and make; everything else goes into .venv, once.

PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/uv pip

.PHONY: demo install test test-slow test-gpu test-monkey bench lint lock dist system-packages clean

demo: .venv/run.stamp
	$(BIN)/gapstream demo

install: .venv/run.stamp

test: .venv/test.stamp system-packages
	$(BIN)/pytest

test-slow: .venv/test.stamp system-packages
	$(BIN)/pytest -n 0 -m slow

# Fails without a GPU, and where no test is found.
test-gpu: .venv/test.stamp
	$(BIN)/pytest -m gpu tests/gpu

# For long: make test-monkey KILLS=1000 BROKERS=100 FAULTS=5000 RECORDS=1000000 IMAGES=100000 SEED=7
test-monkey: .venv/test.stamp system-packages
	$(BIN)/python -m tests.monkey --seed $(or $(SEED),1) $(if $(KILLS),--kills $(KILLS)) $(if $(BROKERS),--brokers $(BROKERS)) \
	    $(if $(FAULTS),--faults $(FAULTS)) $(if $(RECORDS),--records $(RECORDS)) $(if $(IMAGES),--images $(IMAGES))

# Writes the table of tests/bench/README.md: make bench ONLY=growth,export DATA=folder-of-archives
bench: .venv/test.stamp
	$(BIN)/python -m tests.bench $(if $(ONLY),--only $(ONLY)) $(if $(DATA),--data $(DATA))

lint: .venv/test.stamp
	$(BIN)/ruff check
	$(BIN)/mypy

# Pins everything pyproject.toml asks for, on every platform.
lock: .venv/pip.stamp
	$(UV) compile -q --upgrade --universal --no-header --no-annotate --group test -o constraints.txt pyproject.toml

# What another machine needs to install this version: the wheel, the versions that were tested, units and an example of
# the configuration. What an earlier build left is removed first, since setuptools packs all that lies in build/lib.
dist: .venv/pip.stamp
	rm -rf build/lib build/bdist.* build/dist
	mkdir -p build/dist
	$(BIN)/pip wheel -q --no-deps -w build/dist .
	cp -r constraints.txt deploy/systemd deploy/gapstream.example.toml build/dist
	ls build/dist

.venv/pip.stamp:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("gapstream needs Python 3.11 or newer, got %d.%d; name another one: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q uv || echo "uv cannot be had here; pip does its work, only slower"
	touch $@

.venv/run.stamp: .venv/pip.stamp pyproject.toml constraints.txt
	@echo "Installing gapstream and what it needs into .venv (torch is large; minutes, once)"
	if [ -x $(BIN)/uv ]; then $(UV) install --python $(BIN)/python -c constraints.txt -e .; \
	else $(BIN)/pip install -c constraints.txt -e .; fi
	@echo "Tracing the bundled model, once (a minute)"
	@($(TRACE)) || echo "the bundled model could not be traced; the first release will take longer"
	@rm -rf build/traced
	touch $@

# Learns two images of each class, which leaves the towers untouched, and twenty, which adapts them, and throws the results
# away: what is left are the traced graphs of both forms, in the user's cache.
# Without the variables of whoever installs, which may name another model or stream.
TRACE = for images in 2 20; do rm -rf build/traced; \
    env -i PATH="$$PATH" HOME="$$HOME" XDG_CACHE_HOME="$$XDG_CACHE_HOME" $(BIN)/gapstream run --set state.path=build/traced \
    --set source.archive.per_class=$$images --set source.archive.classes_per_task=10 --set evaluation.holdout_fraction=0 \
    --set http.enabled=false --set agent.log_level=WARNING || exit 1; done

.venv/test.stamp: .venv/run.stamp
	if [ -x $(BIN)/uv ]; then $(UV) install --python $(BIN)/python -c constraints.txt --group test; \
	else $(BIN)/pip install -c constraints.txt --group test; fi
	touch $@

# Tests of the status page, the alert rules and Kafka want these programs and skip without them, saying so. Where CI is
# set and we may, they are installed.
system-packages:
	@if [ -n "$$CI" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  for pair in chromium:chromium promtool:prometheus java:openjdk-17-jre-headless mvn:maven; do \
	    command -v "$${pair%%:*}" >/dev/null || wanted="$$wanted $${pair#*:}"; done; \
	  [ -z "$$wanted" ] || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$wanted; }; \
	fi

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache *.egg-info
