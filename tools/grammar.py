"""Compiles specs/grammar/remus_stream.ksy to a program in another language, by default Python.

The compiler is the npm package `kaitai-struct-compiler`, a library without a command of its own; `js-yaml` reads the
grammar for it. Both lie in the directory that KAITAI_COMPILER names, else in .cache/kaitai, where this puts them:

    npm install --prefix .cache/kaitai kaitai-struct-compiler@0.11 js-yaml
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GRAMMAR = ROOT / "specs" / "grammar" / "remus_stream.ksy"
ENVIRONMENT = "KAITAI_COMPILER"

_COMPILE = """
const [grammar, language, out] = process.argv.slice(1);
const fs = require("fs"), path = require("path");
const kaitai = require("kaitai-struct-compiler"), yaml = require("js-yaml");
kaitai.compile(language, yaml.load(fs.readFileSync(grammar, "utf8")), null, false).then(
  files => {
    for (const name of Object.keys(files)) {
      const target = path.join(out, name);
      fs.mkdirSync(path.dirname(target), {recursive: true});
      fs.writeFileSync(target, files[name]);
      console.log(target);
    }
  },
  error => {
    console.error(String(error && error.message || error));
    process.exit(1);
  },
);
"""


class NoCompiler(Exception):
    """What is missing, and how to get it."""


def find_compiler() -> tuple[str, Path]:
    """node, and the directory `node_modules` with both packages. Raises NoCompiler."""
    node = shutil.which("node")
    if node is None:
        raise NoCompiler("no node on the path")
    named = os.environ.get(ENVIRONMENT)
    prefix = Path(named) if named else ROOT / ".cache" / "kaitai"
    modules = prefix.resolve() / "node_modules"
    for package in ("kaitai-struct-compiler", "js-yaml"):
        if not (modules / package / "package.json").exists():
            raise NoCompiler(
                f"no {modules / package}: npm install --prefix {prefix} kaitai-struct-compiler@0.11 js-yaml, "
                f"or name the directory that has it in {ENVIRONMENT}"
            )
    return node, modules


def compile_grammar(out: Path, language: str = "python") -> None:
    """Write the grammar as a program into the directory `out`. Raises NoCompiler, CalledProcessError."""
    node, modules = find_compiler()
    subprocess.run(
        [node, "-e", _COMPILE, str(GRAMMAR), language, str(out)],
        env={**os.environ, "NODE_PATH": str(modules)},
        check=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the Kaitai Struct grammar of the save stream.")
    parser.add_argument("out", type=Path, help="directory to write to")
    parser.add_argument("--language", default="python", help="a target of the compiler, by default python")
    arguments = parser.parse_args()
    try:
        compile_grammar(arguments.out, arguments.language)
    except NoCompiler as error:
        print(error, file=sys.stderr)
        return 3
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
