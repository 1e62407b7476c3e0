-- Since when a change of what a capsule may reach is under way: one at a time, as each is made for what holds.

alter table capsules add column network_changing_since timestamptz;
