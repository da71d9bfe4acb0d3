"""Read files of the hub, and say why it did not answer."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from dype.errors import UnavailableError
from dype.pipelines.model_paths import INDEX, read_config

NOT_REACHED = {"ConnectError", "ConnectionError", "OfflineModeIsEnabled", "TimeoutException"}


def load_hub_json(repo: str, file: str, revision: str | None = None) -> dict:
    """Return the content of a JSON file in a folder or a repository; {} if it cannot be read.

    Args:
        repo: folder or hub id.
        file: path within it.
        revision: branch, tag or commit on the hub; None: the newest.

    Raises:
        UnavailableError: the hub answers that there is no such repository or revision, or that its
            license must be accepted.
        ValueError: the hub answers that the repository is no pipeline.
    """
    if Path(repo).is_dir():
        return read_config(Path(repo, file))
    try:
        return read_config(Path(huggingface_hub.hf_hub_download(repo, file, revision=revision)))
    except (OSError, ValueError) as error:  # OSError, because the hub's errors derive from it
        if file == INDEX and is_missing_entry(error):
            raise ValueError(
                f"--model is {repo!r}, a repository without {INDEX}, expected a diffusers "
                "pipeline; a single file of it is for --transformer FILE, after `hf download`"
            ) from error
        reason = explain_hub_error(repo, error)
        if reason:
            raise UnavailableError(reason) from error
        return {}


def is_missing_entry(error: Exception) -> bool:
    """Return whether the hub answers that a repository lacks a file."""
    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


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
