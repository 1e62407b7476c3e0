# The offline build and its audit; included by the top Makefile.
#
# A release is the same bytes wherever it is built: every path that could reach a binary is
# replaced (the last matching prefix wins, so the longer ones come last), and crates carry the same
# name whether they come from the registry cache or from vendor/.
CARGO_HOME_DIR := $(or $(CARGO_HOME),$(HOME)/.cargo)
RELEASE_RUSTFLAGS = --remap-path-prefix=$(CURDIR)=/wrenn \
	--remap-path-prefix=$(abspath $(TARGET_DIR))=/target \
	--remap-path-prefix=$(CURDIR)/vendor=/crates \
	$(foreach source,$(wildcard $(CARGO_HOME_DIR)/registry/src/*),--remap-path-prefix=$(source)=/crates)
RELEASE_ENV = CARGO_INCREMENTAL=0 SOURCE_DATE_EPOCH=0 LC_ALL=C TZ=UTC RUSTFLAGS="$(RELEASE_RUSTFLAGS)"

VENDOR_CHECK = $(TARGET_DIR)/release/vendor-check
SHIPPED := wrenn-cp wrenn-agent envd vendor-check
# A build from vendor/ alone: a Cargo home of its own, so that no cache can help, and no network.
OFFLINE_HOME = $(abspath $(TARGET_DIR))/offline-home
OFFLINE_CARGO = CARGO_HOME=$(OFFLINE_HOME) $(CARGO) --config vendor-check/offline.toml
NO_NETWORK := unshare $(if $(filter 0,$(shell id -u)),,--map-root-user) --net
# The time in SBOMs: that of the last commit, or the epoch where there is no repository.
SBOM_TIME = $(or $(shell TZ=UTC git log -1 --date=format-local:%Y-%m-%dT%H:%M:%SZ --format=%cd 2>/dev/null),1970-01-01T00:00:00Z)

# $(call build-release,CARGO,OPTIONS): each program by a command of its own, for built together each
# would get the features that the others ask for.
define build-release
$(RELEASE_ENV) $(1) build --release $(2) -j$(JOBS) -p vendor-check
$(RELEASE_ENV) $(1) build --release $(2) -j$(JOBS) -p wrenn-cp
$(RELEASE_ENV) $(1) build --release $(2) -j$(JOBS) -p wrenn-agent
$(RELEASE_ENV) RUSTFLAGS="$(RELEASE_RUSTFLAGS) $(ENVD_RUSTFLAGS)" \
	$(1) build --release $(2) -j$(JOBS) -p envd --features freestanding --target $(ENVD_TARGET)
endef
RELEASE_BINARIES = $(addprefix $(TARGET_DIR)/release/,wrenn-cp wrenn-agent vendor-check) \
	$(TARGET_DIR)/$(ENVD_TARGET)/release/envd

# $(call embed-dependencies,BINARY,OUT): a copy of a program with its list of crates inside.
embed-dependencies = $(VENDOR_CHECK) embed $(1) $(2) >/dev/null

# From Cargo's cache, else from vendor/, else from the network.
$(VENDOR_CHECK): $(wildcard vendor-check/src/*.rs vendor-check/src/*/*.rs) vendor-check/Cargo.toml
	@$(RELEASE_ENV) $(CARGO) build --release --locked --offline -j$(JOBS) -p vendor-check 2>/dev/null \
		|| { test -d vendor && $(RELEASE_ENV) $(OFFLINE_CARGO) build --release --frozen --offline -j$(JOBS) -p vendor-check; } \
		|| $(RELEASE_ENV) $(CARGO) build --release --locked -j$(JOBS) -p vendor-check
	@touch $@

.PHONY: vendor
vendor: $(VENDOR_CHECK) ## fetch the crates: archives to dist/crates/, sources to vendor/
	$(CARGO) fetch --locked
	$(VENDOR_CHECK) vendor --from $(CARGO_HOME_DIR)/registry/cache
	@touch dist/vendored

# Once for each Cargo.lock; what somebody changes in vendor/ afterwards stays, and is found.
dist/vendored: Cargo.lock
	@$(MAKE) --no-print-directory vendor

.PHONY: build-offline
build-offline: $(VENDOR_CHECK) dist/vendored ## build everything from vendor/ with the network off
	@mkdir -p $(OFFLINE_HOME)
	$(NO_NETWORK) $(MAKE) --no-print-directory build-offline-inside

# The same bytes are audited and built: the check comes first, by the program that is here already.
.PHONY: build-offline-inside
build-offline-inside:
	$(VENDOR_CHECK) verify --cargo-home $(OFFLINE_HOME)
	$(call build-release,$(OFFLINE_CARGO),--frozen --offline)

.PHONY: vendor-check
vendor-check: $(VENDOR_CHECK) dist/vendored ## audit crates, policy, licences, advisories; and the programs in builds/
	$(VENDOR_CHECK) check --cargo-home $(OFFLINE_HOME)
	@for program in $(SHIPPED); do if test -e $(BUILDS)/$$program; then $(VENDOR_CHECK) binary $(BUILDS)/$$program || exit; fi; done

# Where no snapshot of advisories is at hand (it is data of others, and not part of the source), the one
# failure may be that there is none: anything else has a lower code, or shows in the programs' lists.
ADVISORIES_MISSING := 80
.PHONY: vendor-check-ci
vendor-check-ci: $(VENDOR_CHECK) dist/vendored ## the same; without a snapshot of advisories it says loudly that it skipped them
	@status=0; $(VENDOR_CHECK) check --cargo-home $(OFFLINE_HOME) || status=$$?; \
	if [ $$status = $(ADVISORIES_MISSING) ] && [ ! -e vendor-check/advisories.json ]; then \
		echo 'SKIPPED: advisories: there is no vendor-check/advisories.json; vendor-check/README.md says how to make one'; \
	elif [ $$status != 0 ]; then exit $$status; fi
	@for program in $(SHIPPED); do if test -e $(BUILDS)/$$program; then $(VENDOR_CHECK) binary $(BUILDS)/$$program || exit; fi; done

.PHONY: sbom
sbom: $(VENDOR_CHECK) dist/vendored ## bills of materials and NOTICE, in dist/
	@mkdir -p dist/sbom
	$(VENDOR_CHECK) sbom dist/sbom --binaries $(BUILDS) --created $(SBOM_TIME)
	$(VENDOR_CHECK) notice dist/NOTICE

.PHONY: reproducible
reproducible: build ## build once more, offline, in another directory, and compare with builds/ byte for byte
	@CARGO='$(CARGO)' JOBS=$(JOBS) vendor-check/reproducible.sh

# The other of the two builds, in its own tree.
.PHONY: reproducible-build
reproducible-build: build-offline
	@mkdir -p $(BUILDS)
	@for program in $(RELEASE_BINARIES); do \
		$(VENDOR_CHECK) embed $$program $(BUILDS)/$${program##*/} || exit; done

# make release KEY=FILE VERSION=X: everything that an operator gets, with its signed manifest.
RELEASE := dist/release
.PHONY: release
release: rootfs sbom ## programs, images, SBOMs, sources and signed manifest (KEY=FILE VERSION=X)
	@test -n "$(KEY)" -a -n "$(VERSION)" || { echo 'say make release KEY=FILE VERSION=X; the key is 32 bytes or more, mode 0600' >&2; exit 1; }
	rm -rf $(RELEASE) && mkdir -p $(RELEASE)/guest
	cp $(addprefix $(BUILDS)/,$(SHIPPED)) dist/NOTICE LICENSE $(RELEASE)/
	cp -r dist/sbom $(RELEASE)/
	cp -rL $(GUEST)/kernels $(GUEST)/images $(RELEASE)/guest/
	vendor-check/toolchain.sh >$(RELEASE)/toolchain.txt
	git archive --format=tar --prefix=wrenn/ HEAD >$(RELEASE)/wrenn-source.tar
	tar -r -f $(RELEASE)/wrenn-source.tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner \
		--transform 's,^,wrenn/,' vendor dist/crates dist/vendored $(wildcard vendor-check/advisories.json)
	$(VENDOR_CHECK) release-manifest $(RELEASE) --key "$(KEY)" --release "$(VERSION)" --inputs $(RELEASE)
	$(VENDOR_CHECK) verify-release $(RELEASE) --key "$(KEY)"
