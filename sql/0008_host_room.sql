-- What a host said last that it has left for a further capsule, in MiB; null before it said so.
alter table hosts
    add column memory_left_mb bigint,
    add column disk_left_mb bigint;
