"""Primary and backup: the two services, and their parts."""
