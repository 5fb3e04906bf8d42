"""Translates the Hub's refusals and lost connections into errors with a remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_token, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    HfHubHTTPError,
    HFValidationError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx, validate_repo_id  # type: ignore[attr-defined]  # exported lazily

from hf_lossless.errors import ConfigurationError, HubError, LosslessError, reason

_RAISED = (HfHubHTTPError, EntryNotFoundError, FileMetadataError, httpx.HTTPError, ConnectionError)


def refuse_bad_repo_id(repo_id: str) -> None:
    """Raises ConfigurationError for an invalid repository name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigurationError(
            f"repo_id={repo_id!r} is not the name of a repository: {reason(error)}. Give NAME or OWNER/NAME, of "
            "letters, digits, '-', '_' and '.', say my-name/my-model-small."
        ) from error


def token_for_pushing(token: str | None) -> str:
    """Returns the given token, or that of the logged-in user.

    Raises:
        HubError: There is no token, or requests are switched off.
    """
    if is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set, which forbids every request to the Hub. Unset it to push.")
    found = token or get_token()
    if not found:
        raise HubError(
            "there is no token for the Hub. Log in with `hf auth login`, set HF_TOKEN, or pass token=: one that may "
            "write."
        )
    return found


@contextmanager
def hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Converts errors of the Hub and of the network into HubError."""
    try:
        yield
    except LosslessError:
        raise
    except (*_RAISED, RuntimeError, ValueError) as error:
        raise HubError(_message(error, repo_id, revision)) from error


def _message(error: BaseException, repo_id: str, revision: str | None) -> str:
    if isinstance(error, ValueError) and "metadata" in str(error):
        said = " ".join(str(error).split()).rstrip(".")
        return f"the Hub refuses the front matter of README.md: {said}. Correct it, and push again."
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, RevisionNotFoundError):
            return f"{repo_id} has no revision {revision!r}. Name a branch that it has, or push without create_pr."
        if isinstance(cause, HfHubHTTPError):
            return _refusal(cause, repo_id)
    for cause in chain:
        if isinstance(cause, httpx.TransportError | ConnectionError):
            return _lost(cause, repo_id)
    if isinstance(error, RuntimeError):
        return f"the push to {repo_id} failed: {reason(error)}. Push again: files that have arrived are not sent again."
    return (
        f"{constants.ENDPOINT} does not answer as the Hub does: {reason(error)}. Check HF_ENDPOINT, and whether a "
        "network's login page stands in between."
    )


def _refusal(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    said = f"{status}: {error.server_message}" if error.server_message else str(status)
    if status == 401:
        return f"the Hub refuses the token ({said}). Log in again with `hf auth login`, or give a token that may write."
    if status == 403:
        return (
            f"the token may not write to {repo_id} ({said}). Take one that may, push to a name of your own, or propose "
            "the change with create_pr=True (--create-pr)."
        )
    if status == 404:
        return f"{repo_id} is not there, or the token may not see it ({said}). Check the name and the token."
    if status in (409, 412):
        return f"{repo_id} changed while this push was under way ({said}). Nothing was committed: push again."
    return f"the Hub answered {said} to the push to {repo_id}. Try again later: what has arrived is not sent again."


def _lost(error: BaseException, repo_id: str) -> str:
    return (
        f"the connection to {constants.ENDPOINT} was lost while pushing to {repo_id} ({reason(error)}). A commit is "
        "made whole or not at all. Push again: files that have arrived are not sent again."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
