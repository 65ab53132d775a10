"""Primary and backup: the two services, and what carries them."""
