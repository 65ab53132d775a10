"""The kill test: see `__main__`."""
