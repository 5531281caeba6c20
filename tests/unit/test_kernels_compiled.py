"""The Triton kernels compile for a GPU, which needs none: the interpreter does not check types as the compiler does."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.helpers.launches import KERNELS

POINTERS = {"table": "*i64", "pointers": "*i64", "rates": "*fp32", "squares": "*fp64", "clip": "*fp64"}
TYPES = ("WEIGHT", "GRADIENT", "BUFFER")


def compile_all(compute_capability: int) -> int:
    """Compile each kernel with each setting of its switches, and some types. Returns how many there were."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ds_lena.update.kernels import programs
    from ds_lena.update.kernels.table import BLOCK

    target, done = GPUTarget("cuda", compute_capability, 32), 0
    mixed = [[tl.float32] * 3, [tl.float32, tl.bfloat16, tl.float32], [tl.bfloat16] * 3]
    for kernel in (getattr(programs, name) for name in KERNELS):
        names = kernel.arg_names
        switches = [name for name in names if name.isupper() and name not in (*TYPES, "BLOCK")]
        for types, values in itertools.product(mixed, itertools.product([True, False], repeat=len(switches))):
            constants = dict(zip(switches, values, strict=True)) | dict(zip(TYPES, types, strict=True))
            constants["BLOCK"] = BLOCK
            if constants.get("HAS_CLIP") is False:
                constants["clip"] = None
            kinds = {name: "constexpr" if name in constants else POINTERS.get(name, "fp32") for name in names}
            places = {(names.index(name),): value for name, value in constants.items()}
            assert triton.compile(ASTSource(kernel, kinds, constexprs=places), target=target).asm["ptx"]
            done += 1
    return done


def test_the_kernels_compile(tmp_path):
    """In a process of its own: here they may be interpreted."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    found = subprocess.run(
        [sys.executable, "-m", __name__],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.split() == ["39"]


if __name__ == "__main__":
    print(compile_all(90))
