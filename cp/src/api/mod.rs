//! The handlers, one file a resource, and the routing table.
