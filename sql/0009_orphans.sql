-- Capsules that hosts tell of and that are on no record, and since when: they are destroyed after a while.

create table orphans (
    host_id text not null references hosts (id) on delete cascade,
    -- As the host tells it.
    capsule_id text not null,
    since timestamptz not null default now(),
    primary key (host_id, capsule_id)
);
