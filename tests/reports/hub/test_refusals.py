"""Pushes that fail: refused, broken off, or of a folder that is not to be pushed. Nothing is half there then."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from loopback_hub import OTHER_TOKEN, READ_TOKEN, LoopbackHub
from pushing import REPO, WEIGHTS, sha256, uploads_of_weights
from transformers import BertForSequenceClassification

from hf_lossless import (
    CheckpointError,
    ConfigurationError,
    HubError,
    push_to_hub,
)


def test_a_token_that_is_refused(folder: Path, hub: LoopbackHub) -> None:
    with pytest.raises(HubError, match=r"refuses the token \(401: Invalid credentials.*`hf auth login`"):
        push_to_hub(folder, REPO, token="hf_wrong")
    assert not hub.repos and not hub.large
    assert "hf_wrong" not in str(hub.requests)


@pytest.mark.parametrize("token", [READ_TOKEN, OTHER_TOKEN], ids=["reads-only", "of-somebody-else"])
def test_a_token_that_may_not_write(token: str, folder: Path, hub: LoopbackHub) -> None:
    hub.create(REPO)
    with pytest.raises(HubError, match=rf"token may not write to {REPO} \(403.*--create-pr"):
        push_to_hub(folder, REPO, token=token)
    with pytest.raises(HubError, match=r"may not write to tester/new \(403"):
        push_to_hub(folder, "tester/new", token=token)
    assert not hub.large and len(hub.repos[REPO].refs["main"]) == 1


def test_no_token(folder: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"no token for the Hub\. Log in with `hf auth login`, set HF_TOKEN, or pass"):
        push_to_hub(folder, REPO)
    assert not hub.requests


def test_offline(folder: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set, .* Unset it to push"):
        push_to_hub(folder, REPO)


@pytest.mark.parametrize("repo_id", ["a b", "a/b/c", "a--b", "", "me/small.git", "/etc/passwd", "-a", "é"])
def test_an_invalid_repo_id(repo_id: str, folder: Path, hub: LoopbackHub) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"repo_id={re.escape(repr(repo_id))} is not the name of a repository"
    ):
        push_to_hub(folder, repo_id)
    assert not hub.requests


def test_a_revision_that_is_not_there(folder: Path, hub: LoopbackHub) -> None:
    hub.create(REPO)
    with pytest.raises(HubError, match=f"{REPO} has no revision 'nowhere'"):
        push_to_hub(folder, REPO, revision="nowhere", create_pr=True)


PLACES = {
    "create": "^POST /api/repos/create",
    "info": "^GET /api/models/",
    "preupload": "/preupload/",
    "batch": "/objects/batch",
    "large": "^PUT /large/",
    "verify": "^POST /verify",
    "commit": "/commit/",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_connection_that_is_lost(place: str, folder: Path, hub: LoopbackHub) -> None:
    hub.breaks = lambda request: re.search(PLACES[place], request) is not None
    with pytest.raises(
        HubError, match=r"the connection to http://127\.0\.0\.1:\d+ was lost while pushing to .* again:"
    ):
        push_to_hub(folder, REPO)
    assert hub.asked(rf"{PLACES[place]}.* \(lost\)$")
    if place != "create":
        assert hub.files(REPO).keys() == {".gitattributes"}  # nothing is half there
    arrived = place in ("verify", "commit")
    assert (sha256(folder / WEIGHTS) in hub.large) is arrived
    uploads = len(uploads_of_weights(hub, folder))
    hub.breaks = lambda request: False
    assert push_to_hub(folder, REPO).changed
    assert hub.files(REPO)[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert len(uploads_of_weights(hub, folder)) == uploads + (not arrived)


def test_of_several_large_files_only_those_are_sent_again_that_did_not_arrive(folder: Path, hub: LoopbackHub) -> None:
    shards = folder.with_name("shards")
    BertForSequenceClassification.from_pretrained(folder).save_pretrained(shards, max_shard_size="10KB")
    names = sorted(path.name for path in shards.glob("*.safetensors"))
    assert len(names) > 2
    lost = sha256(shards / names[-1])
    hub.breaks = lambda request: request == f"PUT /large/{lost}"
    with pytest.raises(HubError, match="was lost while pushing"):
        push_to_hub(shards, REPO)
    before = set(hub.large)
    assert len(before) == len(names) - 1 and lost not in before
    assert len(hub.asked("/objects/batch")) == len(names)  # each is asked for and sent by itself
    assert hub.files(REPO).keys() == {".gitattributes"}
    hub.breaks = lambda request: False
    hub.requests.clear()
    push_to_hub(shards, REPO)
    assert len(hub.repos[REPO].refs["main"]) == 2
    assert {request.rsplit("/", 1)[1] for request in hub.asked("^PUT /large/")} == hub.large.keys() - before


def test_a_commit_whose_answer_is_lost(folder: Path, hub: LoopbackHub) -> None:
    """It was made, so the next push has nothing to do."""
    hub.answers = lambda request: (504, b"") if "/commit/" in request else None
    with pytest.raises(HubError, match="the Hub answered 504"):
        push_to_hub(folder, REPO)
    assert len(hub.repos[REPO].refs["main"]) == 1


def test_a_login_page_in_between(folder: Path, hub: LoopbackHub) -> None:
    hub.answers = lambda request: (200, b"<html>Welcome to our hotel</html>")
    with pytest.raises(HubError, match=r"does not answer as the Hub does: .* a network's login page"):
        push_to_hub(folder, REPO)


def test_front_matter_that_the_hub_refuses(folder: Path, hub: LoopbackHub) -> None:
    (folder / "README.md").write_text("---\nlicense: [\n---\n# By hand\n")
    with pytest.raises(HubError, match=r"the Hub refuses the front matter of README\.md: .*bad YAML"):
        push_to_hub(folder, REPO)
    assert not hub.large


# Folders that are not to be pushed


def test_an_original_is_not_pushed(text_folder: Path, hub: LoopbackHub) -> None:
    with pytest.raises(CheckpointError, match="holds no model compressed by hf_lossless"):
        push_to_hub(text_folder, REPO)
    with pytest.raises(CheckpointError, match="this BertForSequenceClassification is not compressed by hf_lossless"):
        push_to_hub(BertForSequenceClassification.from_pretrained(text_folder), REPO)
    assert not hub.requests


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def without_a_shard(folder: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(folder)
    shutil.rmtree(folder)
    model.save_pretrained(folder, max_shard_size="10KB")
    next(folder.glob("model-00002-*")).unlink()


def with_a_broken_index(folder: Path) -> None:
    without_weights(folder)
    (folder / "model.safetensors.index.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "is truncated or no safetensors file"),
        (without_weights, r"has neither model\.safetensors nor model\.safetensors\.index\.json"),
        (without_a_shard, r"the shard model-00002-of-.* is missing"),
        (with_a_broken_index, "is not an index of shards"),
        (shutil.rmtree, r"config\.json cannot be read: No such file or directory"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_folder_is_not_pushed(
    damage: Callable[[Path], None], message: str, folder: Path, hub: LoopbackHub
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        push_to_hub(folder, REPO)
    assert not hub.requests
