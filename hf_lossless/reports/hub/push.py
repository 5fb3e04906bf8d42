"""`push_to_hub`: pushes a checked folder to the Hub as one commit.

create the repository -> read its present state -> upload large files -> commit, if nothing changed meanwhile

Large files are uploaded by their checksums before the commit, which is one atomic request. Files that arrived in an
interrupted push are not sent again, and files equal to those on the Hub are left out. The commit names its parent, so
that the Hub refuses it if somebody changed the card in between.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import ModelInfo
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hf_lossless.checkpoints.entry import LosslessCheckpointConfig
from hf_lossless.checkpoints.record import write_record
from hf_lossless.checkpoints.saved_folder import SavedFolder
from hf_lossless.errors import HubError
from hf_lossless.reports.card.details import CardDetails
from hf_lossless.reports.card.digest import own_text, reconciled
from hf_lossless.reports.card.folder import CARD, FolderCard, card_text, folder_card
from hf_lossless.reports.card.model_card import base_of, record_of_model
from hf_lossless.reports.hub.refusals import hub_errors, refuse_bad_repo_id, token_for_pushing

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")

CardOutcome = Literal["written", "kept"]


@dataclass(frozen=True)
class PushResult:
    """The result of a push.

    Attributes:
        repo_id: Name of the repository with its owner.
        commit_url: Address of the commit; where nothing had changed, that of the last existing commit.
        commit_oid: Hash of the commit.
        changed: Whether a commit was made.
        pull_request_url: Address of the pull request; None unless requested.
        card: "kept": README.md on the Hub was written or changed by hand and was not replaced, so it may describe an
            earlier model. "written": README.md was pushed.
    """

    repo_id: str
    commit_url: str
    commit_oid: str
    changed: bool
    pull_request_url: str | None
    card: CardOutcome


def push_to_hub(
    model: PreTrainedModel | str | Path,
    repo_id: str,
    *,
    processor: Any = None,
    details: CardDetails | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> PushResult:
    """Pushes a compressed checkpoint with its card, in one commit.

    Args:
        model: A folder with a compressed checkpoint, of which all files that are not hidden are pushed; or a
            compressed model.
        repo_id: NAME or OWNER/NAME; created if missing.
        processor: The tokenizer or image processor that goes with a model. A folder contains its own.
        details: Details that the checkpoint does not contain (see `CardDetails`).
        private: Whether the repository must be private or public; None: unchanged, or its owner's default.
        revision: The branch, created if missing; None: main.
        create_pr: Whether to propose the commit as a pull request.
        commit_message: First line of the commit message.
        token: A token with write access; None: that of the logged-in user, or HF_TOKEN.

    Returns:
        The result. A generated README.md on the Hub is replaced; a person's text below its digest line is kept, and a
        card that a person wrote or changed is not replaced. Weight files of an earlier model that this one lacks are
        removed, since they would be loaded in its place.

    Raises:
        CheckpointError: The folder or the model is not compressed by this package, or the folder is not complete.
        ConfigurationError: `repo_id` is not a name, or the details cannot be used.
        HubError: There is no token, the Hub refuses, or it cannot be reached. Nothing was committed then, or all.

    Example::

        push_to_hub("my-model-small", "my-name/my-model-small", private=True)
    """
    refuse_bad_repo_id(repo_id)
    token = token_for_pushing(token)
    details = details or CardDetails()
    if isinstance(model, PreTrainedModel):
        details = details.filled_from(CardDetails(base_model=base_of(model)))
    with _folder_of(model, processor) as folder:
        saved = SavedFolder.read(folder)
        api = HfApi(token=token, library_name="hf-lossless")
        with hub_errors(repo_id, revision):
            present = _repository(api, repo_id, private, revision, create_pr)
            there = _card_there(api, present)
        ours = _card(folder, details, present.id, token)
        card = reconciled(ours.text, there)
        additions = _additions(folder, card, ours.pictures)
        with hub_errors(present.id, revision):
            _upload_shards(api, additions, present.id, revision, create_pr)
            commit = api.create_commit(
                present.id,
                [*additions, *_deletions(folder, present)],
                commit_message=commit_message or _message(saved.entry),
                revision=revision,
                create_pr=create_pr,
                parent_commit=present.sha,
            )
    return PushResult(
        repo_id=present.id,
        commit_url=commit.commit_url,
        commit_oid=commit.oid,
        changed=commit.oid != present.sha,
        pull_request_url=commit.pr_url,
        card="kept" if card is None else "written",
    )


@contextmanager
def _folder_of(model: PreTrainedModel | str | Path, processor: Any) -> Iterator[Path]:
    """Yields a given folder, or a temporary one with a model's files."""
    if not isinstance(model, PreTrainedModel):
        yield Path(model)
        return
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if (record := record_of_model(model)) is not None:
            write_record(folder, record)
        if processor is not None:
            processor.save_pretrained(folder)
        yield Path(folder)


def _repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool) -> ModelInfo:
    """Reads the repository before the push, on its branch; both are created where they are missing."""
    # The answer includes the owner's name where only the model's was given.
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    present = api.model_info(repo_id, revision=revision)
    if private is not None and bool(present.private) != private:
        is_now, asked = ("private", "public") if present.private else ("public", "private")
        raise HubError(
            f"{repo_id} is there already and is {is_now}, but {asked} was asked for. Nothing was pushed: change it in "
            "the repository's settings, or push to another name."
        )
    return present


def _card(folder: Path, details: CardDetails, repo_id: str, token: str) -> FolderCard:
    """Makes the folder's card under its name on the Hub; a card that a person wrote or changed is unchanged."""
    local = card_text(folder)
    if local is not None and own_text(local) is None:
        return FolderCard(local, {})
    card = folder_card(folder, details, present=local, repo_id=repo_id, token=token)
    text = reconciled(card.text, local)
    assert text is not None
    return FolderCard(text, card.pictures)


def _card_there(api: HfApi, present: ModelInfo) -> str | None:
    """Downloads the card on the Hub; None where there is none."""
    if CARD not in _names(present):
        return None
    return card_text(Path(api.hf_hub_download(present.id, CARD, revision=present.sha)).parent)


def _additions(folder: Path, card: str | None, pictures: Mapping[str, bytes]) -> list[CommitOperationAdd]:
    """Lists all files that are not hidden, and the card with its pictures unless the existing card is kept."""
    made: dict[str, bytes] = {} if card is None else {**pictures, CARD: card.encode()}
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = [
        CommitOperationAdd(name.as_posix(), path)
        for name, path in paths.items()
        if name.as_posix() not in {CARD, *made} and not any(part.startswith(".") for part in name.parts)
    ]
    return [*files, *(CommitOperationAdd(name, content) for name, content in made.items())]


def _upload_shards(
    api: HfApi, additions: list[CommitOperationAdd], repo_id: str, revision: str | None, create_pr: bool
) -> None:
    """Uploads the weights before the commit, one file after the other, where there are several.

    hf_xet, which uploads large files, registers them at the end of a call. In one call with all files, as in
    `create_commit`, a lost connection would lose the files that had arrived too.
    """
    shards = [addition for addition in additions if _WEIGHTS.fullmatch(addition.path_in_repo)]
    for shard in shards if len(shards) > 1 else ():
        api.preupload_lfs_files(repo_id, [shard], revision=revision, create_pr=create_pr, free_memory=False)


def _deletions(folder: Path, present: ModelInfo) -> list[CommitOperationDelete]:
    """Lists weights of an earlier model that from_pretrained would load with, or in place of, this model's."""
    return [
        CommitOperationDelete(name)
        for name in _names(present)
        if (_WEIGHTS.fullmatch(name) or name == SAFE_WEIGHTS_INDEX_NAME) and not (folder / name).is_file()
    ]


def _names(present: ModelInfo) -> list[str]:
    return [file.rfilename for file in present.siblings or ()]


def _message(entry: LosslessCheckpointConfig) -> str:
    ratio = entry.plan.original_bytes / entry.size_bytes
    verdict = "without a certificate" if entry.certificate is None else entry.certificate.verdict.split(":")[0]
    return f"Compressed {ratio:.2f} times by hf_lossless, {verdict}"
