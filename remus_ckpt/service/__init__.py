"""Primary and backup: checkpoints that survive the death of the machine that made them."""
