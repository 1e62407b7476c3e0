# Wrenn. `make help` lists the targets; on a fresh Debian 12 machine with Rust, `make demo` and
# `make test` are all there is to know.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

BUILDS := builds
GUEST := $(BUILDS)/guest
JOBS ?= 2
CARGO := cargo
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)

# envd runs in guests of any distribution, so it is static; it needs no C library at all.
ENVD_TARGET := x86_64-unknown-linux-gnu
ENVD_RUSTFLAGS := -C target-feature=+crt-static -C relocation-model=static -C link-arg=-nostartfiles

include vendor-check/vendor.mk
include wire/fuzz/fuzz.mk

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: prerequisites
prerequisites: ## install the Debian packages that are missing
	@rootfs/install-prerequisites.sh

.PHONY: build
build: prerequisites $(VENDOR_CHECK) dist/vendored ## the programs, in builds/
	@mkdir -p $(BUILDS)
	$(call build-release,$(CARGO),--locked)
	@$(foreach binary,$(RELEASE_BINARIES),$(call install-binary,$(binary));)
	@if readelf -lW $(BUILDS)/envd | grep -q INTERP; then echo "builds/envd is not static" >&2; exit 1; fi

# With its list of crates inside; replaced by rename, so that a program that runs is never written to,
# and only when it differs.
define install-binary
$(call embed-dependencies,$(1),$(BUILDS)/$(notdir $(1)).new) && if cmp -s $(BUILDS)/$(notdir $(1)).new $(BUILDS)/$(notdir $(1)); then rm $(BUILDS)/$(notdir $(1)).new; else mv $(BUILDS)/$(notdir $(1)).new $(BUILDS)/$(notdir $(1)); fi
endef

.PHONY: rootfs
rootfs: build ## kernel, initramfs and the minimal image, in builds/guest/
	@rootfs/build.sh

STACK = $(CARGO) run --quiet --locked -j$(JOBS) -p wrenn-tests --bin stack --

.PHONY: demo
demo: rootfs ## boot a real VM, run a command in it, take everything down again
	@$(STACK) demo

.PHONY: dev
dev: rootfs ## start PostgreSQL and the control plane, and leave them running
	@$(STACK) up

.PHONY: dev-agent
dev-agent: ## register this machine there and start the host agent
	@$(STACK) agent

.PHONY: exec
exec: ## run CMD='…' in a capsule there
	@$(STACK) exec '$(CMD)'

.PHONY: dev-down
dev-down: ## stop what dev and dev-agent started, remove its state
	@$(STACK) down

.PHONY: migrate-up
migrate-up: build ## bring the database of DATABASE_URL (or .env) up to date
	@$(BUILDS)/wrenn-cp migrate

.PHONY: test
test: rootfs ## all tests, those with real VMs included
	@tests/run-all.sh

.PHONY: check
check: ## formatting and lints; no warning passes
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -j$(JOBS) -- -D warnings

.PHONY: bench
bench: rootfs ## the figures, each as a ratio to its floor
	@tests/bench.sh

.PHONY: clean
clean: ## remove everything that was built
	rm -rf $(BUILDS) $(TARGET_DIR)
