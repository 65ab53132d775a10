"""A process that maps a file and does what its standard input says: a line of Python each, answered by a line.

    python mapping_process.py FILE

`area` is a shared mapping of the file, a memoryview; `file` is open on it.
"""

import mmap
import os
import sys

file = os.open(sys.argv[1], os.O_RDWR)
size = os.fstat(file).st_size
mappings = {"area": mmap.mmap(file, size)}
area = mappings["area"]
print("ready", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
