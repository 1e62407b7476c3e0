-- Hosts and the credentials by which they come and stay.

create table hosts (
    id text primary key check (id ~ '^host-[0-9a-z]{25}$'),
    type text not null check (type in ('regular', 'byoc')),
    -- A host that a team brought serves that team only; the others serve everyone.
    team_id text references teams (id) on delete cascade,
    provider text check (length(provider) between 1 and 64),
    availability_zone text check (length(availability_zone) between 1 and 64),
    -- Known from registration on.
    arch text check (length(arch) between 1 and 32),
    cpu_cores integer check (cpu_cores between 1 and 65536),
    memory_mb integer check (memory_mb between 1 and 1073741824),
    disk_gb integer check (disk_gb between 0 and 1073741824),
    -- ip:port of the agent.
    address text check (length(address) between 3 and 64),
    -- A host that is silent is reported as unreachable from its last heartbeat, without a stored state.
    status text not null default 'pending' check (status in ('pending', 'online', 'offline', 'draining')),
    last_heartbeat_at timestamptz,
    -- Base templates that the host said it has.
    templates text[] not null default '{}',
    -- When its capsules were last compared with this database; several control planes share the work.
    reconciled_at timestamptz,
    -- Counts registrations and refreshes; host tokens name the number that they were issued under.
    token_generation integer not null default 0,
    created_by text references users (id) on delete set null,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    check ((type = 'byoc') = (team_id is not null)),
    check (status = 'pending' or (address is not null and cpu_cores is not null and memory_mb is not null))
);

create index hosts_team on hosts (team_id) where team_id is not null;
create index hosts_online on hosts (last_heartbeat_at) where status = 'online';

create table host_tags (
    host_id text not null references hosts (id) on delete cascade,
    tag text not null check (tag ~ '^[A-Za-z0-9][A-Za-z0-9._:/=-]{0,63}$'),
    primary key (host_id, tag)
);

-- One registration token a host: a new one replaces the old. Used ones are deleted.
create table host_registration_tokens (
    id text primary key check (id ~ '^htok-[0-9a-z]{25}$'),
    host_id text not null unique references hosts (id) on delete cascade,
    token_hash bytea not null unique check (octet_length(token_hash) = 32),
    created_by text references users (id) on delete set null,
    created_at timestamptz not null default now(),
    expires_at timestamptz not null
);

-- One refresh token a host, replaced at each use.
create table host_refresh_tokens (
    id text primary key check (id ~ '^hrt-[0-9a-z]{25}$'),
    host_id text not null unique references hosts (id) on delete cascade,
    token_hash bytea not null unique check (octet_length(token_hash) = 32),
    created_at timestamptz not null default now(),
    expires_at timestamptz not null
);
