"""The command `encode`: memory images to a stream."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remus_ckpt.cli.options import (
    AsJson,
    ForXen,
    HvmContext,
    Overwrite,
    app,
    codec_for,
    dialect_of,
    keep_apart,
    keep_what_is_there,
    print_json,
    start_of,
    tidying_up,
)
from remus_ckpt.cli.terminal import complain, progress
from remus_ckpt.errors import RemusError
from remus_ckpt.limits import MAX_BUFFER_PAGES
from remus_ckpt.wire.xen.chunks import MAX_P2M_SIZE
from remus_ckpt.wire.xen.dialect import StreamCodec

if TYPE_CHECKING:
    from remus_ckpt.codec.reference import Reference


@app.command(short_help="Make a stream from memory images.")
def encode(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Memory images, one per checkpoint.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Where to write the stream; - for standard output.")
    ],
    codec: Annotated[
        StreamCodec | None, typer.Option(help="How to encode changed pages. [default: delta; rle with --for xen]")
    ] = None,
    buffer_pages: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            min=1,
            max=MAX_BUFFER_PAGES,
            help="Pages to compress at a time. [default: 8196; 8192 for rle]",
        ),
    ] = None,
    reference_pages: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            min=1,
            max=MAX_P2M_SIZE,
            help="Keep only the N most recently used pages as reference. [default: all]",
        ),
    ] = None,
    word: Annotated[int, typer.Option(metavar="BYTES", help="Word size of the toolstack: 8 or 4 bytes.")] = 8,
    sparse_diffs: Annotated[
        bool,
        typer.Option(
            "--sparse-diffs",
            help="All images but the first are sparse diffs, like Firecracker's: data is memory that changed, a "
            "hole is memory that did not.",
        ),
    ] = False,
    for_: ForXen = None,
    hvm_context: HvmContext = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make a stream from a series of memory images. Each image is compared with the one before to find dirty pages.

    The images are read piece by piece and their holes are skipped: about 150 MB of memory suffice for images of any
    size. The images must not change meanwhile.

    With --sparse-diffs, each page that a diff has data for is in its checkpoint, so `restore --sparse-diff-from` gives
    the same diff back. Copy such files with tools that preserve holes: cp does, scp does not.

    Examples: remus-ckpt encode monday.img tuesday.img -o week.remus;
    remus-ckpt encode mem diff1 diff2 --sparse-diffs -o vm.remus
    """
    from remus_ckpt.codec.reference import Lru
    from remus_ckpt.image import Image, ImageReference, Layers, differences, full_batches, written
    from remus_ckpt.pages import PAGE_SIZE, pages_for
    from remus_ckpt.relay.output import output_to
    from remus_ckpt.sender import Sender
    from remus_ckpt.walk import print_checkpoints

    dialect_of(word, None, None)
    codec = codec_for(for_, codec)
    keep_apart(output, *images)
    keep_what_is_there(overwrite, output)
    sizes = []
    for path in images:
        with Image(path) as image:
            sizes.append(image.size)
    pages = max(pages_for(size) for size in sizes)
    if not pages:
        raise typer.BadParameter("the images are empty")
    padded = [size if pages_for(size) == pages else max(sizes) for size in sizes]
    for path, size, whole in zip(images, sizes, padded, strict=True):
        if sparse_diffs and size != sizes[0]:
            raise RemusError(f"{path}: {size} bytes, and {images[0]} has {sizes[0]}: it is not a diff over that image")
        if whole != size:
            complain(f"{path}: {size} bytes; padded with zeros to {whole}")
    held = ImageReference()
    reference: Reference = Lru(reference_pages) if reference_pages else held
    start = start_of(for_, hvm_context, output, is_only=len(images) == 1)
    sender = Sender(pages, codec=codec, word=word, buffer_pages=buffer_pages, reference=reference, shape=start)  # type: ignore[arg-type]
    listed = []
    with ExitStack() as stack:
        stack.enter_context(tidying_up())
        stream = stack.enter_context(output_to(output))
        advance = stack.enter_context(progress(stream.name, pages * PAGE_SIZE * len(images), as_json))
        for number, path in enumerate(images):
            image = stack.enter_context(Image(path))
            begin = stream.written

            def done(page: int, base: int = number * pages) -> None:
                advance((base + page) * PAGE_SIZE)

            below = held.before
            if isinstance(below, Layers):
                scan = full_batches(written(image, pages, done))
            else:
                scan = full_batches(differences(image, below, pages, done))
            for group in sender.checkpoint(scan, memory_bytes=padded[number]):
                sender.carried.clear()  # nothing is sent again here, and the list would grow with the image
                stream.write(group)
            sent = sender.sent
            assert sent is not None
            image.check(sizes[number])
            if below is not None:
                below.check()
            if isinstance(below, Layers):
                below.lay(image)
            else:
                held.before = Layers(image) if sparse_diffs else image
                if below is not None:
                    below.close()
            listed.append(
                {"image": str(path), "epoch": sent.epoch, "start": begin, "end": stream.written}
                | {"pages": sent.pages, "entries": sent.entries, "batches": sent.batches}
                | {"compressed_chunks": sent.compressed_chunks, "compressed_bytes": sent.compressed_bytes}
            )
            done(pages)
    report = {"stream": output, "codec": codec, "p2m_size": sender.p2m_size, "checkpoints": listed}
    if output == "-":
        return
    if as_json:
        print_json(report)
    else:
        print_checkpoints(listed, False)
