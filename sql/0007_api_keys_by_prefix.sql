-- A client of the wire protocol may name its key by the visible prefix.
create index api_keys_prefix on api_keys (key_prefix);
