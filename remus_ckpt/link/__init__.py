"""Connections between two sides: addresses, TLS, and one session from its hello to its end."""
