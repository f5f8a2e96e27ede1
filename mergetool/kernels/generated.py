"""Generated modules: kept in a cache folder under a name made from their content, loaded once.

Numba does not notice a change in a function that a cached one calls; here a change in the text, in what it is made
of or in Numba itself changes the module's name.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_making = threading.RLock()


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
def _prelude() -> str:
    folder = Path(__file__).parent
    return "".join((folder / name).read_text() for name in ("prelude.py", "rounding.py"))


@cache
def cache_folder() -> Path:
    """Where generated kernels live: ``$MERGETOOL_CACHE``, else the user's cache, else a folder for this process."""
    home = os.environ.get("MERGETOOL_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mergetool"
    )
    folder = Path(home) / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="mergetool-kernels-"))


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


@cache
def module(name: str, text: str) -> ModuleType:
    """Write a module unless it is there, and load it; a second process that does the same does no harm."""
    numba = _numba()
    digest = hashlib.sha256(f"{numba.__version__}\n{_prelude()}\n{text}".encode()).hexdigest()[:16]
    path = cache_folder() / f"{name}_{digest}.py"
    if not path.exists():
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    spec = importlib.util.spec_from_file_location(f"mergetool_kernel_{name}_{digest}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where Numba's cache looks it up
    spec.loader.exec_module(module)
    return module
