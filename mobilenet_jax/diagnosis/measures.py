"""Measures of arrays: ranks, norms, and the loss of quantised weights. Nothing here knows a network."""

from typing import Any

import numpy as np

from mobilenet_jax.training.dead_filters import DEAD, relative_norms

# Decibels: 24 bits of 6.02 dB. Arrays that agree to float32's last bit are called equal.
EXACT = 144.0


def quantise(kernel: np.ndarray, *, per_channel: bool) -> np.ndarray:
    """Round a kernel [..., C] to the values that symmetric int8 weights can have, and return them in float32.

    As TensorFlow Lite's quantization specification says: weights in [-127, 127], zero point 0, one scale for the tensor
    or one for each output channel. The scale is the largest magnitude over 127.
    """
    axes = tuple(range(kernel.ndim - 1)) if per_channel else None
    scale = np.max(np.abs(kernel), axis=axes, keepdims=True).astype(np.float64) / 127
    steps = np.round(kernel / np.where(scale > 0, scale, 1))
    return (steps * scale).astype(np.float32)


def sqnr_db(kernel: np.ndarray, quantised: np.ndarray) -> float:
    """Return the signal-to-quantisation-noise ratio in dB (6 dB per bit); EXACT at most, and for a kernel of zeros."""
    signal = np.sum(np.square(kernel, dtype=np.float64))
    noise = np.sum(np.square(kernel.astype(np.float64) - quantised))
    return EXACT if noise <= signal * 10 ** (-EXACT / 10) else float(10 * np.log10(signal / noise))


def measure_int8(kernel: np.ndarray) -> dict:
    """Measure what int8 costs the living filters of a kernel [..., C] with the batch norm folded in.

    Returns:
      {"range_ratio": the largest channel's magnitude over the median channel's,
      "sqnr_db": {"per_tensor", "per_channel"}: of the layer as a whole,
      "channel_sqnr_db": the same two keys: the mean of each channel's SQNR, in which small channels count fully,
      "lost_channels": channels that become all zeros with one scale per tensor}.
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
    """Return exp(entropy) of the variances' shares: n for n equal variances, 1 if one has all, 0 if there is none.

    Roy & Vetterli 2007 use singular values; here their squares are used, the eigenvalues of a covariance.
    """
    shares = _shares(variances)
    return float(np.exp(-np.sum(shares * np.log(shares)))) if shares.size else 0.0


def participation_ratio(variances: np.ndarray) -> float:
    """Return (sum of variances)^2 / sum of their squares: from 1 to their number, at most the effective rank."""
    shares = _shares(variances)
    return float(1 / np.sum(shares**2)) if shares.size else 0.0


def _shares(variances: np.ndarray) -> np.ndarray:
    # Rounding may bring eigenvalues of a covariance below 0.
    positive = variances[variances > 1e-12 * max(variances.max(initial=0), 0)].astype(np.float64)
    return positive / positive.sum()


def measure_rank(variances: np.ndarray) -> dict[str, float]:
    """Return {"effective_rank", "participation_ratio"} of variances along orthogonal directions."""
    return {
        "effective_rank": effective_rank(variances),
        "participation_ratio": participation_ratio(variances),
    }


class Moments:
    """The mean and covariance of vectors, merged exactly batch by batch (Chan, Golub & LeVeque 1979)."""

    def __init__(self):
        self.count = 0
        self.mean: Any = 0.0
        self._scatter: Any = 0.0

    def add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        """Add `count` vectors with their mean [C] and the sums of products of deviations from it, `scatter` [C, C]."""
        if not count:
            return
        total, shift = self.count + count, mean.astype(np.float64) - self.mean
        self._scatter = self._scatter + scatter.astype(np.float64)
        self._scatter = self._scatter + np.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def variances(self) -> np.ndarray:
        """Return the eigenvalues [C] of the covariance."""
        return np.linalg.eigvalsh(self._scatter / self.count)


def compare_logits(logits: np.ndarray, other: np.ndarray) -> tuple[int, float]:
    """Compare logits [B, K] with other logits [B, K].

    Returns:
      (the number of images with the same best class, the sum of KL(softmax(logits) || softmax(other)) in nats).
    """
    log_p, log_q = (_log_softmax(x.astype(np.float64)) for x in (logits, other))
    divergence = np.sum(np.exp(log_p) * (log_p - log_q))
    return int(np.sum(logits.argmax(axis=-1) == other.argmax(axis=-1))), max(float(divergence), 0.0)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def norm_shrink(variance: np.ndarray, epsilon: float) -> np.ndarray:
    """Return the standard deviation of normalised channels, sqrt(v / (v + epsilon)): 1 where epsilon is negligible."""
    return np.sqrt(variance / (variance + epsilon))


def summarise_gradient_norms(lines: list[dict]) -> dict | None:
    """Summarise the gradient norms in lines of metrics.jsonl; None if there are none.

    A line has the mean of the norms, before clipping, over the steps since the line before it.

    Returns:
      {"steps", "norms", "median", "largest", "largest_step", "last"}.
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
