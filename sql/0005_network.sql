-- What a capsule may reach of the internet: who may be reached, how much, and the changes of that.

alter table capsules
    -- {"allow_internet", "allow", "deny", "limits"}; what is not there is false, empty or 0.
    add column network jsonb not null default '{}' check (jsonb_typeof(network) = 'object'),
    -- How many changes were begun, and the last one that the host is known to have made. A host refuses a
    -- change that comes after a later one.
    add column network_revision bigint not null default 0,
    add column network_applied bigint not null default 0;
