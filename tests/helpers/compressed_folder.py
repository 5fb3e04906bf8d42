"""A compressed checkpoint on disk, with a certificate of made-up outputs."""

import json
from pathlib import Path

import torch
from tiny_checkpoints import text_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lossless import LosslessCheckpointConfig, LosslessCompressionConfig
from hf_lossless.certification.certificate import Certificate, Provenance
from hf_lossless.certification.certify import certify
from hf_lossless.certification.comparison import Outputs
from hf_lossless.checkpoints.record import record_of, write_record

PROVENANCE = Provenance(data_fingerprint="ab12", calibration_rows=12, selection_rows=300, theory="curvature", seed=0)


def certificate(rise: float = 0.0, rows: int = 4000) -> Certificate:
    """Of a model whose loss rose by so much, and that answers as before."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(rows, generator=generator, dtype=torch.float64)
    answers = torch.zeros(rows, dtype=torch.long)
    scores = (losses < 0.9).float()
    noise = 0.001 * torch.randn(rows, generator=generator, dtype=torch.float64)
    original, compressed = Outputs(losses, scores, answers), Outputs(losses + rise + noise, scores, answers)
    return certify(original, compressed, PROVENANCE, metric_name="accuracy")


def save_compressed(text_folder: Path, folder: Path, *, certified: Certificate | None = None) -> Path:
    """A tiny text classifier, compressed, with its tokenizer."""
    config = LosslessCompressionConfig(text_rows(), ratio=2)
    model = AutoModelForSequenceClassification.from_pretrained(text_folder, quantization_config=config)
    model.save_pretrained(folder)
    write_record(folder, record_of(model.hf_quantizer.result))
    AutoTokenizer.from_pretrained(text_folder).save_pretrained(folder)
    if certified is not None:
        give_certificate(folder, certified)
    return folder


def give_certificate(folder: Path, certified: Certificate | None) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    entry = LosslessCheckpointConfig.from_dict(values["quantization_config"])
    assert isinstance(entry, LosslessCheckpointConfig)
    values["quantization_config"] = LosslessCheckpointConfig.of(entry.plan, certified).to_dict()
    path.write_text(json.dumps(values, indent=2))
