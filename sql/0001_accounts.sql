-- Accounts, teams and their keys. Secrets are kept as hashes or verifiers only.
--
-- Every id is 128 random bits in base 36 behind a prefix that says what it names; the checks keep an
-- id of one kind from landing in a column of another.

create table users (
    id text primary key check (id ~ '^usr-[0-9a-z]{25}$'),
    email text not null check (email = lower(email) and length(email) between 3 and 254 and email like '_%@_%'),
    name text not null check (length(name) <= 100),
    -- pbkdf2-sha256$<rounds>$<salt>$<hash>; null for an account that has no password.
    password text check (password like 'pbkdf2-sha256$%$%$%'),
    is_admin boolean not null default false,
    status text not null default 'active' check (status in ('inactive', 'active', 'disabled', 'deleted')),
    -- Tokens issued before this second are void.
    tokens_valid_from timestamptz not null default now(),
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    deleted_at timestamptz,
    check ((status = 'deleted') = (deleted_at is not null))
);

-- An address is free again once its account is deleted. The pattern operator class serves the search
-- for addresses that start with something.
create unique index users_email on users (email text_pattern_ops) where status <> 'deleted';

create table teams (
    id text primary key check (id ~ '^team-[0-9a-z]{25}$'),
    name text not null check (length(name) between 1 and 128),
    -- Never given to another team, also when this one is deleted.
    slug text not null unique check (slug ~ '^[0-9a-f]{6}-[0-9a-f]{6}$'),
    created_at timestamptz not null default now(),
    deleted_at timestamptz
);

create table team_members (
    team_id text not null references teams (id) on delete cascade,
    user_id text not null references users (id) on delete cascade,
    role text not null check (role in ('owner', 'admin', 'member')),
    joined_at timestamptz not null default now(),
    primary key (team_id, user_id)
);

create index team_members_user on team_members (user_id, joined_at);
create unique index team_members_one_owner on team_members (team_id) where role = 'owner';

create table api_keys (
    id text primary key check (id ~ '^key-[0-9a-z]{25}$'),
    team_id text not null references teams (id) on delete cascade,
    name text not null check (length(name) between 1 and 100),
    -- SHA-256 of the key, which is 128 random bits: there is no dictionary to slow down.
    key_hash bytea not null unique check (octet_length(key_hash) = 32),
    -- What people recognise it by.
    key_prefix text not null,
    -- SCRAM-SHA-256 verifier for clients of the wire protocol.
    wire_verifier text not null check (wire_verifier like 'SCRAM-SHA-256$%'),
    created_by text references users (id) on delete set null,
    created_at timestamptz not null default now(),
    last_used timestamptz
);

create index api_keys_team on api_keys (team_id, created_at);
