"""The fault test: see `__main__`."""
