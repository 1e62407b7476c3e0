-- Who did what, when, with what outcome. Rows are never changed. The ids are plain text on purpose:
-- an entry outlives what it speaks of.

create table audit_log (
    id text primary key check (id ~ '^log-[0-9a-z]{25}$'),
    created_at timestamptz not null default now(),
    team_id text,
    actor_type text not null check (actor_type in ('user', 'api_key', 'host', 'system')),
    actor_id text not null,
    actor_name text not null default '',
    action text not null check (action ~ '^[a-z_]+(\.[a-z_]+)*$'),
    outcome text not null check (outcome in ('success', 'failure')),
    resource_type text not null,
    resource_id text not null,
    metadata jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
    failure text
);

create index audit_log_team on audit_log (team_id, created_at desc);
create index audit_log_time on audit_log (created_at desc);
