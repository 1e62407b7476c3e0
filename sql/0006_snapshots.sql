-- Named snapshots: running capsules written down on their host, from which others start there.

create table snapshots (
    team_id text not null references teams (id),
    name text not null check (name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$'),
    -- What the host calls it: names of different teams may be the same.
    host_name text not null unique check (host_name ~ '^snap-[0-9a-z]{25}$'),
    host_id text not null references hosts (id) on delete cascade,
    vcpus integer not null,
    memory_mb integer not null,
    disk_size_mb integer not null,
    size_bytes bigint not null,
    -- The user or key that asked for it.
    created_by text not null,
    created_at timestamptz not null default now(),
    primary key (team_id, name)
);

create index snapshots_host on snapshots (host_id);
