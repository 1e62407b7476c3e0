# `make fuzz`: each target of the wire crate for FUZZ_SECONDS, from the small corpus in the repository. It
# needs a nightly toolchain; cargo-fuzz is installed when it is missing.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS := frame message handshake session

.PHONY: fuzz
fuzz: ## fuzz the wire protocol, FUZZ_SECONDS (60) a target
	@cargo fuzz --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-fuzz
	@for target in $(FUZZ_TARGETS); do \
		mkdir -p wire/fuzz/artifacts/found-$$target; \
		(cd wire && cargo +nightly fuzz run $$target fuzz/artifacts/found-$$target fuzz/corpus/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -max_len=4096 -print_final_stats=1); \
	done
