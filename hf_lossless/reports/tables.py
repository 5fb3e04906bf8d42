"""Makes the terminal output of commands: tables, sentences, JSON values."""

from collections.abc import Callable
from statistics import median
from typing import Any

from rich.markup import escape
from rich.table import Table

from hf_lossless.certification.certificate import Certificate
from hf_lossless.certification.comparison import Comparison
from hf_lossless.certification.evaluation import Evaluation
from hf_lossless.checkpoints.entry import LosslessCheckpointConfig
from hf_lossless.compression import CompressionResult
from hf_lossless.reports.pictures.neighbourhood import ORDERS, UNTIL, gaps_by_size, responses_by_kind
from hf_lossless.storage.kinds import KINDS
from hf_lossless.storage.plan import KEPT_BITS, CompressionPlan, LayerPlan, LowRank, Regime
from hf_lossless.theories.neighbourhood import Neighbourhood

SAVES_TIME = 0.85
"""Share of the dense layer's multiplications below which factors save time. Two products cost more than one with as
many multiplications: in recipes/benchmarks/low_rank.json factors took less time than the dense layer at 75 % of its
multiplications, and more at 99 %."""


def inspection(config: LosslessCheckpointConfig) -> dict[str, Any]:
    """Converts a compressed checkpoint to JSON values: its layers, its size, its ratio.

    Returns:
        "layers": for each layer kind, bits (16 stands for floating point), group_size (None: the whole row), rank
        (None: not factorised), factor_bits (of L and of R), multiplications (as a share of the dense layer's; None for
        a lookup, which has none), saves_time (whether that share is below `SAVES_TIME`), activation (bits and range of
        its quantised input; None: in floating point), cost_bytes, predicted_loss_change, regime (LoD's verdict, with
        its signal-to-noise ratio and the bounds on a wrong sign); and "size_bytes", "original_bytes", "ratio",
        "theory", "activations", "activation_noise", "predicted_loss_change", "certificate" (None: not requested).
    """
    plan = config.plan
    return {
        "layers": {name: _layer(layer) for name, layer in plan.layers.items()},
        "size_bytes": config.size_bytes,
        "original_bytes": plan.original_bytes,
        "ratio": plan.original_bytes / config.size_bytes,
        "theory": plan.theory,
        "activations": plan.activations,
        "activation_noise": plan.activation_noise,
        "predicted_loss_change": plan.predicted_loss_change,
        "certificate": None if config.certificate is None else config.certificate.to_dict(),
    }


def _layer(layer: LayerPlan) -> dict[str, Any]:
    return {
        "kind": layer.kind,
        "bits": layer.bits,
        "group_size": layer.grid.group_size if layer.grid is not None else None,
        "rank": layer.low_rank.rank if layer.low_rank is not None else None,
        "factor_bits": list(_factor_bits(layer.low_rank)) if layer.low_rank is not None else None,
        "multiplications": layer.multiplications_share,
        "saves_time": layer.multiplications_share is not None and layer.multiplications_share < SAVES_TIME,
        "activation": layer.activation.model_dump() if layer.activation is not None else None,
        "cost_bytes": layer.cost_bytes,
        "predicted_loss_change": layer.predicted_loss_change,
        "regime": _regime(layer.regime) if layer.regime is not None else None,
    }


def _factor_bits(low_rank: LowRank) -> tuple[int, int]:
    left, right = (KEPT_BITS if factor is None else factor.bits for factor in (low_rank.left, low_rank.right))
    return left, right


def _regime(regime: Regime) -> dict[str, Any]:
    return {
        "verdict": regime.verdict,
        "snr": regime.snr,
        "chebyshev": regime.chebyshev,
        "central_limit": regime.central_limit,
    }


def plan_table(plan: CompressionPlan) -> Table:
    """Makes a table of the plan, one line a layer; "predicted" is the predicted change of the loss.

    Where layers are factorised, "rank" is their rank with the widths of L and R (16: floating point), and "work" the
    multiplications as a share of the dense layer's: below about 85 % a low rank also saves time. Where inputs are
    quantised, "input" is their width and whether the range is static or dynamic. Where LoD predicted, "regime" says
    whether statistics or a measurement decided.
    """
    table = Table(title=f"plan ({plan.theory}; activations: {plan.activations})")
    table.add_column("layer", overflow="fold")
    columns = layer_columns(plan)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True, min_width=len(heading))
    for name, layer in plan.layers.items():
        table.add_row(name, *(cell(layer) for cell in columns.values()))
    rest = {"bits": "kept", "bytes": f"{plan.other_bytes:,}"}
    table.add_row("everything else", *(rest.get(heading, "") for heading in columns))
    return table


def layer_columns(plan: CompressionPlan) -> dict[str, Callable[[LayerPlan], str]]:
    """Returns the columns of a table of this plan's layers: headings, and functions from a layer to its cell.

    Columns that are empty for all layers are left out.
    """
    columns: dict[str, Callable[[LayerPlan], str]] = {"bits": _width, "group": _group}
    if any(layer.low_rank is not None for layer in plan.layers.values()):
        columns |= {"rank": _rank, "work": _work}
    if plan.activations == "quantised":
        columns["input"] = _input
    columns |= {
        "bytes": lambda layer: f"{layer.cost_bytes:,}",
        "predicted": lambda layer: f"{layer.predicted_loss_change:+.1e}",
    }
    if any(layer.regime is not None for layer in plan.layers.values()):
        columns["regime"] = lambda layer: "" if layer.regime is None else layer.regime.verdict
    return columns


def _width(layer: LayerPlan) -> str:
    return KINDS[layer.kind].width(layer)


def _group(layer: LayerPlan) -> str:
    return "" if layer.grid is None else str(layer.grid.group_size or "row")


def _input(layer: LayerPlan) -> str:
    return "" if layer.activation is None else f"{layer.activation.bits} {layer.activation.range}"


def _work(layer: LayerPlan) -> str:
    return "" if layer.multiplications_share is None else f"{layer.multiplications_share:.0%}"


def _rank(layer: LayerPlan) -> str:
    if layer.low_rank is None:
        return ""
    left, right = _factor_bits(layer.low_rank)
    return f"{layer.low_rank.rank} ({left if left == right else f'{left}, {right}'})"


def comparison_table(rows: dict[str, tuple[Evaluation, int]], original_bytes: int) -> Table:
    """Makes a table that compares models.

    Args:
        rows: Evaluation and bytes of each model by its name.
        original_bytes: Bytes of the original, for the ratios.
    """
    table = Table()
    first = next(iter(rows.values()))[0]
    for heading in ("model", "bytes", "ratio", "loss", first.metric_name, *first.other_metrics, "rows"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, (evaluation, size_bytes) in rows.items():
        table.add_row(
            name,
            f"{size_bytes:,}",
            f"{original_bytes / size_bytes:.2f}",
            f"{evaluation.loss:.4f}",
            *(f"{value:.4f}" for value in (evaluation.metric, *evaluation.other_metrics.values())),
            f"{evaluation.num_examples:,}",
        )
    return table


def comparison_text(compared: Comparison) -> str:
    """Describes the comparison of two models' answers in one sentence."""
    divergence = "" if compared.mean_kl is None else f"; mean KL divergence {compared.mean_kl:.2g}"
    return (
        f"change of the loss {compared.loss_change:+.4f} ± {compared.loss_change_error:.2g}; {compared.flips:,} "
        f"predictions changed, {compared.right_to_wrong:,} from right to wrong and {compared.wrong_to_right:,} from "
        f"wrong to right{divergence}"
    )


def certificate_table(certificate: Certificate) -> Table:
    """Makes a table of a certificate, line by line."""
    table = Table(title="certificate")
    for heading in ("", "original", "compressed"):
        table.add_column(heading, overflow="fold")
    for row in certificate.table():
        table.add_row(*map(escape, row))
    return table


def certificate_texts(result: CompressionResult) -> list[str]:
    """Lists the certificate's paragraph, and why no smaller plan is certified; empty without a certificate."""
    if result.certificate is None:
        return []
    not_smaller = [] if result.not_smaller is None else [f"Not smaller: {result.not_smaller}."]
    return [result.certificate.paragraph(), *not_smaller]


def gap_tables(found: Neighbourhood) -> list[Table]:
    """Makes tables of U by noise size, the largest first, for weights and for activations, in nats.

    "change" is the measured |dL|, U1 the gap to the first order alone, U2 the gap to both orders; each is the median
    over layers, followed by the largest value of U.
    """
    tables = []
    for kind, responses in responses_by_kind(found).items():
        if not responses:
            continue
        table = Table(title=f"noise in {kind}, median of {len(responses)} layers: U1 first order, U2 and second")
        for heading in ("noise", "change", "U1", "largest", "U2", "largest"):
            table.add_column(heading, justify="right")
        for gaps in reversed(gaps_by_size(responses)):
            cells = [f"{gaps[0].size:.0e}", f"{median(abs(gap.measured) for gap in gaps):.1e}"]
            for gap_of in ORDERS.values():
                values = [gap_of(gap) for gap in gaps]
                cells += [f"{median(values):.1e}", f"{max(values):.1e}"]
            table.add_row(*cells)
        tables.append(table)
    return tables


def layer_table(found: Neighbourhood) -> Table:
    """Makes a table of the largest noise that each order explains, layer by layer, with the tensor's rms."""
    table = Table(title="largest noise that each order explains; <: not even the smallest")
    table.add_column("layer", overflow="fold")
    for heading in ("noise in", "rms", "first", "and second"):
        table.add_column(heading, justify="left" if heading == "noise in" else "right")
    for layer in found.layers:
        for kind, response in (("weight", layer.weight), ("input", layer.inputs)):
            if response is not None:
                ends = [until(response) for until in UNTIL.values()]
                smallest = f"< {response.gaps[0].size:.0e}"
                cells = [smallest if end is None else f"{end:.0e}" for end in ends]
                table.add_row(layer.name if kind == "weight" else "", kind, f"{response.rms:.2g}", *cells)
    return table
