"""What a running primary or backup reports about itself. No decision depends on it."""
