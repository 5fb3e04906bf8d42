"""The HTML report as text: what it says, what it leaves out, and that nothing in a folder can speak in its name.

test_report_in_browser.py looks at it.
"""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hand_made_folders import LAYERS, certificate_of, many_layers, plan_of, record_for, save_folder

import hf_lossless
from hf_lossless import CheckpointError, PlanError, html_report
from hf_lossless.cli import publish as cli_report
from hf_lossless.reports import html
from hf_lossless.storage.plan import Regime

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "attribute": '"><img src=x onerror=alert(1)>',
    "close": "</style></title></table><iframe src=http://example.org>",
    "template": "{{ 7 * 7 }}{% raw %}",
    "entity": "&lt;b&gt;",
}


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, and the text outside of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open[-1:] not in (["style"], ["script"]):
            self.texts.append(data)

    @property
    def said(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty pictures: drawing takes most of the time, and these tests do not look at them."""
    monkeypatch.setattr(html, "svg_data_uri", lambda figure: "data:image/svg+xml;base64,")


UNDRAWN = pytest.mark.usefixtures("undrawn")


def page(tmp_path: Path, *arguments, name: str = "small", **settings) -> Page:
    return Page(html_report(save_folder(tmp_path / name, *arguments, **settings)))


def test_a_folder_with_everything(tmp_path: Path) -> None:
    plan = plan_of()
    certificate = certificate_of()
    found = page(tmp_path, plan, certificate=certificate, record=record_for(plan, not_smaller="the next one fails"))
    ratio = f"{20_000 / hf_lossless.LosslessCheckpointConfig.of(plan, certificate).size_bytes:.2f}"
    assert found.said.count(ratio) == 2 and "20,000" in found.said  # in the title and as a fact
    assert certificate.paragraph() in found.said and "Not smaller: the next one fails." in found.said
    assert "Certified: the loss did not rise by more than 1 % of the original's, on 2,000 held-out rows" in found.said
    assert "ab12cd" in found.said and "128, 300, 2,000" in found.said
    assert "TinyModel" in found.said and "curvature" in found.said
    assert len(found.named("img")) == 3
    for image in found.named("img"):
        assert image["src"].startswith("data:image/svg+xml;base64,") and len(image["alt"]) > 20
    for heading in ("bits", "group", "rank", "work", "input", "bytes", "predicted"):
        assert f" {heading} " in found.said
    for name in LAYERS:
        assert f" {name} " in found.said
    assert "Single answers: means are tested, and 1 of 2,000 predictions changed." in found.said
    assert "0 of 4 were measured alone" in found.said and "Integer arithmetic: " in found.said


@UNDRAWN
def test_a_folder_with_as_little_as_there_can_be(tmp_path: Path) -> None:
    grid = LAYERS["grid"].model_copy(update={"activation": None})
    found = page(tmp_path, plan_of({"head": grid}))
    assert "Not certified: the folder has no certificate" in found.said
    assert "the folder has no compression.json" in found.said and len(found.named("img")) == 1
    assert "Held-out rows: there is no certificate" in found.said
    assert "does not say what was measured" in found.said
    assert "Integer arithmetic" not in found.said
    for heading in (" rank ", " work ", " input ", "Certificate"):
        assert heading not in found.said


@UNDRAWN
@pytest.mark.parametrize(
    ("settings", "headline", "tone"),
    [
        ({"change": -0.02}, "Certified: the loss fell, on 2,000 held-out rows, at 95 % confidence", "good"),
        ({"change": 0.1}, "Not certified ", "bad"),
        ({"rows": 100}, "Not certified ", "bad"),
        ({"change": -0.1, "tolerance": -0.05, "confidence": 0.9}, "Certified: the loss fell, on", "good"),
    ],
    ids=["fell", "rose", "few-rows", "fall-asked"],
)
def test_verdicts(settings: dict, headline: str, tone: str, tmp_path: Path) -> None:
    certificate = certificate_of(**settings)
    found = page(tmp_path, plan_of(), certificate=certificate)
    assert headline in found.said and certificate.paragraph() in found.said
    [verdict] = [section for section in found.named("section") if section["id"] == "verdict"]
    assert verdict["class"] == f"verdict {tone}"


@UNDRAWN
def test_regimes_have_a_column(tmp_path: Path) -> None:
    layer = LAYERS["grid"].model_copy(update={"regime": Regime(snr=2.0, verdict="measured")})
    assert " regime " in page(tmp_path, plan_of({"head": layer}, theory="lod")).said


@UNDRAWN
@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_what_a_folder_says_is_never_markup(text: str, tmp_path: Path) -> None:
    plain_plan = plan_of({"name": LAYERS["grid"], "other": LAYERS["factors"]})
    settings = {"certificate": certificate_of(metric_name="name"), "record": record_for(plain_plan, not_smaller="name")}
    plain = page(tmp_path, plain_plan, name="plain", architectures=["name"], model_type="name", **settings)

    plan = plan_of({text: LAYERS["grid"], "other": LAYERS["factors"]}, theory=text)
    record = record_for(plan, not_smaller=text, versions={text: text})
    certificate = certificate_of(metric_name=text)
    folder = save_folder(
        tmp_path / text.replace("/", "|"),
        plan,
        certificate=certificate,
        record=record,
        architectures=[text],
        model_type=text,
        transformers_version={text: text},
    )
    found = Page(html_report(folder))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    assert [sorted(attributes) for _, attributes in found.tags] == [sorted(attributes) for _, attributes in plain.tags]
    assert found.said.count(re.sub(r"\s+", " ", text)) >= 6


def test_it_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    text = html_report(save_folder(tmp_path / "small", plan_of(), record=record_for(plan_of())))
    found = Page(text)
    for tag, attributes in found.tags:
        for attribute in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(attribute) or "data:").startswith("data:"), (tag, attributes)
    assert not re.search(r"https?://|@import|url\(", text)
    assert text.startswith("<!DOCTYPE html>\n")


@UNDRAWN
def test_the_policy_allows_its_own_script_alone(tmp_path: Path) -> None:
    text = html_report(save_folder(tmp_path / "small", plan_of()))
    [policy] = [meta["content"] for meta in Page(text).named("meta") if meta.get("http-equiv")]
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}';" in policy


def test_the_same_folder_gives_the_same_report(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "small", plan_of(), record=record_for(plan_of()))
    assert html_report(folder) == html_report(str(folder))


def test_a_deep_model(tmp_path: Path) -> None:
    plan = plan_of(many_layers(300), original_bytes=10**7)
    found = page(tmp_path, plan, record=record_for(plan))
    assert len(found.named("tr")) > 300 and "300 layers: " in found.said


@UNDRAWN
@pytest.mark.parametrize(
    ("architectures", "said"), [(None, "unknown"), ("Bare", "Bare"), (["A", "B"], "A, B"), ([1], "1")]
)
def test_any_architecture(architectures: object, said: str, tmp_path: Path) -> None:
    assert f" {said} " in page(tmp_path, plan_of(), architectures=architectures).said


def test_folders_that_cannot_be_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: No such file.*Give a folder written by"):
        html_report(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": []}')
    with pytest.raises(CheckpointError, match="holds no model compressed by hf_lossless"):
        html_report(tmp_path)
    folder = save_folder(tmp_path / "altered", plan_of())
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        html_report(folder)
    folder = save_folder(tmp_path / "malformed", plan_of())
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"kept"', '"unheard of"'))
    with pytest.raises(PlanError, match="malformed at layers"):
        html_report(folder)


@UNDRAWN
def test_a_report_replaces_a_report_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_folder(tmp_path / "small", plan_of())
    cli_report.report(folder)
    first = (folder / "report.html").read_text()
    assert capsys.readouterr().out == f"{folder / 'report.html'}: {len(first.encode()):,} bytes\n"
    (folder / "report.html").write_text(first[:900])
    cli_report.report(folder)
    assert (folder / "report.html").read_text() == first

    other = tmp_path / "notes.html"
    other.write_text("<p>mine</p>")
    with pytest.raises(CheckpointError, match=r"notes\.html exists and is no report of ours\. Remove it, or name ano"):
        cli_report.report(folder, other)
    assert other.read_text() == "<p>mine</p>"
    with pytest.raises(CheckpointError, match=r"is a folder\. Name a file in it, say .*small/report\.html"):
        cli_report.report(folder, folder)
    with pytest.raises(CheckpointError, match=r"cannot be written: No such file or directory\. Name another"):
        cli_report.report(folder, tmp_path / "nowhere/report.html")


def test_nothing_is_written_where_there_is_nothing_to_report(tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    with pytest.raises(CheckpointError, match="cannot be read"):
        cli_report.report(tmp_path / "nowhere", out)
    assert list(tmp_path.iterdir()) == []
