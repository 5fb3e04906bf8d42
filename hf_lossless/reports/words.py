"""Lists what was not checked of a compressed checkpoint, for reports and model cards."""

from hf_lossless.certification.certificate import Certificate
from hf_lossless.checkpoints.entry import LosslessCheckpointConfig
from hf_lossless.checkpoints.record import CompressionRecord
from hf_lossless.storage.kinds import KINDS
from hf_lossless.storage.plan import CompressionPlan


def limitations(config: LosslessCheckpointConfig, record: CompressionRecord | None) -> list[str]:
    """Lists what was not checked of a compressed checkpoint, in whole sentences.

    Args:
        config: The checkpoint's entry in config.json.
        record: The record of its compression; None: not known.

    Example:
        >>> from hf_lossless import CompressionPlan
        >>> plan = CompressionPlan(theory="llc", layers={}, other_bytes=4, original_bytes=4)
        >>> limitations(LosslessCheckpointConfig.of(plan), None)[0].split(":")[0]
        'Held-out rows'
    """
    texts = [*_of_rows(config.certificate), *_of_measurements(config, record)]
    if config.plan.activations == "quantised":
        texts.append(
            "Integer arithmetic: quantised inputs are simulated in floating point. The error is real, the speed is not."
        )
    return [
        *texts,
        "Speed and memory in use: neither was measured. Weights are unpacked at each call, which costs time.",
        f"The values in the files: {_of_checksums(config.plan)} Names, types and shapes of the tensors are compared "
        "with the plan when the model is loaded.",
        "What is made of this model later: training it, casting it, or taking the base model out of it makes another "
        "model, of which nothing here was measured.",
    ]


def _of_checksums(plan: CompressionPlan) -> str:
    """Describes which layers have a checksum."""
    checked = [layer for layer in plan.layers.values() if KINDS[layer.kind].checksum]
    if not checked:
        return "there is no checksum."
    share = f"{len(checked):,} of {len(plan.layers):,} layers"
    return f"{share} have a checksum, which is compared when they are loaded; all else has none."


def _of_rows(certificate: Certificate | None) -> list[str]:
    if certificate is None:
        return [
            "Held-out rows: there is no certificate, so nothing here says what the model does on rows that had no part "
            "in making it."
        ]
    evidence, provenance = certificate.evidence, certificate.provenance
    unknown = provenance.calibration_rows is None or provenance.selection_rows is None
    return [
        f"Other data: the verdict holds for rows like the {evidence.num_rows:,} that it rests on, and says nothing of "
        "rows from elsewhere.",
        *(["The part of these rows in making the model: that they had none is taken on trust."] if unknown else []),
        f"Single answers: means are tested, and {evidence.flips:,} of {evidence.num_rows:,} predictions changed.",
        f"Other metrics: only the loss and the {evidence.metric_name} were tested, over all rows together and not for "
        "groups among them.",
    ]


def _of_measurements(config: LosslessCheckpointConfig, record: CompressionRecord | None) -> list[str]:
    if record is None:
        return ["How good the predictions are: the folder does not say what was measured when the plan was made."]
    alone = {check.layer for check in record.checks if check.layer is not None}
    return [
        f"New rows: what is called measured here was measured on the {record.calibration_rows:,} calibration rows, "
        "which had a hand in the plan.",
        f"Layers by themselves: a layer's change of the loss is what the theory predicts; {len(alone):,} of "
        f"{len(config.plan.layers):,} were measured alone.",
    ]
