"""Machine code of generated kernels: compiled once by Numba, kept as object files, loaded by LLVM alone.

Numba takes half a second to load; the LLVM behind it a twentieth. So a process that finds all its kernels in the cache
never loads Numba. A kernel takes numbers and addresses and returns a number, allocates nothing and raises nothing, so
its object file needs nothing of Numba's either; one that does is compiled anew in every process.

The name of a file is made from all that decides its content: the text, what the text is made of, the versions of
Numba and of LLVM, and the processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

from mergetool.cache import cache_folder

P = ParamSpec("P")
R = TypeVar("R")
Entry = Callable[..., int]
"""A kernel as it is called: integers, addresses of memory as integers; without the interpreter's lock."""
_making = threading.RLock()
_owners: list[Any] = []
"""What keeps machine code in memory: to the end of the process, as modules are."""

CHECK = 16
"""Bytes at the end of a file that tell whether the rest is whole."""
FOUND_ANYWHERE = frozenset(("pow", "fmod", "memset", "memcpy", "memmove"))
"""Functions of the C library that arithmetic may come to; every process has them."""


def once(make: Callable[P, R]) -> Callable[P, R]:
    """Make each kernel once, one at a time: CPython 3.11's `ast` gives up when threads parse side by side."""
    known: dict[Any, R] = {}

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        with _making:
            key = (args, tuple(kwargs.items()))
            if key not in known:
                known[key] = make(*args, **kwargs)
            return known[key]

    return made


@cache
def _made_with() -> str:
    """Everything but a kernel's own text that decides its machine code."""
    import llvmlite.binding as llvm

    folder = Path(__file__).parent
    prelude = "".join((folder / name).read_text() for name in ("prelude.py", "rounding.py", "objects.py"))
    processor = f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
    return f"{importlib.metadata.version('numba')} {llvm.llvm_version_info} {processor}\n{prelude}"


def entry(name: str, text: str, parameters: Sequence[str]) -> Entry:
    """The machine code of a kernel: found in the cache, or compiled and kept there.

    A second process that does the same at the same time does no harm.

    Args:
        name: what the kernel is called, for the reader of the cache folder.
        text: a module whose function ``kernel`` is compiled.
        parameters: what ``kernel`` takes: ``i64``, or for the address of an array ``u16*``, ``f32*``, ….
    """
    digest = hashlib.sha256("\n".join((_made_with(), *parameters, text)).encode()).hexdigest()[:16]
    path = cache_folder("kernels") / f"{name}_{digest}.o"
    content = _read(path)
    if content is None:
        function = _compiled(path, text, parameters)
        content = _object(function)
        if content is None:
            return _called(function, function.address, parameters)
        _keep(path, content + _check(content))
    return _loaded(content, parameters)


def _check(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=CHECK).digest()


def _read(path: Path) -> bytes | None:
    """What a file holds; None where there is none or it is not whole."""
    try:
        found = path.read_bytes()
    except OSError:
        return None
    return found[:-CHECK] if _check(found[:-CHECK]) == found[-CHECK:] else None


def _keep(path: Path, content: bytes) -> None:
    """Put a file into the cache, whole or not at all; a kernel is in memory, so a full disk stops nobody."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.replace(file.name, path)
            except OSError:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        _said(str(path.parent), error.strerror or str(error))


@cache
def _said(folder: str, why: str) -> None:
    """Say once that kernels are compiled anew by every process."""
    fix = "it takes every run some seconds; set MERGETOOL_CACHE to a folder that can be written"
    warnings.warn(f"{folder}: machine code is not kept there: {why}; {fix}", RuntimeWarning, stacklevel=2)


@cache
def _llvm() -> Any:
    """LLVM, ready for this machine."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


def _machine() -> Any:
    """How LLVM makes code for this processor."""
    llvm = _llvm()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        codemodel="jitdefault",
        jit=True,
    )


def _loaded(content: bytes, parameters: Sequence[str]) -> Entry:
    """Machine code put where it can be called."""
    llvm = _llvm()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(content))
    engine.finalize_object()
    return _called(engine, engine.get_function_address("kernel"), parameters)


def _called(owner: Any, address: int, parameters: Sequence[str]) -> Entry:
    """What lies at an address, as a function; its owner keeps it there."""
    _owners.append(owner)
    kinds = [ctypes.c_int64 if kind == "i64" else ctypes.c_void_p for kind in parameters]
    return ctypes.CFUNCTYPE(ctypes.c_int64, *kinds)(address)


def _compiled(path: Path, text: str, parameters: Sequence[str]) -> Any:
    """Compile a text with Numba; it stays beside its machine code, so that one can read what runs."""
    numba = _numba()
    source = path.with_suffix(".py")
    _keep(source, text.encode())
    module = ModuleType(f"mergetool_kernel_{path.stem}")
    exec(compile(text, source, "exec"), module.__dict__)
    kinds = [_numba_type(numba.types, kind) for kind in parameters]
    return numba.cfunc(numba.types.int64(*kinds), error_model="numpy")(module.kernel)


def _object(function: Any) -> bytes | None:
    """The machine code of a compiled function for any process; None if it calls what Numba alone provides."""
    llvm = _llvm()
    made = llvm.parse_assembly(function.inspect_llvm())
    # That a kernel raises nothing is known once it is compiled; what Numba would do if it did goes then.
    passes = llvm.create_new_module_pass_manager()
    for each in ("ipsccp", "simplify_cfg", "aggressive_dce", "global_dead_code_eliminate", "strip_dead_prototype"):
        getattr(passes, f"add_{each}_pass")()
    passes.run(made, llvm.create_pass_builder(_machine(), llvm.create_pipeline_tuning_options()))
    used = {each.name for each in made.functions if each.is_declaration and not each.name.startswith("llvm.")}
    if used - FOUND_ANYWHERE:
        return None
    made.get_function(function.native_name).name = "kernel"
    content: bytes = _machine().emit_object(made)
    return content


def _numba_type(types: Any, kind: str) -> Any:
    if kind == "i64":
        return types.int64
    kind = kind.removesuffix("*")
    wide = {"u": "uint", "i": "int", "f": "float"}[kind[0]] + kind[1:]
    return types.CPointer(getattr(types, wide))


@cache
def _numba() -> Any:
    """Numba, half a second, so only once something is compiled; and without SciPy, another fifth.

    Numba takes SciPy along for linear algebra, which no kernel has. Kernels of others that do will still find it.
    """
    blas = "scipy.linalg.cython_blas"
    if "numba" in sys.modules or blas in sys.modules:
        import numba

        return numba
    sys.modules[blas] = None  # type: ignore[assignment]  # what the import system takes for "there is none"
    try:
        import numba
        from numba.np import arraymath
    finally:
        del sys.modules[blas]
    arraymath._HAVE_BLAS = importlib.util.find_spec("scipy") is not None
    return numba


def ready() -> None:
    """Load what it takes to run kernels."""
    _llvm()
