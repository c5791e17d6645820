# otpgate: every command a developer needs. `make` alone lists them.

CARGO ?= cargo

.PHONY: help demo test chaos check build fmt fuzz bench bench-check bench-store
.DEFAULT_GOAL := help

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 14

demo: ## build, start a gate in front of a small upstream, send real calls (ONCE=1: end after them)
	@tests/tools/install build
	$(CARGO) build --locked
	@target/debug/otpgate demo $(if $(ONCE),--once)

test: ## install what tests need and run all of them
	@tests/tools/install test
	@tests/tools/venv
	$(CARGO) test --locked

# One group alone: make chaos CHAOS=outages. Gates that hold an index: make chaos HOLD=index
CHAOS ?=
HOLD ?= all
chaos: ## stores in trouble under steady load, at length; what callers saw goes to target/chaos.md
	@tests/tools/install test
	@mkdir -p target
	@printf '%s\n' '| scenario | what callers saw | how long | wrongly accepted |' '|---|---|---|---|' \
	    >target/chaos.md
	OTPGATE_CHAOS=1 OTPGATE_CHAOS_HOLD=$(HOLD) $(CARGO) test --locked --test integration chaos::$(CHAOS) -- --include-ignored --test-threads=1

check: ## format, lints, docs, shipped configurations and alerts, dependencies
	@tests/tools/install build
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) clippy --locked --lib --no-default-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items --quiet
	$(CARGO) run --locked --quiet -- check --config config/otpgate.toml
	@if command -v promtool >/dev/null 2>&1; then \
	    cd deploy/prometheus && promtool check config prometheus.yaml && promtool test rules alerts_test.yaml; \
	else echo "promtool is not installed: alerts not checked"; fi
	@if command -v cargo-deny >/dev/null 2>&1; then $(CARGO) deny --locked --config .deny.toml check; \
	else echo "cargo-deny is not installed: dependencies not checked against advisories"; fi

build: ## the release binary: target/release/otpgate
	@tests/tools/install build
	$(CARGO) build --locked --release

fmt: ## format the code
	$(CARGO) fmt

# Without a sanitizer, so that the stable toolchain will do: all that is fuzzed is safe Rust.
FUZZ_SECONDS ?= 20
FUZZ_TARGETS ?= $$($(FUZZ) list)
FUZZ = PATH="$(CURDIR)/target/tools/bin:$$PATH" $(CARGO) fuzz
# What is found goes to target/corpus, so that fuzz/corpus stays a choice of seeds.
fuzz: ## run fuzz targets for a while (FUZZ_SECONDS=20 for each, FUZZ_TARGETS="path log": these alone)
	@tests/tools/install fuzz
	@test -x target/tools/bin/cargo-fuzz || \
	    $(CARGO) install cargo-fuzz@0.13.2 --locked --root target/tools
	$(FUZZ) build --sanitizer none
	@set -e; for target in $(FUZZ_TARGETS); do \
	    mkdir -p target/corpus/$$target; \
	    $(FUZZ) run --sanitizer none $$target target/corpus/$$target fuzz/corpus/$$target -- \
	        -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -print_final_stats=1; \
	done

# One arm alone, briefly: make bench BENCH="--arms otpgate --scenarios keep-alive --rounds 1"; all: BENCH=--help
BENCH ?=
bench: ## the gate beside bare pingora, nginx, HAProxy and Caddy, on a quiet machine; tables go to target/bench.md
	@tests/tools/install build
	@tests/tools/install bench
	$(CARGO) bench --locked --bench e2e -- $(BENCH)

# ACCEPT=1 makes what is counted now the figures to compare with.
bench-check: ## instructions and allocations of a request, compared with benches/counts.json
	@tests/tools/install build
	@tests/tools/install bench
	$(CARGO) bench --locked --bench counts -- $(if $(ACCEPT),--accept)

# Ten million take about ten minutes and 9 GB: make bench-store SIZES="10000 1000000 10000000"
SIZES ?=
bench-store: ## followers' latency, look-ups and memory at 10,000 and 1,000,000 entries (SIZES="..." for others)
	@tests/tools/install test
	$(CARGO) bench --locked --bench store -- $(SIZES)
