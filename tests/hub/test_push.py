"""Pushes through huggingface_hub's own client to a Hub on loopback."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_folder import certificate, give_certificate
from huggingface_hub import ModelCard, constants
from loopback_hub import OTHER_TOKEN, READ_TOKEN, TOKEN, USER, LoopbackHub
from tiny_checkpoints import text_rows, tokenizer
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from hf_lossless import (
    CardDetails,
    CheckpointError,
    ConfigurationError,
    HubError,
    LosslessCompressionConfig,
    PushResult,
    cli,
    push_to_hub,
)
from hf_lossless.cards import folder as cards_folder
from hf_lossless.cards import pictures
from hf_lossless.cards.seal import own_text
from hf_lossless.checkpoint import read_entry

REPO = f"{USER}/small"
WEIGHTS = "model.safetensors"


DRAWN: dict[str, dict[str, bytes]] = {}


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of one plan are drawn once for all tests here: they would take most of their time."""

    def card_pictures(*given: Any) -> dict[str, bytes]:
        key = repr(given)
        DRAWN[key] = DRAWN.get(key) or pictures.card_pictures(*given)
        return DRAWN[key]

    monkeypatch.setattr(cards_folder, "card_pictures", card_pictures)


@pytest.fixture
def folder(small_folder: Path) -> Path:
    return small_folder


def card_of(hub: LoopbackHub, revision: str = "main") -> str:
    return hub.files(REPO, revision)["README.md"].decode()


def other_weights(folder: Path, text_folder: Path) -> None:
    """Another plan of the same model in the folder's place."""
    shutil.rmtree(folder)
    config = LosslessCompressionConfig(text_rows(), ratio=3)
    model = AutoModelForSequenceClassification.from_pretrained(text_folder, quantization_config=config)
    model.save_pretrained(folder)


# What a push brings there


def test_one_commit_with_all_files(folder: Path, hub: LoopbackHub) -> None:
    (folder / ".secret").write_text("mine")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text("{}")
    result = push_to_hub(folder, REPO)
    history = hub.repos[REPO].refs["main"]
    assert [commit.message for commit in history[1:]] == [f"Compressed {ratio(folder)} times by hf_lossless, certified"]
    pushed = hub.files(REPO)
    here = {name: content for name, content in contents_of_files(folder).items() if name != ".secret"}
    assert {WEIGHTS, "config.json", "compression.json", "tokenizer.json", "1_Pooling/config.json"} <= here.keys()
    made = pushed.keys() - here.keys()
    assert made == {"README.md", "layers.png", "frontier.png", ".gitattributes"}
    assert {name: content for name, content in pushed.items() if name not in made} == here
    assert {name for name in made if f"]({name})" in card_of(hub)} == {"layers.png", "frontier.png"}
    assert result == PushResult(
        repo_id=REPO,
        commit_url=f"{hub.url}/{REPO}/commit/{history[-1].oid}",
        commit_oid=history[-1].oid,
        changed=True,
        pull_request_url=None,
        card="written",
    )
    assert own_text(card_of(hub)) == ""
    assert f'from_pretrained("{REPO}")' in card_of(hub)
    assert not {"README.md", "layers.png"} & here.keys()  # what is here is left alone
    assert len(uploads_of_weights(hub, folder)) == 1
    assert not hub.repos[REPO].private


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def uploads_of_weights(hub: LoopbackHub, folder: Path) -> list[str]:
    return hub.asked(rf"^PUT /large/{sha256(folder / WEIGHTS)}$")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ratio(folder: Path) -> str:
    entry = read_entry(folder)
    return f"{entry.plan.original_bytes / entry.size_bytes:.2f}"


def test_a_name_without_owner(folder: Path, hub: LoopbackHub) -> None:
    assert push_to_hub(folder, "small").repo_id == REPO
    assert f'from_pretrained("{REPO}")' in card_of(hub)


def test_a_second_push_of_the_same(folder: Path, hub: LoopbackHub) -> None:
    first = push_to_hub(folder, REPO)
    again = push_to_hub(folder, REPO)
    assert not again.changed and again.commit_oid == first.commit_oid
    assert len(hub.repos[REPO].refs["main"]) == 2
    assert len(hub.asked("^PUT /large/")) == len(hub.large)


def test_a_model_with_its_processor(text_folder: Path, hub: LoopbackHub) -> None:
    config = LosslessCompressionConfig(text_rows(), ratio=2)
    model = AutoModelForSequenceClassification.from_pretrained(text_folder, quantization_config=config)
    details = CardDetails(dataset="stanfordnlp/sst2", license="mit")
    push_to_hub(model, REPO, processor=tokenizer(), details=details)
    names = (WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "frontier.png")
    assert set(names) <= hub.files(REPO).keys()
    card = card_of(hub)
    assert "license: mit" in card and "stanfordnlp/sst2" in card
    assert str(text_folder) not in card  # the base model's folder is nobody's business


def test_a_repository_that_is_there(folder: Path, hub: LoopbackHub) -> None:
    old = {"LICENSE": b"mine", "model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}"}
    hub.create(REPO, {**old, WEIGHTS: b"old", "onnx/model.safetensors": b"2"})
    push_to_hub(folder, REPO)
    pushed = hub.files(REPO)
    assert pushed["LICENSE"] == b"mine" and pushed["onnx/model.safetensors"] == b"2"
    assert pushed[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert not {"model-00001-of-00002.safetensors", "model.safetensors.index.json"} & pushed.keys()
    assert len(hub.repos[REPO].refs["main"]) == 2


def test_shards_take_the_place_of_one_file(text_folder: Path, folder: Path, hub: LoopbackHub) -> None:
    push_to_hub(folder, REPO)
    shards = folder.with_name("shards")
    model = BertForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(shards, max_shard_size="10KB")
    push_to_hub(shards, REPO)
    pushed = hub.files(REPO)
    assert WEIGHTS not in pushed  # from_pretrained would read it first
    assert len([name for name in pushed if name.endswith(".safetensors")]) > 1


@pytest.mark.parametrize("private", [True, False])
def test_private_or_public(private: bool, folder: Path, hub: LoopbackHub) -> None:
    push_to_hub(folder, REPO, private=private)
    assert hub.repos[REPO].private is private
    push_to_hub(folder, REPO)  # as it is
    now, asked = ("private", "public") if private else ("public", "private")
    with pytest.raises(HubError, match=f"{REPO} is there already and is {now}, but {asked} was asked for"):
        push_to_hub(folder, REPO, private=not private)


def test_a_branch(folder: Path, hub: LoopbackHub) -> None:
    hub.create(REPO, {"README.md": b"by hand"})
    result = push_to_hub(folder, REPO, revision="small")
    assert WEIGHTS not in hub.files(REPO)
    assert hub.files(REPO, "small")[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert result.card == "kept" and card_of(hub, "small") == "by hand"
    assert not push_to_hub(folder, REPO, revision="small").changed


def test_a_pull_request(folder: Path, hub: LoopbackHub) -> None:
    hub.create("somebody-else/small")
    result = push_to_hub(folder, "somebody-else/small", create_pr=True)
    assert result.pull_request_url == f"{hub.url}/somebody-else/small/discussions/1"
    assert WEIGHTS not in hub.files("somebody-else/small")
    assert WEIGHTS in hub.files("somebody-else/small", "refs/pr/1")
    more = push_to_hub(folder, "somebody-else/small", create_pr=True, commit_message="again")
    assert more.pull_request_url == f"{hub.url}/somebody-else/small/discussions/2"


# Cards that a person edits


def test_what_is_written_below_the_seal_is_kept(folder: Path, text_folder: Path, hub: LoopbackHub) -> None:
    push_to_hub(folder, REPO)
    before = card_of(hub)
    edited = (before + "\n## Contact\n\nAsk me.\n").replace("\n", "\r\n")  # as web editors save it
    hub.write(REPO, "README.md", edited.encode())
    give_certificate(folder, certificate(rise=0.1))
    assert push_to_hub(folder, REPO).card == "written"
    assert own_text(card_of(hub)) == "## Contact\n\nAsk me."
    assert "\n## Certificate\n\nCertified." in before
    assert "\n## Certificate\n\nNot certified: the loss may have risen" in card_of(hub)


@pytest.mark.parametrize(
    ("old", "new"),
    [("Activations stay", "Activations always stay"), ("library_name: transformers", "license: mit")],
    ids=["text", "front-matter"],
)
def test_a_card_that_was_changed_stays(old: str, new: str, folder: Path, text_folder: Path, hub: LoopbackHub) -> None:
    push_to_hub(folder, REPO)
    edited = card_of(hub).replace(old, new, 1)
    assert edited != card_of(hub)
    hub.write(REPO, "README.md", edited.encode())
    other_weights(folder, text_folder)
    result = push_to_hub(folder, REPO)
    assert result.card == "kept" and result.changed
    assert card_of(hub) == edited
    assert hub.files(REPO)[WEIGHTS] == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("content", [b"# Mine\n", b"", b"\xff\xfe no text"], ids=["plain", "empty", "binary"])
def test_a_card_of_somebody_else_stays(content: bytes, folder: Path, hub: LoopbackHub) -> None:
    hub.create(REPO, {"README.md": content})
    (folder / "README.md").write_text("# By hand, here\n")
    assert push_to_hub(folder, REPO).card == "kept"
    assert hub.files(REPO)["README.md"] == content


def test_a_card_that_was_written_by_hand_in_the_folder_is_pushed(folder: Path, hub: LoopbackHub) -> None:
    (folder / "README.md").write_text("# By hand\n")
    push_to_hub(folder, REPO)
    assert card_of(hub) == "# By hand\n"
    assert (folder / "README.md").read_text() == "# By hand\n"


def test_a_card_that_is_edited_while_a_push_is_under_way(folder: Path, hub: LoopbackHub) -> None:
    push_to_hub(folder, REPO)
    give_certificate(folder, certificate(rise=0.1))
    hub.before_commit = lambda: hub.write(REPO, "README.md", b"# Mine\n")
    with pytest.raises(HubError, match=rf"{REPO} changed while this push was under way \(412.*push again\."):
        push_to_hub(folder, REPO)
    assert card_of(hub) == "# Mine\n"
    hub.before_commit = lambda: None
    assert push_to_hub(folder, REPO).card == "kept"


def test_the_push_of_transformers_itself(folder: Path, hub: LoopbackHub) -> None:
    """It pushes what save_pretrained writes, and reads the card that is there and writes it again."""
    push_to_hub(folder, REPO)
    before = card_of(hub)
    model = BertForSequenceClassification.from_pretrained(folder)
    model.push_to_hub(REPO, token=TOKEN)
    assert hub.files(REPO)[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert card_of(hub) == before
    model.push_to_hub(f"{USER}/other", token=TOKEN)
    assert {WEIGHTS, "config.json"} <= hub.files(f"{USER}/other").keys()


# Refusals and lost connections


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
    assert len(before) == len(names) - 1 and lost not in before  # each is sent by itself
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


# The command line, and a new process


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `hf-lossless ARGUMENTS`; its status, and what it writes to stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-lossless", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        printed = capsys.readouterr()
        return int(exit.value.code or 0), printed.out, printed.err

    return run


def test_the_command(folder: Path, hub: LoopbackHub, run: Run) -> None:
    code, out, _ = run("push", folder, REPO, "--private", "--message", "first")
    assert code == 0
    assert out == f"{REPO}: pushed, {hub.url}/{REPO}/commit/{hub.repos[REPO].refs['main'][-1].oid}\n"
    assert hub.repos[REPO].private and hub.repos[REPO].refs["main"][-1].message == "first"
    assert run("push", folder, REPO)[1].startswith(f"{REPO}: nothing had changed since, ")
    hub.write(REPO, "README.md", b"# Mine\n")
    (folder / "tokenizer_config.json").unlink()
    code, out, _ = run("push", folder, REPO)
    assert code == 0
    assert "README.md there was written or changed by hand, and stays as it is" in out
    assert "has no tokenizer or image processor, so none was pushed" in out
    code, out, err = run("push", folder, REPO, "--public")
    assert (code, out) == (1, "")
    assert "error: tester/small is there already and is private, but public was asked for" in err
    assert run("push", folder, "a b")[0] == 1


def test_the_commands_of_the_readme(folder: Path, hub: LoopbackHub, tmp_path: Path, run: Run, monkeypatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    [commands] = re.findall(r"^<!-- push -->\n```bash\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    hub.create(f"{USER}/my-model", {"README.md": b"---\nlicense: mit\n---\n"})
    monkeypatch.chdir(tmp_path)
    for command in commands.replace("my-name/", f"{USER}/").splitlines():
        program, *arguments = shlex.split(command)
        assert program == "hf-lossless" and run(*arguments)[0] == 0
    assert hub.repos[f"{USER}/my-model-small"].private
    pushed = ModelCard(hub.files(f"{USER}/my-model-small")["README.md"].decode()).data
    assert (pushed.base_model, pushed.license, pushed.datasets) == (f"{USER}/my-model", "mit", [f"{USER}/my-rows"])


def in_a_new_process(hub: LoopbackHub, home: Path) -> dict[str, str]:
    """The environment of a person whose Hub this is."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home / "home"), "HF_HUB_DISABLE_XET": "1"}
    return environment


def test_reload_by_repo_id_in_a_new_process(folder: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    """The code of the card that was pushed is run as it stands there, and computes the same bits."""
    push_to_hub(folder, REPO, private=True)
    [code] = re.findall(r"```python\n(.*?)```", card_of(hub), re.DOTALL)
    inputs = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = BertForSequenceClassification.from_pretrained(folder)(inputs).logits
    script = f"""{code}
import torch
with torch.no_grad():
    torch.save(model(torch.tensor([[5, 6, 7, 8]])).logits, "logits.pt")
assert tokenizer("w5 w6")["input_ids"] == [5, 6]
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=in_a_new_process(hub, tmp_path),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    assert hub.asked(rf"^GET /{REPO}/resolve/.*/model\.safetensors$")
