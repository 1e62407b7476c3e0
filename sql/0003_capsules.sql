-- Capsules: what was asked for, where it runs, what is known of it.

create table capsules (
    id text primary key check (id ~ '^cl-[0-9a-z]{25}$'),
    team_id text not null references teams (id),
    -- Null once its host was deleted.
    host_id text references hosts (id) on delete set null,
    status text not null default 'pending' check (status in ('pending', 'starting', 'running', 'pausing',
        'paused', 'resuming', 'snapshotting', 'hibernated', 'stopping', 'stopped', 'missing', 'error')),
    template text not null check (template ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$'),
    vcpus integer not null check (vcpus between 1 and 64),
    memory_mb integer not null check (memory_mb between 128 and 1048576),
    -- 0 for the template's own size.
    disk_size_mb integer not null default 0 check (disk_size_mb between 0 and 16777216),
    disk_used_mb integer not null default 0 check (disk_used_mb >= 0),
    -- Idle seconds until it is paused; 0 for never.
    timeout_sec integer not null default 0 check (timeout_sec between 0 and 31536000),
    guest_ip text not null default '',
    host_ip text not null default '',
    -- Labels by the user, and the versions that the host reports.
    metadata jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
    -- Why it is in state error or missing; for a person.
    failure text check (length(failure) <= 2000),
    -- The user or key that asked for it.
    created_by text not null,
    created_at timestamptz not null default now(),
    started_at timestamptz,
    last_active_at timestamptz,
    last_updated timestamptz not null default now()
);

create index capsules_team on capsules (team_id, created_at desc) where status <> 'stopped';
-- What takes room on a host: the scheduler sums it, the reconciler compares it.
create index capsules_host on capsules (host_id) where status not in ('stopped', 'error', 'missing');
