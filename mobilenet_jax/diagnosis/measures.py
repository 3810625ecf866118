"""Arrays to numbers: norms, ranks, and what quantised weights lose. Nothing here knows a network."""

from typing import Any

import numpy as np

from mobilenet_jax.training.dead_filters import DEAD, relative_norms

# Decibels. What is equal to float32's last bit (24 bits of 6.02 dB) is called equal.
EXACT = 144.0


def quantise(kernel: np.ndarray, *, per_channel: bool) -> np.ndarray:
    """The kernel [..., C] as symmetric int8 weights store it, in float32: 255 steps, one scale for all or each channel.

    TensorFlow Lite's quantization specification: weights in [-127, 127], zero point 0, a scale a tensor or an output
    channel; it is the largest magnitude over 127.
    """
    axes = tuple(range(kernel.ndim - 1)) if per_channel else None
    scale = np.max(np.abs(kernel), axis=axes, keepdims=True).astype(np.float64) / 127
    steps = np.round(kernel / np.where(scale > 0, scale, 1))
    return (steps * scale).astype(np.float32)


def sqnr_db(kernel: np.ndarray, quantised: np.ndarray) -> float:
    """10 log10 of the kernel's power over that of the error: 6 dB a bit. EXACT, 144, at most, and where all is 0."""
    signal = np.sum(np.square(kernel, dtype=np.float64))
    noise = np.sum(np.square(kernel.astype(np.float64) - quantised))
    return EXACT if noise <= signal * 10 ** (-EXACT / 10) else float(10 * np.log10(signal / noise))


def measure_int8(kernel: np.ndarray) -> dict:
    """What int8 costs the living filters of a kernel [..., C] (batch norm folded in), with either kind of scale.

    Returns:
      {"range_ratio": the largest channel's magnitude over the median channel's,
      "sqnr_db": {"per_tensor", "per_channel"}: of the layer as a whole,
      "channel_sqnr_db": the same two, means of each channel's own, which small channels do not vanish from,
      "lost_channels": those that round to nothing but zeros with one scale}.
    """
    channels = np.moveaxis(kernel, -1, 0).reshape(kernel.shape[-1], -1)
    living = relative_norms(kernel, np.ones(kernel.shape[-1])) >= DEAD
    found: dict = {"range_ratio": 1.0, "sqnr_db": {}, "channel_sqnr_db": {}, "lost_channels": []}
    if living.any():
        ranges = np.abs(channels[living]).max(axis=1)
        found["range_ratio"] = float(ranges.max() / np.median(ranges))
    for kind, per_channel in (("per_tensor", False), ("per_channel", True)):
        quantised = quantise(kernel, per_channel=per_channel)
        by_channel = np.moveaxis(quantised, -1, 0).reshape(channels.shape)
        pairs = zip(channels[living], by_channel[living], strict=True)
        found["sqnr_db"][kind] = sqnr_db(kernel, quantised)
        found["channel_sqnr_db"][kind] = float(np.mean([sqnr_db(*pair) for pair in pairs])) if living.any() else EXACT
        if not per_channel:
            found["lost_channels"] = np.flatnonzero(living & ~by_channel.any(axis=1)).tolist()
    return found


def effective_rank(variances: np.ndarray) -> float:
    """exp of the entropy of the variances' shares: n of n equal ones, 1 where one has all, 0 of none.

    Roy & Vetterli 2007 take singular values; here it is their squares, the eigenvalues of a covariance.
    """
    shares = _shares(variances)
    return float(np.exp(-np.sum(shares * np.log(shares)))) if shares.size else 0.0


def participation_ratio(variances: np.ndarray) -> float:
    """(sum of variances)^2 over the sum of their squares: between 1 and their number; lower than the effective rank."""
    shares = _shares(variances)
    return float(1 / np.sum(shares**2)) if shares.size else 0.0


def _shares(variances: np.ndarray) -> np.ndarray:
    # Eigenvalues of a covariance may be below 0 by a rounding.
    positive = variances[variances > 1e-12 * max(variances.max(initial=0), 0)].astype(np.float64)
    return positive / positive.sum()


def measure_rank(variances: np.ndarray) -> dict[str, float]:
    """{"effective_rank", "participation_ratio"} of variances along orthogonal directions."""
    return {
        "effective_rank": effective_rank(variances),
        "participation_ratio": participation_ratio(variances),
    }


class Moments:
    """Mean and covariance of vectors that come in batches, merged exactly (Chan, Golub & LeVeque 1979)."""

    def __init__(self):
        self.count = 0
        self.mean: Any = 0.0
        self._scatter: Any = 0.0

    def add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        """`count` vectors of a mean [C], with sums of products of deviations from it, `scatter` [C, C]."""
        if not count:
            return
        total, shift = self.count + count, mean.astype(np.float64) - self.mean
        self._scatter = self._scatter + scatter.astype(np.float64)
        self._scatter = self._scatter + np.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def variances(self) -> np.ndarray:
        """Eigenvalues [C] of the covariance."""
        return np.linalg.eigvalsh(self._scatter / self.count)


def compare_logits(logits: np.ndarray, other: np.ndarray) -> tuple[int, float]:
    """(images [B] with the same best class, sum of KL(softmax(logits) || softmax(other)) in nats) of two [B, K]."""
    log_p, log_q = (_log_softmax(x.astype(np.float64)) for x in (logits, other))
    divergence = np.sum(np.exp(log_p) * (log_p - log_q))
    return int(np.sum(logits.argmax(axis=-1) == other.argmax(axis=-1))), max(float(divergence), 0.0)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def norm_shrink(variance: np.ndarray, epsilon: float) -> np.ndarray:
    """What epsilon leaves of a channel's unit deviation: sqrt(v / (v + epsilon)), 1 / sqrt(2) where they are equal."""
    return np.sqrt(variance / (variance + epsilon))


def summarise_gradient_norms(lines: list[dict]) -> dict | None:
    """{"steps", "norms", "median", "largest", "largest_step", "last"} of the lines of metrics.jsonl; None without any.

    A line has the mean over the steps since the one before it, of norms before clipping.
    """
    pairs = [(line["step"], line["train/grad_norm"]) for line in lines if line.get("train/grad_norm") is not None]
    if not pairs:
        return None
    steps, norms = zip(*pairs, strict=True)
    largest = max(range(len(norms)), key=norms.__getitem__)
    return {
        "steps": list(steps),
        "norms": list(norms),
        "median": float(np.median(norms)),
        "largest": norms[largest],
        "largest_step": steps[largest],
        "last": norms[-1],
    }
