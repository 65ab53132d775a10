"""The command `mount`: every checkpoint of a history as read-only files."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.text import Text

from remus_ckpt.cli.options import MaxMemory, app
from remus_ckpt.cli.store import HistoryName, is_address, open_history
from remus_ckpt.cli.terminal import complain, out
from remus_ckpt.errors import RemusError

if TYPE_CHECKING:
    from remus_ckpt.store.tree import File, Tree

T = TypeVar("T")
_SIGNALLED = 8
"""What libfuse returns if its loop was ended from outside."""
_NEEDED = (
    "mounting needs the Python package mfusepy and libfuse: pip install 'remus_ckpt[mount]', and "
    "`apt install fuse3` (Debian, Ubuntu) or `dnf install fuse3` (Fedora)"
)


@app.command(short_help="Mount a store's checkpoints as read-only files.")
def mount(
    store: HistoryName,
    mountpoint: Annotated[Path, typer.Argument(metavar="MOUNTPOINT", help="An empty directory; made if missing.")],
    allow_other: Annotated[
        bool, typer.Option("--allow-other", help="Let other users read too, as far as the files' modes allow.")
    ] = False,
    max_memory: MaxMemory = 64,
) -> None:
    """Show every checkpoint of a store as files, until Ctrl-C, SIGTERM or `fusermount -u MOUNTPOINT`.

    by-epoch/1200/memory is the memory of checkpoint 1200, by-epoch/1200/arrays/NAME an array; newest and by-time/TIME
    lead to them. Nothing is restored: pages are read and checked when something looks at them. A running backup is not
    disturbed, and its new checkpoints appear. Data that was damaged on disk gives an I/O error, and a message here.
    `cmp /mnt/orders/by-epoch/{1200,1201}/memory` compares two of them.

    Example: remus-ckpt mount store:/var/lib/remus/orders /mnt/orders
    """
    if is_address(store):
        raise typer.BadParameter("only a store on this machine can be mounted: run this where the backup is")
    history = open_history(store, None, False, max_memory)
    fuse = _fuse()
    from remus_ckpt.store.tree import Tree

    made = not mountpoint.exists()
    mountpoint.mkdir(parents=True, exist_ok=True)
    if any(mountpoint.iterdir()):
        raise RemusError(f"{mountpoint} is not empty: its files would be hidden; choose an empty directory")
    tree = Tree(history)
    out.print(Text(f"{store} is mounted on {mountpoint}; Ctrl-C or `fusermount -u {mountpoint}` unmounts it"))
    try:
        fuse.FUSE(
            _operations(fuse, tree),
            os.fspath(mountpoint),
            foreground=True,
            nothreads=True,
            ro=True,
            fsname=store.replace(",", "\\,"),
            subtype="remus",
            kernel_cache=True,
            **({"allow_other": True} if allow_other else {}),
        )
    except RuntimeError as error:
        if error.args[:1] == (_SIGNALLED,):
            return  # by a signal, after which it has unmounted
        raise RemusError(
            f"cannot mount on {mountpoint} (libfuse: {error}): check that /dev/fuse exists and that you may use it"
        ) from error
    finally:
        tree.close()
        if made and not os.path.ismount(mountpoint):
            mountpoint.rmdir()


def _fuse() -> Any:
    """The module mfusepy. Raises RemusError with what to install."""
    logging.getLogger("fuse").setLevel(logging.ERROR)
    try:
        import mfusepy
    except (ImportError, OSError, AttributeError) as error:
        raise RemusError(f"{_NEEDED} ({error})") from error
    return mfusepy


def _operations(fuse: Any, tree: Tree) -> Any:
    """What libfuse calls."""
    from remus_ckpt.store.tree import error_number

    files: dict[int, File] = {}
    started_ns = time.time_ns()
    said: set[str] = set()

    def trying(work: Callable[[], T]) -> T:
        try:
            return work()
        except (OSError, RemusError) as error:
            if isinstance(error, RemusError) and (text := str(error)) not in said and len(said) < 1_000:
                said.add(text)
                complain(text)
            raise fuse.FuseOSError(error_number(error)) from None

    def parts(path: str) -> tuple[str, ...]:
        return tuple(part for part in path.split("/") if part)

    class _Operations(fuse.Operations):  # type: ignore[misc]
        use_ns = True

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            node = trying(lambda: tree.node(parts(path)))
            at_ns = started_ns if node.time_ns is None else node.time_ns
            times = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), at_ns)
            owner = {"st_uid": os.getuid(), "st_gid": os.getgid()}
            return {"st_mode": node.mode, "st_size": node.size, "st_nlink": 1, **times, **owner}

        def readdir(self, path: str, fh: int) -> Iterator[str]:
            return iter([".", "..", *trying(lambda: list(tree.names(parts(path))))])

        def readlink(self, path: str) -> str:
            return trying(lambda: tree.target(parts(path)))

        def open(self, path: str, flags: int) -> int:
            file = trying(lambda: tree.file(parts(path)))
            files[number := max(files, default=0) + 1] = file
            return number

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            return trying(lambda: files[fh].read(offset, size))

        def release(self, path: str, fh: int) -> int:
            files.pop(fh, None)
            return 0

    return _Operations()
