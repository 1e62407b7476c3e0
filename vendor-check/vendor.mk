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
