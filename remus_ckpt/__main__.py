"""`python -m remus_ckpt` is the command `remus-ckpt`."""

from remus_ckpt.cli import main

main()
