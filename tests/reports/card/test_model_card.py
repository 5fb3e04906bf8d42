"""What a card says, read back by huggingface_hub; and the command that writes it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from compressed_folder import certificate, give_certificate
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from PIL import Image
from tiny_checkpoints import text_rows
from tiny_models import TINY_MODELS
from transformers import AutoModelForSequenceClassification

from hf_lossless import (
    CardDetails,
    CheckpointError,
    ConfigurationError,
    LosslessCompressionConfig,
    model_card,
)
from hf_lossless.certification.certificate import library_versions
from hf_lossless.checkpoints.record import record_of, write_record
from hf_lossless.checkpoints.saved_folder import SavedFolder
from hf_lossless.reports.card.details import details_of_card
from hf_lossless.reports.card.digest import own_text
from hf_lossless.reports.card.folder import write_card
from hf_lossless.reports.card.text import loading_code, task_name
from hf_lossless.reports.words import limitations

BASE = "google-bert/bert-base-uncased"
DETAILS = CardDetails(base_model=BASE, dataset="stanfordnlp/sst2", split="test", license="mit", language=("en", "de"))
Run = Callable[..., tuple[int, str, str]]


def section(card: str, heading: str) -> str:
    [text] = re.findall(rf"^## {heading}\n(.*?)(?=^## |^<!-- |\Z)", card, re.DOTALL | re.MULTILINE)
    return str(text)


def rows_of(table_in: str, heading: str) -> list[list[str]]:
    """The rows of the table whose first heading this is."""
    [body] = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:\|.*\n?)+)", table_in, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]


# Front matter


def test_the_front_matter(compressed_folder: Path) -> None:
    card = model_card(compressed_folder, DETAILS)
    data = ModelCard(str(card)).data
    assert (data.base_model, data.base_model_relation) == (BASE, "quantized")
    assert (data.license, data.language, data.datasets) == ("mit", ["en", "de"], ["stanfordnlp/sst2"])
    assert (data.library_name, data.pipeline_tag, data.metrics) == ("transformers", "text-classification", ["accuracy"])
    assert {"hf-lossless", "quantized"} <= set(data.tags)
    seen = SavedFolder.read(compressed_folder).entry.certificate.evidence
    results = {result.metric_type: result for result in data.eval_results}
    assert results["accuracy"].metric_value == seen.compressed_metric.value
    assert results["loss"].metric_value == seen.compressed_loss.value
    for result in results.values():
        assert (result.task_type, result.dataset_type, result.dataset_split) == (
            "text-classification",
            "stanfordnlp/sst2",
            "test",
        )
    assert data.model_name == "my-model-small"


def test_nothing_is_claimed_that_is_not_known(small_folder: Path) -> None:
    data = model_card(small_folder).data
    for name in ("base_model", "license", "language", "datasets"):
        assert data.get(name) is None
    assert "base_model_relation" not in data.to_dict()
    assert {result.dataset_type for result in data.eval_results} == {"unknown"}
    give_certificate(small_folder, None)
    data = model_card(small_folder).data
    assert data.eval_results is None and data.metrics is None


def test_the_card_is_stable(compressed_folder: Path) -> None:
    """Else reading and writing it, as transformers does, would look as if somebody had changed it."""
    card = str(model_card(compressed_folder, DETAILS))
    assert str(ModelCard(card)) == card
    assert own_text(card) == ""
    assert str(model_card(compressed_folder, DETAILS)) == card


def test_details_are_read_back(compressed_folder: Path) -> None:
    assert details_of_card(str(model_card(compressed_folder, DETAILS))) == DETAILS
    assert details_of_card(str(model_card(compressed_folder))) == CardDetails()
    other = CardDetails(license="other", license_name="mine", license_link="https://example.org", language=("en",))
    assert details_of_card(str(model_card(compressed_folder, other))) == other


# Text


def test_the_certificate_is_told_in_its_own_words(compressed_folder: Path) -> None:
    text = section(str(model_card(compressed_folder, DETAILS)), "Certificate")
    certified = SavedFolder.read(compressed_folder).entry.certificate
    assert certified.paragraph() in text
    assert rows_of(text, "") == [list(row) for row in certified.table()]
    assert "[stanfordnlp/sst2](https://huggingface.co/datasets/stanfordnlp/sst2), split `test`" in text


def test_sizes(compressed_folder: Path) -> None:
    entry = SavedFolder.read(compressed_folder).entry
    card = str(model_card(compressed_folder, DETAILS))
    size_bytes, original_bytes = f"{entry.size_bytes:,}", f"{entry.plan.original_bytes:,}"
    ratio = f"{entry.plan.original_bytes / entry.size_bytes:.2f}"
    assert f"**{ratio} times smaller**, {size_bytes} bytes in place of\n{original_bytes}. Certified.\n" in card
    done = section(card, "What was done")
    summary, layers = rows_of(done, "stored as"), rows_of(done, "layer")
    assert sum(int(row[2].replace(",", "")) for row in summary) == entry.plan.tensor_bytes
    assert sum(int(row[1]) for row in summary if row[1]) == len(entry.plan.layers)
    assert [row[0] for row in layers] == list(SavedFolder.read(compressed_folder).record.layer_order)  # the model's own
    record = SavedFolder.read(compressed_folder).record
    predicted, measured = (f"{change:+.2g}" for change in (record.chosen[1], record.measured_loss_change))
    assert f"change the loss by {predicted};\nmeasured on the 12 calibration rows, it was {measured}" in done


def test_a_model_that_is_not_certified_says_so_at_the_top(small_folder: Path) -> None:
    give_certificate(small_folder, certificate(rise=0.1))
    text = str(model_card(small_folder))
    assert ". Not certified: the loss may have risen by more than 0.01 of the original's." in text.split("## ")[0]
    assert section(text, "Certificate").strip().startswith("Not certified: the loss may have risen")


def test_why_it_is_not_smaller(small_folder: Path) -> None:
    record = SavedFolder.read(small_folder).record
    write_record(small_folder, record.model_copy(update={"not_smaller": "there is hardly a smaller plan"}))
    text = section(str(model_card(small_folder)), "Certificate")
    assert "says nothing of other data. Not smaller: there is hardly a smaller plan.\n" in text


def test_a_model_without_a_certificate(small_folder: Path) -> None:
    give_certificate(small_folder, None)
    text = str(model_card(small_folder))
    assert "Without a certificate." in text.split("## ")[0]
    assert "nothing here says that the loss held" in section(text, "Certificate")
    assert "Held-out rows: there is no certificate" in section(text, "What was not checked")
    assert "compressed with datasets" in section(text, "Where it comes from")
    (small_folder / "compression.json").unlink()
    assert "other versions are not recorded" in section(str(model_card(small_folder)), "Where it comes from")


def test_what_was_not_checked(compressed_folder: Path) -> None:
    text = section(str(model_card(compressed_folder)), "What was not checked")
    for word in ("Other data", "Other tasks", "Robustness", "Generated text", "Speed", "The original's training"):
        assert f"\n- {word}" in text
    assert set(
        limitations(SavedFolder.read(compressed_folder).entry, SavedFolder.read(compressed_folder).record)
    ) < set(text[3:].split("\n- "))
    assert "Integer arithmetic" not in text


def test_where_it_comes_from(compressed_folder: Path) -> None:
    text = section(str(model_card(compressed_folder, DETAILS)), "Where it comes from")
    assert all(f"{name} {version}" in text for name, version in library_versions().items())
    assert f"base model: {BASE}" in text and "licence: mit" in text
    unknown = section(str(model_card(compressed_folder)), "Where it comes from")
    assert "licence: not known here; that of the base model holds" in unknown


def test_quantised_inputs_and_low_rank(text_folder: Path) -> None:
    config = LosslessCompressionConfig(text_rows(), ratio=2, bits=(4, 8), activation_bits=(8,), ranks={"*.query": 4})
    model = AutoModelForSequenceClassification.from_pretrained(text_folder, quantization_config=config)
    kinds = {layer.kind for layer in model.config.quantization_config.plan.layers.values()}
    card = model_card(model)
    assert ("low-rank" in card.data.tags) is bool(kinds & {"low_rank", "sum"})
    assert "Integer arithmetic: quantised inputs are simulated" in str(card)
    assert "The inputs of some layers are quantised too" in str(card)


def test_a_model_in_memory(text_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(text_folder, tmp_path / "secret-place")
    (base / "README.md").write_text("---\nlicense: cc-by-4.0\nlanguage: fr\n---\n# Base\n")
    config = LosslessCompressionConfig(text_rows(), ratio=2)
    model = AutoModelForSequenceClassification.from_pretrained(base, quantization_config=config)
    card = model_card(model, repo_id="me/small")
    assert (card.data.license, card.data.language) == ("cc-by-4.0", ["fr"])  # the base model's own
    assert card.data.base_model is None and "secret-place" not in str(card)
    assert 'BertForSequenceClassification.from_pretrained("me/small")' in str(card)
    model.save_pretrained(tmp_path / "small")
    write_record(tmp_path / "small", record_of(model.hf_quantizer.result))
    again = model_card(tmp_path / "small", CardDetails(base_model=str(base)), repo_id="me/small")
    assert str(again) == str(card)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert "base model: not named" in str(model_card(reloaded))  # what it was loaded from is not its base


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("bert", "text-classification"),
        ("vit", "image-classification"),
        ("gpt2", "text-generation"),
        ("bert-mlm", "fill-mask"),
    ],
)
def test_tasks(name: str, task: str) -> None:
    assert task_name(TINY_MODELS[name].model_class.__name__) == task
    assert task_name("SomethingOfMyOwn") is None


def test_loading_code(compressed_folder: Path) -> None:
    plan = SavedFolder.read(compressed_folder).plan
    assert loading_code("me/x", "SomethingOfMyOwn", (), plan) is None
    code = loading_code("me/x", "ViTForImageClassification", ("preprocessor_config.json",), plan)
    assert code is not None and 'processor = AutoImageProcessor.from_pretrained("me/x")' in code
    code = loading_code("me/x", "ViTForImageClassification", (), plan)
    assert code is not None and "processor" not in code


# Licence and language of a base model on the Hub


def test_the_licence_is_carried_over_from_the_hub(compressed_folder: Path, hub: LoopbackHub) -> None:
    front = "---\nlicense: other\nlicense_name: odd\nlicense_link: https://example.org\nlanguage: [en, fr]\n---\n"
    hub.create(BASE, {"README.md": front.encode()})
    data = model_card(compressed_folder, CardDetails(base_model=BASE)).data
    assert (data.license, data.license_name, data.license_link) == ("other", "odd", "https://example.org")
    assert data.language == ["en", "fr"]
    given = model_card(compressed_folder, CardDetails(base_model=BASE, license="mit")).data
    assert (given.license, given.license_name, given.language) == ("mit", None, ["en", "fr"])


@pytest.mark.parametrize("readme", [None, b"# No front matter", b"---\n- a\n---\n", b"---\n{\n---\n", b"\xff\xfe"])
def test_a_licence_that_cannot_be_read(readme: bytes | None, compressed_folder: Path, hub: LoopbackHub) -> None:
    hub.create(BASE, {} if readme is None else {"README.md": readme})
    for base in (BASE, "nobody/nothing"):
        data = model_card(compressed_folder, CardDetails(base_model=base)).data
        assert data.license is None and data.base_model == base
    hub.breaks = lambda request: True
    assert model_card(compressed_folder, CardDetails(base_model=BASE)).data.license is None


# Bad details


@pytest.mark.parametrize(
    ("details", "message"),
    [
        (
            {"base_model": "no such/folder at all"},
            "base_model='no such/folder at all' is not a Hub id. Give the Hub id",
        ),
        ({"base_model": "/home/me/model"}, "base_model='/home/me/model' is not a Hub id"),
        ({"dataset": "test.jsonl"}, r"dataset='test\.jsonl' is a file\. Give the Hub id of the data set, or leave"),
        ({"dataset": "a/b/c"}, r"dataset='a/b/c' is not a Hub id"),
        ({"dataset": ""}, r"dataset='' is not a Hub id"),
    ],
)
def test_details_that_cannot_be_used(details: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CardDetails(**details)


def test_what_is_not_compressed_has_no_card(text_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model compressed by hf_lossless"):
        model_card(text_folder)
    with pytest.raises(CheckpointError, match="this BertForSequenceClassification is not compressed by hf_lossless"):
        model_card(AutoModelForSequenceClassification.from_pretrained(text_folder))


def test_a_config_that_is_no_object(small_folder: Path) -> None:
    (small_folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no model compressed by hf_lossless"):
        model_card(small_folder)


# Writing


def test_pictures(small_folder: Path) -> None:
    path = write_card(small_folder, CardDetails())
    shown = re.findall(r"!\[.+\]\((.+)\)", path.read_text())
    assert shown == ["layers.png", "frontier.png"]
    for name in shown:
        with Image.open(small_folder / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 100
    (small_folder / "compression.json").unlink()  # of a folder that save_pretrained wrote
    write_card(small_folder, CardDetails(), out=small_folder / "elsewhere")
    assert {path.name for path in (small_folder / "elsewhere").iterdir()} == {"README.md", "layers.png"}
    assert "frontier.png" not in (small_folder / "elsewhere/README.md").read_text()


def test_the_command(small_folder: Path, run: Run, tmp_path: Path) -> None:
    given = ("--base-model", BASE, "--dataset", "stanfordnlp/sst2", "--split", "test", "--license", "mit")
    code, out, err = run("card", small_folder, *given, "--language", "en", "--language", "de")
    readme = small_folder / "README.md"
    assert (code, out) == (0, f"{readme}: written\n"), err
    assert details_of_card(readme.read_text()) == DETAILS
    readme.write_text(readme.read_text() + "\nAsk me.\n")
    give_certificate(small_folder, certificate(rise=0.1))
    assert run("card", small_folder, "--license", "apache-2.0")[0] == 0
    assert details_of_card(readme.read_text()).license == "apache-2.0"
    assert details_of_card(readme.read_text()).base_model == BASE  # nobody has to give it twice
    assert own_text(readme.read_text()) == "Ask me." and "Not certified" in readme.read_text()
    out_folder = tmp_path / "model_cards" / "minilm"
    code, out, _ = run("card", small_folder, "--out", out_folder)
    assert code == 0 and {path.name for path in out_folder.iterdir()} == {"README.md", "layers.png", "frontier.png"}
    assert "It names no licence: give --license" in out


def test_a_card_that_was_changed_by_hand_stays(small_folder: Path, run: Run) -> None:
    run("card", small_folder)
    readme = small_folder / "README.md"
    readme.write_text(readme.read_text().replace("transformers", "Transformers"))
    before = readme.read_bytes()
    code, out, err = run("card", small_folder, "--license", "mit")
    assert (code, out) == (1, "")
    assert f"error: {readme} was written or changed by hand, and stays as it is. Move it away" in err
    assert readme.read_bytes() == before


def test_commands_that_are_refused(text_folder: Path, small_folder: Path, run: Run) -> None:
    assert "holds no model compressed by hf_lossless" in run("card", text_folder)[2]
    assert not (text_folder / "README.md").exists()
    assert "dataset='rows.csv' is a file" in run("card", small_folder, "--dataset", "rows.csv")[2]
    values = json.loads((small_folder / "config.json").read_text())
    values["quantization_config"]["plan"]["other_bytes"] += 1
    (small_folder / "config.json").write_text(json.dumps(values))
    assert "the plan in config.json speaks of" in run("card", small_folder)[2]
    assert not (small_folder / "README.md").exists()
