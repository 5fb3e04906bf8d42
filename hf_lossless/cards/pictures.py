"""The pictures beside a card: PNG files, by name."""

import io

from matplotlib.figure import Figure

from hf_lossless.checkpoints.record import CompressionRecord
from hf_lossless.pictures.frontier import frontier_figure
from hf_lossless.pictures.layers import layers_figure
from hf_lossless.storage.plan import CompressionPlan

LAYERS, FRONTIER = "layers.png", "frontier.png"

CAPTIONS = {
    LAYERS: "How each layer is stored: bits of a weight, and ranks where there are any",
    FRONTIER: "The best plan for every size: predicted change of the loss, and that of the chosen one as measured on "
    "the calibration rows",
}
"""What is said of each picture to those who do not see it."""


def card_pictures(plan: CompressionPlan, record: CompressionRecord | None) -> dict[str, bytes]:
    """The pictures that there are of a compression; without a record there is no frontier.

    Example:
        >>> from hf_lossless.storage.plan import Grid, LayerPlan
        >>> layer = LayerPlan(kind="grid", grid=Grid(bits=3), cost_bytes=9, predicted_loss_change=0.0)
        >>> plan = CompressionPlan(theory="llc", layers={"head": layer}, other_bytes=0, original_bytes=64)
        >>> {name: content[1:4] for name, content in card_pictures(plan, None).items()}
        {'layers.png': b'PNG'}
    """
    pictures = {LAYERS: _png(layers_figure(plan))}
    return pictures if record is None else {**pictures, FRONTIER: _png(frontier_figure(record))}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
