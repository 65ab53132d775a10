"""The power-loss test: see `__main__`."""
