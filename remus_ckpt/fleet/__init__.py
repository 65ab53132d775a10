"""Many names on many hosts, and the commit log, on NATS JetStream (specs/fleet.md)."""
