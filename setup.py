"""The C extension; everything else stands in pyproject.toml.

It is optional: where no compiler is found the install goes on, and numpy runs the codecs.
"""

from pathlib import Path

from setuptools import Extension, setup

KERNELS = Path("remus_ckpt/codec/_kernels")

setup(
    ext_modules=[
        Extension(
            "remus_ckpt.codec._native",
            sources=sorted(str(path) for path in KERNELS.glob("*.c")),
            depends=sorted(str(path) for path in KERNELS.glob("*.h")),
            # No -march: each file says for itself what it needs, and is only called where the CPU has it.
            extra_compile_args=["-std=c11", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
