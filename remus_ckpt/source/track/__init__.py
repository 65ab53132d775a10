"""Finding the written pages without reading memory: the kernel notes the first write to each page.

`linux` has the numbers of system calls and structures, `written` arms address ranges and asks for what was written in
them, `spans` says which pages of memory these are. `foreign` gets the userfaultfd of another process, which runs on
unmodified; `context` names what that needs of a machine, and `x86_64` and `arm64` have it; `seccomp` predicts whether
that process's filters allow the calls; `mapped` follows a file that other processes have mapped.

What the kernel notes is a write through one page table. It does not see writes through another mapping of the same
memory, by a forked child, by `pwrite` on the file, holes that are punched into it (fallocate, MADV_REMOVE), or what
devices put into memory that they were given before.
"""
