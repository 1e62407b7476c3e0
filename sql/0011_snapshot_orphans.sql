-- Snapshots that hosts tell of and that are on no record, and since when: they are deleted after a while.

create table snapshot_orphans (
    host_id text not null references hosts (id) on delete cascade,
    -- As the host tells it.
    host_name text not null,
    since timestamptz not null default now(),
    primary key (host_id, host_name)
);
