"""How often a certificate is wrong, and how often it is given. Writes certificate.json.

    python recipes/benchmarks/certificate.py [--assets DIR] [--only PART ...]

Everything is simulated where the truth is known: at the border of the hypothesis, where a test errs most.

- `levels`: wrong passes of ten bounds of a mean, over distributions and numbers of rows.
- `proportions`: wrong passes of three tests of paired proportions, summed over all outcomes, not sampled.
- `walks`: 1,000 walks of 8 plans for each distribution; a walk is wrong if it certifies a plan that is not good.
- `real`: the same with differences of real losses, resampled from compressed models and moved to the border, and how
  often a model of no true difference passes at the default settings. It alone needs `--assets`.

Models take about four minutes, the rest about five, on one core. Tables go into recipes/README.md as well.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from assets import add_assets_option, assets_folder
from certificate_tables import summary
from readme import write_part
from scipy import stats

from hf_lossless import LosslessCompressionConfig
from hf_lossless.certification.certify import CONFIDENCE, METRIC_MARGIN, TOLERANCE
from hf_lossless.certification.non_inferiority import required_rows
from hf_lossless.certification.proportions import non_inferiority_p_value, score
from hf_lossless.certification.skewed_mean import skewed_p_value
from hf_lossless.data.rows import load_rows, make_batches
from hf_lossless.data.tasks.registry import task_named

_HERE = Path(__file__).resolve().parent
_ALPHA = 1 - CONFIDENCE
_SAMPLES, _SLOW_SAMPLES, _RESAMPLES, _WALKS, _PLANS = 4_000, 500, 500, 1_000, 8

Sampler = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _rare(rate: float) -> Sampler:
    """Rows that hardly change, but for a few that get worse by about 1."""
    return lambda g, shape: (
        g.normal(0, 0.05, shape) + (g.random(shape) < rate) * g.exponential(1, shape) - rate  # mean 0
    )


def _classifier(g: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Cross-entropy of two classes whose logits got heavy-tailed noise; its mean is known by quadrature."""
    margin, noise = g.normal(2.5, 2, shape), 0.4 * g.standard_t(3, shape)
    return np.logaddexp(0, -(margin + noise)) - np.logaddexp(0, -margin) - _classifier_mean()


@cache
def _classifier_mean() -> float:
    levels = (np.arange(4000) + 0.5) / 4000
    margin, noise = 2.5 + 2 * stats.norm.ppf(levels)[:, None], 0.4 * stats.t.ppf(levels, 3)
    return float((np.logaddexp(0, -(margin + noise)) - np.logaddexp(0, -margin)).mean())


DISTRIBUTIONS: dict[str, Sampler] = {
    "normal": lambda g, shape: g.standard_normal(shape),
    "exponential": lambda g, shape: g.exponential(1, shape) - 1,
    "lognormal, sigma 1": lambda g, shape: g.lognormal(0, 1, shape) - np.exp(0.5),
    "lognormal, sigma 1.5": lambda g, shape: g.lognormal(0, 1.5, shape) - np.exp(1.125),
    "Pareto, index 3": lambda g, shape: g.pareto(3, shape) - 1 / 2,
    "Pareto, index 2.5": lambda g, shape: g.pareto(2.5, shape) - 1 / 1.5,
    "Pareto, index 2.5, both sides": lambda g, shape: g.pareto(2.5, shape) * np.where(g.random(shape) < 0.5, 1, -1),
    "Student, 3 degrees": lambda g, shape: g.standard_t(3, shape),
    "3 % of rows worse": _rare(0.03),
    "1 % of rows worse": _rare(0.01),
    "classifier with noisy logits": _classifier,
    "lognormal to the left": lambda g, shape: np.exp(0.5) - g.lognormal(0, 1, shape),
}


# Ten bounds, each as the share of samples in which it passes


def _t(x: np.ndarray) -> np.ndarray:
    return x.mean(1) / (x.std(1, ddof=1) / np.sqrt(x.shape[1]))


def _hall(t: np.ndarray, skew: np.ndarray, n: int) -> np.ndarray:
    return t + skew * t**2 / (3 * np.sqrt(n)) + skew**2 * t**3 / (27 * n) + skew / (6 * np.sqrt(n))


def _johnson(x: np.ndarray) -> np.ndarray:
    n, skew, t = x.shape[1], stats.skew(x, axis=1), _t(x)
    return t + skew * (1 / (6 * np.sqrt(n)) + t**2 / (3 * np.sqrt(n)))


def _worst_twice(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, x.max(1, keepdims=True)], axis=1)


def _signed_roots(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the empirical likelihood of mean 0 (r), and with its saddlepoint correction: the Bayesian bootstrap (r*)."""
    x = x / np.abs(x).max(1, keepdims=True)
    low, high = (1 / np.where(side, edge, 1e-12) for side, edge in ((x.min(1) < 0, x.min(1)), (x.max(1) > 0, x.max(1))))
    for _ in range(60):
        t = (low + high) / 2
        below = (x / (1 - t[:, None] * x)).sum(1) < 0
        low, high = np.where(below, t, low), np.where(below, high, t)
    y = 1 - t[:, None] * x
    r = np.sign(t) * np.sqrt(np.maximum(2 * np.log(y).sum(1), 0))
    u = t * np.sqrt(((x / y) ** 2).sum(1))
    near = np.abs(r) < 1e-4
    return r, np.where(near, r, r + np.log(np.where(near, 1, u / np.where(near, 1, r))) / np.where(near, 1, r))


_FAST: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Student's t": lambda x: _t(x) < stats.t.ppf(_ALPHA, x.shape[1] - 1),
    "Johnson": lambda x: _johnson(x) < stats.t.ppf(_ALPHA, x.shape[1] - 1),
    "Hall": lambda x: _hall(_t(x), stats.skew(x, axis=1), x.shape[1]) < stats.norm.ppf(_ALPHA),
    "t, worst row twice": lambda x: _t(_worst_twice(x)) < stats.t.ppf(_ALPHA, x.shape[1]),
    "Hall, worst row twice (ours)": lambda x: skewed_p_value(x) < _ALPHA,
}


def _slow(x: np.ndarray, g: np.random.Generator) -> dict[str, np.ndarray]:
    """The bounds that resample or solve an equation; resamples are shared by all samples of a chunk."""
    n = x.shape[1]
    passed = {
        "empirical likelihood": _signed_roots(x)[0] > stats.norm.isf(_ALPHA),
        "empirical likelihood, worst row twice": _signed_roots(_worst_twice(x))[0] > stats.norm.isf(_ALPHA),
        "Bayesian bootstrap, worst row twice": _signed_roots(_worst_twice(x))[1] > stats.norm.isf(_ALPHA),
    }
    counts = g.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES).T
    mean = x.mean(1, keepdims=True)
    centred = x - mean
    first, second = centred @ counts / n, centred**2 @ counts / n
    spread = np.sqrt(np.maximum(second - first**2, 1e-300))
    passed["bootstrap-t"] = (first / spread <= mean / centred.std(1, keepdims=True)).mean(1) < _ALPHA
    bias = stats.norm.ppf((first < 0).mean(1).clip(1 / _RESAMPLES, 1 - 1 / _RESAMPLES))
    acceleration = stats.skew(x, axis=1) / (6 * np.sqrt(n))
    z = bias + stats.norm.isf(_ALPHA)
    level = np.where(acceleration * z < 1, stats.norm.cdf(bias + z / (1 - acceleration * z)), 1)
    upper = np.array([np.quantile(row, one) for row, one in zip(first, level, strict=True)]) + mean[:, 0]
    passed["bootstrap BCa"] = upper < 0
    return passed


def levels(seed: int = 0) -> dict[str, Any]:
    """Share of wrong passes at the border, by distribution, rows and bound."""
    table: dict[str, Any] = {}
    for name, sampler in DISTRIBUTIONS.items():
        for n in (100, 300, 1000):
            g = np.random.default_rng(seed)
            passed: dict[str, list[np.ndarray]] = {}
            for chunk in range(0, _SAMPLES, 500):
                x = sampler(g, (500, n))
                shares = {bound: passes(x) for bound, passes in _FAST.items()}
                if chunk < _SLOW_SAMPLES:
                    shares |= _slow(x, g)
                for bound, share in shares.items():
                    passed.setdefault(bound, []).append(share)
            row = {bound: round(float(np.concatenate(share).mean()), 4) for bound, share in passed.items()}
            table.setdefault(name, {})[f"{n} rows"] = row
    return {"samples": _SAMPLES, "samples of resampling and likelihood": _SLOW_SAMPLES, "wrong passes": table}


def proportions() -> dict[str, Any]:
    """The largest chance of a wrong pass over all shares of changed rows, exactly."""
    result = {}
    for n in (100, 200, 500, 1000):
        for margin in (0.0, METRIC_MARGIN, 0.02):
            changed = margin + np.geomspace(1e-4, 0.1, 40)
            most = int(stats.binom.isf(1e-9, n, (changed[-1] + margin) / 2))
            lost, gained = np.arange(most + 1)[:, None], np.arange(most + 1)[None, :]
            fall = (lost - gained) / n
            spread = np.sqrt(np.maximum((lost + gained) / n - fall**2, 0) / n)
            passes = {
                "exact (ours)": _exact_region(n, margin, most),
                "score test, normal": score(lost, gained, n, margin) > stats.norm.isf(_ALPHA),
                "Wald": fall + stats.norm.isf(_ALPHA) * spread < margin,
            }
            worst = dict.fromkeys(passes, 0.0)
            for share in changed:
                p, q = (share + margin) / 2, (share - margin) / 2
                chance = stats.binom.pmf(lost, n, p) * stats.binom.pmf(gained, n - lost, q / (1 - p))
                for name, region in passes.items():
                    worst[name] = max(worst[name], float((chance * region).sum()))
            result[f"{n} rows, margin {margin}"] = {name: round(value, 4) for name, value in worst.items()}
    return result


def _exact_region(n: int, margin: float, most: int) -> np.ndarray:
    """Which outcomes pass: for each number lost, all from some number gained on."""
    region = np.zeros((most + 1, most + 1), bool)
    first = 0
    for lost in range(most + 1):
        while first <= most and not _metric_passes(lost, first, n, margin):
            first += 1
        region[lost, first:] = True
    return region


@cache
def _metric_passes(lost: int, gained: int, n: int, margin: float) -> bool:
    return non_inferiority_p_value(lost, gained, n, margin) < _ALPHA


def _wrong(passed: np.ndarray, good: int) -> dict[str, Any]:
    """Share of walks [walks, plans] that pass a plan behind the first `good`, with its Clopper-Pearson interval."""
    reached = np.cumprod(passed, axis=1).sum(1)  # a walk stops at the first failure
    wrong = int((reached > good).sum())
    interval = stats.binomtest(wrong, len(passed)).proportion_ci(0.95)
    return {
        "wrong walks": round(wrong / len(passed), 4),
        "interval": [round(interval.low, 4), round(interval.high, 4)],
        "walks that certify every good plan": round(float((reached >= good).mean()), 4),
    }


def walks(seed: int = 1) -> dict[str, Any]:
    """Walks over 8 plans: none or four good ones, one at the border, the others worse.

    A row's difference is the same for all plans with chance one half, else drawn anew, so that plans' tests depend on
    each other as those of one model's plans do. The metric is let pass.
    """
    result: dict[str, Any] = {}
    for name, sampler in DISTRIBUTIONS.items():
        g = np.random.default_rng(seed)
        spread = float(sampler(g, (200_000,)).std())
        for n in (300, 1000):
            for good in (0, 4):
                # In standard errors of the mean: good plans are seen to be good, the first bad one is at the border.
                shift = np.array([-6.0] * good + [0.0] + [0.5 * step for step in range(1, _PLANS - good)])
                passed = []
                for _ in range(0, _WALKS, 100):
                    common, own = sampler(g, (100, 1, n)), sampler(g, (100, _PLANS, n))
                    x = np.where(g.random((100, _PLANS, n)) < 0.5, common, own)
                    passed.append(skewed_p_value(x + (shift * spread / np.sqrt(n))[:, None]) < _ALPHA)
                result.setdefault(name, {})[f"{n} rows, {good} good plans"] = _wrong(np.concatenate(passed), good)
    return {"walks": _WALKS, "plans": _PLANS, "by distribution": result, "metric at the border": _metric_walks(seed)}


def _metric_walks(seed: int) -> dict[str, Any]:
    """Walks whose loss is let pass; accuracy falls by exactly the margin from the first bad plan on."""
    result = {}
    for n in (1000, 3000):
        for changed in (0.01, 0.04):
            g = np.random.default_rng(seed)
            fall = np.array([-0.004] * 2 + [METRIC_MARGIN] * 2)
            passed = np.zeros((_WALKS, len(fall)), bool)
            for plan, one in enumerate(fall):
                chances = [(changed + one) / 2, (changed - one) / 2, 1 - changed]
                outcomes = g.multinomial(n, chances, size=_WALKS)
                passed[:, plan] = [
                    _metric_passes(int(lost), int(gained), n, METRIC_MARGIN) for lost, gained, _ in outcomes
                ]
            result[f"{n} rows, {changed:.0%} change"] = _wrong(passed, good=2)
    return result


# Real losses


def _losses(model: Any, task: Any, rows: Any, processor: Any) -> tuple[np.ndarray, np.ndarray]:
    losses, scores = [], []
    for batch in make_batches(rows, task, processor, model, 64):
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits
        losses.append(task.example_losses(logits, labels))
        scores.append(task.predict(logits) == labels)
    return torch.cat(losses).double().numpy(), torch.cat(scores).numpy()


def real_models(assets: Path) -> dict[str, dict[str, np.ndarray]]:
    """Per-row losses and scores of originals and compressed models, on rows that were not calibrated on."""
    sources = {
        "minilm-sst2": ("text-classification", ["minilm-sst2/test.jsonl", "minilm-sst2/validation.jsonl"]),
        "resnet-fashion-mnist": ("image-classification", ["fashion-mnist/test.parquet"]),
    }
    calibration = {"minilm-sst2": "minilm-sst2/train.jsonl", "resnet-fashion-mnist": "fashion-mnist/validation.parquet"}
    ratios = {"minilm-sst2": (6, 9), "resnet-fashion-mnist": (8, 12)}
    found = {}
    for name, (task_name, files) in sources.items():
        task, folder = task_named(task_name), str(assets / name)
        processor = task.load_processor(folder)
        rows = datasets.concatenate_datasets([load_rows(str(assets / file)) for file in files])
        original, right = _losses(task.load_model(folder).eval(), task, rows, processor)
        for ratio in ratios[name]:
            config = LosslessCompressionConfig(dataset=str(assets / calibration[name]), ratio=ratio, theory="curvature")
            model = task.load_model(folder, quantization_config=config).eval()
            losses, scores = _losses(model, task, rows, processor)
            found[f"{name}, ratio {ratio}"] = {
                "original": original,
                "compressed": losses,
                "fall": right.astype(int) - scores.astype(int),
            }
    return found


def real(models: dict[str, dict[str, np.ndarray]], seed: int = 2) -> dict[str, Any]:
    """Wrong walks of one plan at the border, and power, over rows drawn from the real ones with replacement."""
    result = {}
    for name, found in models.items():
        original, difference = found["original"], found["compressed"] - found["original"]
        spread = difference - TOLERANCE * original
        needed = required_rows(TOLERANCE * original.mean(), spread.std(), spread.max() - spread.mean(), CONFIDENCE)
        entry: dict[str, Any] = {
            "rows": len(original),
            "original loss": round(float(original.mean()), 4),
            "change of the loss": round(float(difference.mean()), 5),
            "standard deviation of differences": round(float(difference.std()), 4),
            "skewness": round(float(stats.skew(difference)), 2),
            "largest over standard deviation": round(float(difference.max() / difference.std()), 1),
            "changed answers": round(float((found["fall"] != 0).mean()), 4),
            "rows required": needed,
        }
        at_border = spread - spread.mean()
        for n in (300, 1000, 3000):
            entry[f"{n} rows, wrong"] = _wrong(_resampled(at_border, n, seed)[:, None], good=0)
        # No true difference: both tests at their defaults, and the loss alone.
        no_change = spread - difference.mean()
        for n in (1000, 3000, 10_000):
            entry[f"{n} rows, loss passes"] = round(float(_resampled(no_change, n, seed).mean()), 3)
            entry[f"{n} rows, accuracy passes"] = _metric_power(found["fall"], n, seed)
        entry["at the rows required, loss passes"] = round(float(_resampled(no_change, needed or 2, seed).mean()), 3)
        result[name] = entry
    return result


def _resampled(values: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Whether each sample passes, as many as there are walks."""
    g = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // n)
    passed = [
        skewed_p_value(values[g.integers(len(values), size=(min(chunk, _WALKS - start), n))]) < _ALPHA
        for start in range(0, _WALKS, chunk)
    ]
    return np.concatenate(passed)


def _metric_power(fall: np.ndarray, n: int, seed: int) -> float:
    """How often accuracy passes where as many rows are won as lost."""
    changed = float((fall != 0).mean())
    outcomes = np.random.default_rng(seed).multinomial(n, [changed / 2, changed / 2, 1 - changed], size=200)
    return float(np.mean([_metric_passes(int(lost), int(gained), n, METRIC_MARGIN) for lost, gained, _ in outcomes]))


def main() -> None:
    parts: dict[str, Callable[[], Any]] = {
        "levels": levels,
        "proportions": proportions,
        "walks": walks,
        "real": lambda: real(real_models(assets)),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_assets_option(parser)
    parser.add_argument(
        "--only", nargs="+", choices=parts, default=list(parts), help="leave the other parts as they are"
    )
    arguments = parser.parse_args()
    if "real" in arguments.only:
        assets = assets_folder(parser, arguments)
    file = _HERE / "certificate.json"
    for name in arguments.only:
        start = time.perf_counter()
        found = parts[name]()
        print(name, f"{time.perf_counter() - start:.0f} s", flush=True)
        result: dict[str, Any] = json.loads(file.read_text())
        result["settings"] = {"confidence": CONFIDENCE, "tolerance": TOLERANCE, "metric margin": METRIC_MARGIN}
        result[name] = found
        file.write_text(json.dumps(result, indent=1) + "\n")
        write_part("certificate", summary(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
