"""The Hugging Face Hub: what a repo holds at a commit, the first bytes of a file, and whole files.

Everything goes through huggingface_hub, so its settings hold: endpoint, cache, token, offline mode. Its
messages do not reach the user, because they may hold signed addresses; each failure gets one of our own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mergetool.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repo holds at one commit.

    Attributes:
        commit: the 40 hex digits.
        sizes: the bytes of each file by its name, None where the Hub does not say.
        folder: the cached snapshot, when the Hub could not be asked; then ``sizes`` is empty.
    """

    commit: str
    sizes: Mapping[str, int | None]
    folder: Path | None = None


def listing(repo: str, revision: str | None) -> Listing:
    """Resolve ``revision`` to a commit and list its files; from the cache where the Hub cannot be reached.

    Raises:
        CheckpointError: no such repo or revision, no right to read it, or neither network nor cache.
    """
    from huggingface_hub import HfApi, constants

    try:
        info = HfApi().model_info(
            repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
    except Exception as error:
        if _unreachable(error):
            folder = cached_snapshot(repo, revision)
            if folder is not None:
                return Listing(folder.name, {}, folder)
        raise failure(error, repo, revision) from error
    if info.sha is None:
        raise CheckpointError("the Hub names no commit for this repo", where=_spelled(repo, revision))
    return Listing(info.sha, {sibling.rfilename: sibling.size for sibling in info.siblings or ()})


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The folder in the local cache that holds (some of) the repo at ``revision``, if there is one."""
    from huggingface_hub import snapshot_download

    try:
        # No pattern: the folder is wanted, whichever files it holds.
        return Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
    except Exception:  # whatever keeps the cache from being used, the first failure is the one to report
        return None


def cached_file(repo: str, commit: str, name: str) -> Path | None:
    """The path of a file of the repo in the local cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, revision=commit)
    return Path(found) if isinstance(found, str) else None


def small_file(repo: str, commit: str, name: str) -> bytes:
    """The content of a small file, kept in the cache.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    with _quiet():
        return download(repo, commit, name).read_bytes()


def download(repo: str, commit: str, name: str) -> Path:
    """The path of a file in the cache, downloaded if it is not there; inside the commit's snapshot folder.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, revision=commit))
    except Exception as error:
        raise failure(error, repo, commit, name) from error


def read_range(repo: str, commit: str, name: str, start: int, stop: int) -> bytes:
    """The bytes ``[start, stop)`` of a file, fewer where it ends; nothing is cached.

    Raises:
        CheckpointError: they cannot be fetched.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    got = bytearray()
    try:
        with http_stream_backoff(
            "GET",
            hf_hub_url(repo, name, revision=commit),
            headers=headers,
            follow_redirects=True,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as response:
            hf_raise_for_status(response)
            # A server that knows no ranges answers 200 and sends the file from its start.
            skip = start if response.status_code == 200 else 0
            for piece in response.iter_bytes():
                got += piece
                if len(got) >= skip + stop - start:
                    break
    except Exception as error:
        raise failure(error, repo, commit, name) from error
    return bytes(got[skip : skip + stop - start])


def _unreachable(error: Exception) -> bool:
    """Whether the Hub could not be asked at all, as against having answered no."""
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import HfHubHTTPError, httpx

    if isinstance(error, HfHubHTTPError):
        return bool(error.response.status_code >= 500)
    return isinstance(error, (OfflineModeIsEnabled, ConnectionError, httpx.TransportError))


def failure(error: Exception, repo: str, revision: str | None, name: str | None = None) -> CheckpointError:
    """What to tell the user about an exception of huggingface_hub or of the network below it."""
    from huggingface_hub import errors

    where = _spelled(repo, revision) + (f", {name}" if name else "")
    log_in = "log in (`hf auth login`, or set HF_TOKEN) with an account that may read it"
    match error:
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError() if _offline():
            what, fix = (
                "is not in the local cache, and HF_HUB_OFFLINE is set",
                "unset it, or download it first",
            )
        case errors.GatedRepoError():
            what, fix = "is gated", f"accept its terms on its page on the Hub, then {log_in}"
        case errors.RepositoryNotFoundError():
            what = "is neither a folder here nor a repo on the Hub that you may read"
            fix = f"check the spelling; if it is private, {log_in}"
        case errors.RevisionNotFoundError():
            what, fix = "the repo has no such revision", "name a branch, a tag or a commit of it"
        case errors.EntryNotFoundError() if not isinstance(error, errors.LocalEntryNotFoundError):
            what, fix = "the repo has no such file at this revision", "check the revision"
        case errors.HFValidationError():
            what, fix = "is not the name of a repo", "a repo is written org/name"
        case errors.HfHubHTTPError():
            status = error.response.status_code
            what = f"the Hub answers with HTTP status {status}"
            fix = log_in if status in (401, 403) else "try again later"
        case OSError() if error.errno is not None and error.filename is not None:
            what, fix = f"cannot be stored in the cache: {error.strerror}", "free some space, or move HF_HOME"
        case _:
            what = f"the Hub ({_host()}) cannot be reached ({type(error).__name__})"
            fix = "check the network; what is in the cache is used without it"
    return CheckpointError(what, where, fix)


def _spelled(repo: str, revision: str | None) -> str:
    return f"{repo}@{revision}" if revision else repo


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _host() -> str:
    """The host of the endpoint, without the name and password that its address may hold."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname or "HF_ENDPOINT"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars: a bar per small file hides the ones that matter."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
