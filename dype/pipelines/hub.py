"""Read files of the hub, and say why it did not answer."""

import socket
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
from huggingface_hub import constants

from dype.errors import UnavailableError
from dype.pipelines.model_paths import INDEX, read_config

TIMEOUT = 5  # s, of the one try to reach the hub
NOT_REACHED = {"ConnectError", "ConnectionError", "OfflineModeIsEnabled", "TimeoutException"}
NOT_REACHED |= {"LocalEntryNotFoundError"}


def load_hub_json(repo: str, file: str, revision: str | None = None) -> dict:
    """Return the content of a JSON file in a folder or a repository; {} if it cannot be read.

    Args:
        repo: folder or hub id.
        file: path within it.
        revision: branch, tag or commit on the hub; None: the newest.

    Raises:
        UnavailableError: as from `repository_info`.
        ValueError: the hub answers that the repository is no pipeline.
    """
    if Path(repo).is_dir():
        return read_config(Path(repo, file))
    try:
        local = is_local(repo, revision)
        if local and not cache_folder(repo).is_dir():
            return {}
        path = huggingface_hub.hf_hub_download(
            repo, file, revision=revision, local_files_only=local
        )
        return read_config(Path(path))
    except hub_errors() as error:
        is_missing = {"EntryNotFoundError", "LocalEntryNotFoundError"} & error_classes(error)
        if file == INDEX and is_missing == {"EntryNotFoundError"}:
            raise ValueError(
                f"--model is {repo!r}, a repository without {INDEX}, expected a diffusers "
                "pipeline; a single file of it is for --transformer FILE, after `hf download`"
            ) from error
        if reason := explain_hub_error(repo, error):
            raise UnavailableError(reason) from error
        return {}


@lru_cache
def repository_info(repo: str, revision: str | None):
    """Return commit and files of a repository; None if the hub cannot be reached.

    The hub is asked once per run. Without a network the answer takes no time, or at most 5 s,
    where every download and every listing of files repeats its question for 23 s.

    Args:
        repo: hub id.
        revision: branch, tag or commit; None: the newest.

    Raises:
        UnavailableError: the hub answers that there is no such repository or revision, or that its
            license must be accepted.
    """
    if not answers():
        return None
    try:
        return huggingface_hub.HfApi().repo_info(repo, revision=revision, timeout=TIMEOUT)
    except hub_errors() as error:
        if reason := explain_hub_error(repo, error):
            raise UnavailableError(reason) from error
        return None


def answers() -> bool:
    """Return whether the hub's address takes a connection; True where that cannot be known.

    Without a network this one try is enough, and faster than the import of the hub's client.
    """
    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies():
        return True
    port = address.port or {"http": 80}.get(address.scheme, 443)
    try:
        socket.create_connection((address.hostname, port), TIMEOUT).close()
    except OSError:
        return False
    return True


def cache_folder(repo: str) -> Path:
    """Return the folder of a repository in the hub's cache, which may not exist."""
    return Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")


def is_local(repo: str, revision: str | None = None) -> bool:
    """Return whether files are read from this machine alone: of a folder, or without a network.

    Arguments and errors as for `repository_info`.
    """
    return Path(repo).is_dir() or repository_info(repo, revision) is None


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the classes of errors that the hub's client raises.

    Its own derive from OSError, but those of its connection may not, and to import them is slow.
    """
    from huggingface_hub.errors import HTTPError

    return OSError, ValueError, HTTPError


def error_classes(error: BaseException | None) -> set[str]:
    """Return the names of the classes of an error and of its causes."""
    classes = set()
    while error is not None:  # because diffusers wraps the hub's error in its own
        classes |= {error_class.__name__ for error_class in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return classes


def explain_hub_error(repo: str, error: Exception) -> str | None:
    """Return a sentence for what the hub answers about a repository; None if it was not asked."""
    classes = error_classes(error)
    if "GatedRepoError" in classes or "gated" in str(error).lower():
        return (
            f"{repo} is gated: accept its license at https://huggingface.co/{repo}, then run "
            "`hf auth login`"
        )
    if "RepositoryNotFoundError" in classes:
        return f"{repo} is not on the hub, nor a folder here, or is private: check the name"
    if "RevisionNotFoundError" in classes:
        return f"{repo} has no such revision: check --revision"
    return None
