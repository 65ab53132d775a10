"""Many names on many hosts: the commit log, on an engine that others keep (specs/fleet.md)."""
