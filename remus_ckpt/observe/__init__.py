"""What a running primary or backup says of itself. It keeps no truth: nothing that decides is read from here."""
