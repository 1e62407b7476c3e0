-- A host need not tell how large it is. One that does not gets no capsules.

alter table hosts drop constraint hosts_check1;
alter table hosts add constraint hosts_address_known check (status = 'pending' or address is not null);
