"""Pushes through huggingface_hub's own client to a Hub on loopback, and what comes back in a new process."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import TOKEN, USER, LoopbackHub
from pushing import REPO, WEIGHTS, Run, card_of, contents_of_files, ratio, uploads_of_weights
from readmes import blocks
from round_trips import assert_same_outputs, outputs_of
from tiny_checkpoints import text_rows, tokenizer
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from hf_lossless import (
    CardDetails,
    HubError,
    LosslessCompressionConfig,
    PushResult,
    push_to_hub,
)
from hf_lossless.reports.card.digest import own_text


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
    [commands] = blocks("push")
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
    """The code of the card that was pushed is run as it stands there, and computes the same."""
    push_to_hub(folder, REPO, private=True)
    [code] = re.findall(r"```python\n(.*?)```", card_of(hub), re.DOTALL)
    inputs = torch.tensor([[5, 6, 7, 8], [9, 5, 11, 6]])
    expected = outputs_of(BertForSequenceClassification.from_pretrained(folder), {"input_ids": inputs})
    script = f"""{code}
import torch
with torch.no_grad():
    torch.save(model(torch.tensor({inputs.tolist()})).logits, "logits.pt")
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
    assert_same_outputs(torch.load(tmp_path / "logits.pt"), expected)
    assert hub.asked(rf"^GET /{REPO}/resolve/.*/model\.safetensors$")
