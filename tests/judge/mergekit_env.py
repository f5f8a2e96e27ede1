"""mergekit 0.1.5 as an outside judge, in an environment of its own outside the repository.

mergekit is run only as a command, never imported. Its environment is made once, in a cache directory
(`MERGETOOL_TEST_CACHE`, by default `~/.cache/mergetool/tests`), and made anew when the pinned list changes.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

VERSION = "0.1.5"
REQUIREMENTS = Path(__file__).with_name("mergekit-requirements.txt")
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
TORCH = "torch==2.13.0"
INSTALL_SECONDS = 1800
MERGE_SECONDS = 300


@functools.cache
def mergekit_yaml() -> tuple[Path | None, str]:
    """The path of `mergekit-yaml`, installed on first use; or None and why there is none."""
    folder = cache() / f"mergekit-{VERSION}"
    command = folder / "bin" / "mergekit-yaml"
    stamp = folder / "complete"
    wanted = requirements()
    digest = hashlib.sha256(f"{sys.version_info[:2]}\n{wanted}".encode()).hexdigest()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock")):
            if not (stamp.is_file() and stamp.read_text() == digest and command.is_file()):
                install(folder, wanted)
                stamp.write_text(digest)
    except subprocess.TimeoutExpired:
        return None, f"installing mergekit {VERSION} took longer than {INSTALL_SECONDS} s"
    except subprocess.CalledProcessError as failure:
        last = (failure.stderr or failure.stdout or "").strip().splitlines()[-1:]
        return None, f"mergekit {VERSION} could not be installed: {' '.join(last) or failure}"
    except OSError as failure:
        return None, f"mergekit {VERSION} could not be installed: {failure}"
    return command, ""


def mergekit_merge(recipe_text: str, out: Path, *options: str) -> Path:
    """Run `mergekit-yaml` on a recipe and return the folder of the merged model.

    Skips the calling test when mergekit cannot be installed; fails it, with mergekit's own words, when
    mergekit refuses the recipe. Relative paths in the recipe are relative to the parent of `out`.
    """
    command, reason = mergekit_yaml()
    if command is None:
        pytest.skip(reason)
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = out.with_name(out.name + ".yaml")
    recipe.write_text(recipe_text)
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "0",  # mergekit picks whose config it takes from a set
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONPATH", None)
    arguments = [
        str(command),
        str(recipe),
        str(out),
        "--quiet",
        "--no-copy-tokenizer",
        "--no-write-model-card",
    ]
    run = subprocess.run(
        [*arguments, *options],
        cwd=out.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=MERGE_SECONDS,
        check=False,
    )
    if run.returncode != 0:
        pytest.fail(f"mergekit-yaml failed on\n{recipe_text}\n{run.stderr[-4000:]}")
    return out


def cache() -> Path:
    """Where environments that tests need are kept between runs."""
    chosen = os.environ.get("MERGETOOL_TEST_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "mergetool" / "tests"


def requirements() -> str:
    """The pinned list, plus torch as `constraints.txt` pins it, so that both tools compute with one torch."""
    pins = CONSTRAINTS.read_text().splitlines() if CONSTRAINTS.is_file() else []
    torch = next((pin.strip() for pin in pins if pin.replace(" ", "").startswith("torch==")), TORCH)
    return f"{REQUIREMENTS.read_text()}{torch}\n"


def install(folder: Path, wanted: str) -> None:
    """Make the environment from nothing; a half-made one is thrown away."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    listed = folder / "requirements.txt"
    listed.write_text(wanted)
    subprocess.run(
        [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "-r", str(listed)],
        check=True,
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS,
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; parallel test workers wait for the first to finish installing."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
