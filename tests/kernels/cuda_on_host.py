"""A stand-in for `cuda.core` that builds kernels with a C++ compiler and runs them on the CPU, one thread after all.

Blocks run one after the other, each with a single thread, which all kernels allow. So everything is run but NVIDIA's
compiler and driver: the text in C++, the prelude, the launches, and what is copied where.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

COMPILER = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
HOST = """
#include <cmath>
using std::fabs; using std::sqrt;
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(n)
#define __syncthreads()
#define __shfl_down_sync(mask, value, lane) 0u
struct Place { int x, y; };
static Place blockIdx, threadIdx, blockDim, gridDim;
template <class T> T atomicAdd(T* place, T more) { T before = *place; *place += more; return before; }
extern "C" void place(int block_x, int block_y, int blocks) {
    blockIdx = {block_x, block_y}; threadIdx = {0, 0}; blockDim = {1, 1}; gridDim = {blocks, 1};
}
"""


@dataclass
class Device:
    index: int
    arch = "0"

    def set_current(self):
        pass


class Stream:
    @classmethod
    def from_handle(cls, handle):
        return cls()


class ProgramOptions:
    def __init__(self, **options):
        assert options["fma"] is False


class LaunchConfig:
    def __init__(self, grid, block):
        self.grid = grid if isinstance(grid, tuple) else (grid, 1)
        assert min(self.grid) > 0


class Program:
    def __init__(self, source, language, options):
        assert language == "c++"
        self.source = source

    def compile(self, kind):
        return self

    def get_kernel(self, name):
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
            source.write_text(HOST + self.source)
            flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
            subprocess.run([COMPILER, *flags, str(source), "-o", str(library)], check=True)
            return ctypes.CDLL(str(library))


def launch(stream, config, kernel, *arguments):
    kinds = {float: ctypes.c_double, int: ctypes.c_int64, np.uint64: ctypes.c_uint64}
    given = [kinds[type(argument)](argument) for argument in arguments]  # what else would be passed in another width
    blocks, layers = config.grid
    for y in range(layers):
        for x in range(blocks):
            kernel.place(x, y, blocks)
            kernel.kernel(*given)


def stand_in():
    """The modules to put in place of ``cuda`` and ``cuda.core``."""
    core = ModuleType("cuda.core")
    for each in (Device, Stream, ProgramOptions, LaunchConfig, Program, launch):
        setattr(core, each.__name__, each)
    package = ModuleType("cuda")
    package.core = core
    return {"cuda": package, "cuda.core": core}
