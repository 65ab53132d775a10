#!/usr/bin/env python3
"""Build what a release consists of, and try it: python tools/wheels.py DIRECTORY [--once] [--no-demo]

    pip install 'remus_ckpt[wheels]'

It exports the commit that is checked out and builds its source archive, and from that a wheel each for manylinux and
musllinux on x86-64 and aarch64: Zig's compiler, which the extra brings along, builds for all of them on any machine.
Everything is built twice, in different folders, and compared (--once: only once). auditwheel checks that a wheel needs
nothing that its tag does not promise, abi3audit that it is for every Python from 3.11 on. Then the wheel for this
machine is tried, and the list of its parts is made (SBOM, CycloneDX). DIRECTORY gets all of it, and SHA256SUMS.

On another machine, or in a container, this tries what was built, and needs nothing but Python and pip:

    python3 wheels.py DIRECTORY --try

To try a wheel is to let pip choose one from DIRECTORY, install it into a new environment in which nothing can be
compiled, and run the demo there (--no-demo: only the check of the kernels).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {
    "manylinux_2_17_x86_64": "x86_64-linux-gnu.2.17",
    "manylinux_2_17_aarch64": "aarch64-linux-gnu.2.17",
    "musllinux_1_2_x86_64": "x86_64-linux-musl",
    "musllinux_1_2_aarch64": "aarch64-linux-musl",
}
"""What Zig calls the machine that each tag stands for."""

EXTENSIONS = {"remus_ckpt/codec/_native.abi3.so", "remus_ckpt/store/_pages.abi3.so", "remus_ckpt/wire/_path.abi3.so"}
"""What a wheel has to hold: an install goes on without a compiler, a release does not."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--try", dest="is_try", action="store_true", help="only try what is in DIRECTORY")
    parser.add_argument("--once", action="store_true", help="do not build a second time to compare")
    parser.add_argument("--no-demo", action="store_true", help="do not run the demo")
    options = parser.parse_args()
    out: Path = options.directory
    with tempfile.TemporaryDirectory(prefix="remus-wheels-") as name:
        work = Path(name)
        if options.is_try:
            try_one(out, work, is_demo=not options.no_demo)
            return
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            sys.exit(f"{out} is not empty: name another folder")
        headers = common_headers(work / "headers")
        commit = git("rev-parse", "HEAD").decode().strip()
        built = build(commit, work / "first", headers)
        if not options.once:
            compare(built, build(commit, work / "the" / "second", headers))
        for path in built:
            if path.suffix == ".whl":
                audit(path, work / "audited" / path.stem)
            shutil.copy(path, out)
        list_parts(try_one(out, work, is_demo=not options.no_demo), work / "venv", out)
    made = sorted(path for path in out.iterdir())
    (out / "SHA256SUMS").write_text("".join(f"{sha256(path)}  {path.name}\n" for path in made))
    print((out / "SHA256SUMS").read_text(), end="")


def common_headers(folder: Path) -> Path:
    """Python's headers, with the configuration of this machine: the stable ABI takes nothing from it that differs
    between machines of 64 bits."""
    shutil.copytree(sysconfig.get_path("include"), folder)
    config = Path(sysconfig.get_config_h_filename())
    # In Debian that file only switches between machines.
    own = config.parent.parent / str(sysconfig.get_config_var("MULTIARCH")) / config.parent.name / config.name
    shutil.copyfile(own if own.exists() else config, folder / "pyconfig.h")
    return folder


def git(*words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout


def build(commit: str, folder: Path, headers: Path) -> list[Path]:
    """The source archive of a commit, and the wheels that are built from it."""
    source = folder / "source"
    source.mkdir(parents=True)
    subprocess.run(["tar", "x", "-C", source], input=git("archive", commit), check=True)
    when = git("log", "-1", "--format=%ct", commit).decode().strip()
    environment = os.environ | {"SOURCE_DATE_EPOCH": when}
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, source, environment=environment)
    (archive,) = folder.glob("*.tar.gz")
    made = [archive]
    for tag, target in TARGETS.items():
        unpacked, dist = folder / tag, folder / f"{tag}-dist"
        unpacked.mkdir()
        subprocess.run(["tar", "xf", archive, "-C", unpacked, "--strip-components=1"], check=True)
        compiler = f"{sys.executable} -m ziglang cc -target {target} -I{headers}"
        crossing = {
            "CC": compiler,
            "LDSHARED": f"{compiler} -shared -s",
            "_PYTHON_HOST_PLATFORM": f"linux-{target.split('-')[0]}",
        }
        said = run(
            sys.executable, "-m", "build", "--wheel", f"-C=--build-option=--plat-name={tag}",
            "--outdir", dist, unpacked, environment=environment | crossing,
        )  # fmt: skip
        (wheel,) = dist.glob("*.whl")
        with zipfile.ZipFile(wheel) as archived:
            if missing := EXTENSIONS - set(archived.namelist()):
                sys.exit(f"{said}\n{wheel.name} lacks {', '.join(sorted(missing))}: the compiler's output is above")
        made.append(wheel)
    return made


def compare(one: list[Path], other: list[Path]) -> None:
    for first, second in zip(one, other, strict=True):
        if sha256(first) != sha256(second):
            sys.exit(f"{first.name} is not the same when it is built again: compare with diffoscope")
        print(f"{first.name}: built twice, the same bytes")


def audit(wheel: Path, work: Path) -> None:
    """Whether a wheel needs only what its tag promises: auditwheel has found one that promises no more."""
    family, major, minor, machine = tag_of(wheel.stem.rsplit("-", 1)[1])
    # No library of this machine is looked at. Zig calls musl's libc by a name that its loader takes for itself.
    run("auditwheel", "repair", "--ldpaths", "", "--exclude", "libc.so", "--wheel-dir", work, wheel)
    (found,) = work.glob("*.whl")
    with zipfile.ZipFile(found) as archived:
        if grafted := [name for name in archived.namelist() if ".libs/" in name]:
            sys.exit(f"{wheel.name} needs libraries of others: {', '.join(grafted)}")
    tags = [tag_of(tag) for tag in found.stem.rsplit("-", 1)[1].split(".") if tag.count("_") > 2]
    if not any(tag[::3] == (family, machine) and tag[1:3] <= (major, minor) for tag in tags):
        sys.exit(f"{wheel.name} needs more than its tag promises: {found.name}")
    run("abi3audit", "--strict", wheel)
    print(f"{wheel.name}: needs nothing that its tag does not promise")


def tag_of(text: str) -> tuple[str, int, int, str]:
    """Such as manylinux, 2, 17, x86_64."""
    family, major, minor, machine = text.split("_", 3)
    return family, int(major), int(minor), machine


def try_one(directory: Path, work: Path, *, is_demo: bool) -> Path:
    """Install the wheel that pip chooses where nothing can be compiled, and try it. Returns the wheel."""
    venv, chosen = work / "venv", work / "chosen"
    run(sys.executable, "-m", "venv", venv)
    pip = [venv / "bin" / "python", "-m", "pip"]
    run(*pip, "download", "--quiet", "--no-index", "--no-deps", "--only-binary", ":all:", "--find-links", directory,
        "--dest", chosen, "remus_ckpt")  # fmt: skip
    (wheel,) = chosen.iterdir()
    bare = os.environ | {"PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}", "CC": "/bin/false"}
    run(*pip, "install", "--quiet", "--only-binary", ":all:", f"{wheel}[zstd]", environment=bare)
    found = json.loads(run(venv / "bin" / "remus-ckpt", "check", "--require-native", "--json", environment=bare))
    # A compiler's library that does not know the CPU would leave it the slowest kernel, and nobody would notice.
    flags = Path("/proc/cpuinfo").read_text().split() if found["machine"] == "x86_64" else []
    if unseen := [name for name in ("avx2", "avx512f") if name in flags and not found["features"].get(name)]:
        sys.exit(f"{wheel.name}: this CPU has {', '.join(unseen)}, which its extension does not see")
    if is_demo:
        run(venv / "bin" / "remus-ckpt", "demo", "--seconds", "1", environment=bare)
    print(f"{wheel.name}: installed and tried on {sysconfig.get_platform()}")
    return wheel


def list_parts(wheel: Path, venv: Path, out: Path) -> None:
    """What an environment has into which the wheel was installed: the SBOM."""
    name, version = wheel.name.split("-")[:2]
    parts = out / f"{name}-{version}.cdx.json"
    run(
        "cyclonedx-py", "environment", "--output-reproducible", "--pyproject", ROOT / "pyproject.toml",
        "--output-file", parts, venv / "bin" / "python",
    )  # fmt: skip
    # Our version is not in pyproject.toml, where it looks for it.
    listed = json.loads(parts.read_text())
    listed["metadata"]["component"]["version"] = version
    parts.write_text(json.dumps(listed, indent=2) + "\n")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(*command: object, environment: dict[str, str] | None = None) -> str:
    """Run a command, whose program may stand beside our Python. Returns what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path} if environment is None else environment
    words = list(map(str, command))
    words[0] = shutil.which(words[0], path=environment["PATH"]) or words[0]
    done = subprocess.run(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{words[0]} failed with {done.returncode}: its output is above")
    return done.stdout


if __name__ == "__main__":
    main()
