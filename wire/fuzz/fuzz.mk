# `make fuzz`: each target of the wire crate and of envd for FUZZ_SECONDS, from the small corpora in the
# repository. It needs a nightly toolchain; cargo-fuzz is installed when it is missing.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS := $(addprefix wire/,frame message handshake session) \
	$(addprefix envd/,accounts documents tables ring)

.PHONY: fuzz
fuzz: ## fuzz the wire protocol and envd's parsers, FUZZ_SECONDS (60) a target
	@cargo fuzz --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-fuzz
	@for path in $(FUZZ_TARGETS); do crate=$${path%/*} target=$${path##*/}; \
		mkdir -p $$crate/fuzz/artifacts/found-$$target; \
		(cd $$crate && cargo +nightly fuzz run $$target fuzz/artifacts/found-$$target fuzz/corpus/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -max_len=4096 -print_final_stats=1) || exit; \
	done
