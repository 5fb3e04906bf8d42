"""What a person sees of a neighbourhood in a terminal: tables in the form of LLC's Table 1."""

from statistics import median

from rich.table import Table

from hf_lossless.pictures.neighbourhood import ORDERS, UNTIL, gaps_by_size, responses_by_kind
from hf_lossless.theories.neighbourhood import Neighbourhood


def gap_tables(found: Neighbourhood) -> list[Table]:
    """U by noise size, the largest first, for weights and for activations, in nats.

    "change" is the measured |dL|, U1 the gap to the first order alone, U2 to both; each the median over layers, and
    beside U the largest of a layer.
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
    """Up to which noise each order explains every smaller one, layer by layer, beside the rms of what carries it."""
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
