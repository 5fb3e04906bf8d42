"""What recipes/README.md shows of information_limit.json."""

from typing import Any


def summary(report: dict[str, Any]) -> str:
    """Plans of every model at equal budgets, and what the coder and loading take."""
    models = {name: model for name, model in report["models"].items() if "storages" in model}
    ratios = sorted(
        {float(ratio) for model in models.values() for rows in model["storages"].values() for ratio in rows}
    )
    lines = [
        "| model, storage | " + " | ".join(f"{ratio:g}x" for ratio in ratios) + " |",
        "|---" * (len(ratios) + 1) + "|",
    ]
    for name, model in models.items():
        original = model["original"]
        held_out = f"{model['test_rows']:,} rows, accuracy {original['metric']:.4f}"
        lines.append(f"| **{name}**, {held_out} |" + " |" * len(ratios))
        for storage, rows in model["storages"].items():
            lines.append(f"| {storage} | " + " | ".join(_cell(rows.get(f"{ratio:g}")) for ratio in ratios) + " |")
    gains = [f"{name} {_gains(model)}" for name, model in models.items() if model.get("gain_at_equal_divergence")]
    lines += [
        "",
        f"Ratio of the files at equal divergence, entropy over fixed (at the fixed plan's budget): {'; '.join(gains)}.",
    ]
    for name, model in models.items():
        lines += _coder(name, model)
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or "kl" not in row:
        return "" if row is None else "out of reach"
    change = f"{row['loss_change']:+.4f} ± {row['loss_change_se']:.4f}"
    return f"KL {row['kl']:.1e}, {change}, {row['metric']:.4f}, {row['flips']} flips"


def _gains(model: dict[str, Any]) -> str:
    gains = model["gain_at_equal_divergence"]
    return ", ".join(f"{gain:.2f} ({ratio}x)" for ratio, gain in gains.items() if gain is not None)


def _coder(name: str, model: dict[str, Any]) -> list[str]:
    """What the coder and loading take, where loading was measured."""
    if "loading" not in model or "coder" not in model:
        return []
    coder, over = model["coder"], model["loading"]["last_over_first"]
    times = model["loading"]
    return [
        "",
        f"`{name}` at 13x: codes take {100 * (coder['codes_over_entropy'] - 1):.2f} % more than the entropy of their "
        f"models, "
        f"all that is stored {100 * (coder['stored_over_entropy'] - 1):.1f} % more; decoding "
        f"{coder['decoded_weights_per_second'] / 1e6:.0f} M weights a second of one core. `from_pretrained` takes "
        f"{times['compressed']['load']:.2f} s against the original's {times['original']['load']:.2f} "
        f"({over['load']:.1f} times), "
        f"with a first forward pass {over['first_forward']:.1f} times, a whole process with its imports "
        f"{over['process']:.2f} times.",
    ]
