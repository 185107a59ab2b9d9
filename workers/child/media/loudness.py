"""Measuring loudness by ITU-R BS.1770-4, as broadcasters do, and setting it."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from workers.child.media.encode import Samples

STEP_S: Final = 0.1
HOPS_A_BLOCK: Final = 4
"""A block is 400 ms long; blocks overlap by 75 %."""
ABSOLUTE_GATE: Final = -70.0
"""LUFS; quieter blocks do not count."""
RELATIVE_GATE: Final = -10.0
"""LU below the mean of the blocks; quieter blocks do not count."""
PEAK_CEILING: Final = 0.891
"""-1 dBFS: lossy encoders overshoot."""


def lufs(samples: Samples, rate: int) -> float:
    """Return the integrated loudness in LUFS; -inf for silence. Sound shorter than a block counts as one block."""
    hops = _hop_energies(samples, rate)
    blocks = np.convolve(hops, np.ones(HOPS_A_BLOCK), "valid") / (HOPS_A_BLOCK * int(STEP_S * rate))
    if len(hops) < HOPS_A_BLOCK:
        blocks = np.array([hops.sum() / len(samples)])
    blocks = blocks[blocks > _power(ABSOLUTE_GATE)]
    if not len(blocks):
        return float("-inf")
    loud = blocks[blocks > blocks.mean() * 10 ** (RELATIVE_GATE / 10)]
    return float(-0.691 + 10 * np.log10(loud.mean()))


def normalize(samples: Samples, rate: int, target_lufs: float) -> Samples:
    """Return the samples at that loudness, with peaks limited to -1 dBFS; silence stays silent."""
    level = lufs(samples, rate)
    if not np.isfinite(level):
        return samples
    for _ in range(3):  # limiting peaks costs a little loudness: make up for it
        louder = limit_peaks(samples * np.float32(10 ** ((target_lufs - level) / 20)))
        if abs(shortfall := target_lufs - lufs(louder, rate)) < 0.2:
            break
        level -= shortfall
    return louder


def limit_peaks(samples: Samples) -> Samples:
    """Return the samples with soft-clipped peaks: unchanged up to 0.6, a tanh curve above, never beyond the ceiling."""
    knee = np.float32(0.6)
    room = np.float32(PEAK_CEILING) - knee
    out = samples.copy()
    loud = np.abs(samples) > knee
    amplitude = np.abs(samples[loud])
    out[loud] = np.sign(samples[loud]) * (knee + room * np.tanh((amplitude - knee) / room))
    return out


def _power(level: float) -> float:
    return float(10 ** ((level + 0.691) / 10))


def _hop_energies(samples: Samples, rate: int) -> npt.NDArray[np.float64]:
    """Return the energy of all channels in each 100 ms, after the high shelf and the low cut of BS.1770.

    Both filters are applied in the frequency domain, ten seconds at a time with half a second before them, by when the low cut has decayed:
    an hour needs no more memory than a minute. A rest shorter than a hop counts only if there is nothing else.
    """
    hop, part, lead = int(STEP_S * rate), 10 * rate // int(STEP_S * rate) * int(STEP_S * rate), rate // 2
    size = 1 << (part + lead + rate // 4).bit_length()  # zero padding, so that the filter does not wrap around
    z = np.exp(-2j * np.pi * np.arange(size // 2 + 1) / size)
    response = np.ones_like(z)
    for b, a in (_shelf(rate), _low_cut(rate)):
        response *= (b[0] + b[1] * z + b[2] * z**2) / (1 + a[0] * z + a[1] * z**2)
    energies = []
    for start in range(0, len(samples), part):
        first, last = max(0, start - lead), min(len(samples), start + part)
        power = np.zeros(last - start)
        for channel in samples[first:last].T:
            weighted = np.fft.irfft(np.fft.rfft(channel, size) * response, size)
            power += weighted[start - first : last - first] ** 2
        whole = len(power) // hop * hop or len(power)
        energies.append(power[:whole].reshape(-1, min(hop, whole)).sum(axis=1))
    return np.concatenate(energies)


def _shelf(rate: int) -> tuple[tuple[float, float, float], tuple[float, float]]:
    """Return (b, a) of the pre-filter for any rate.

    From the analogue values behind the 48 kHz table (Brecht De Man, "Evaluation of implementations", 2014).
    """
    f0, gain, q = 1681.9744509555319, 3.99984385397, 0.7071752369554193
    k = np.tan(np.pi * f0 / rate)
    vh = 10 ** (gain / 20)
    vb = vh**0.499666774155
    a0 = 1 + k / q + k * k
    return (
        ((vh + vb * k / q + k * k) / a0, 2 * (k * k - vh) / a0, (vh - vb * k / q + k * k) / a0),
        (2 * (k * k - 1) / a0, (1 - k / q + k * k) / a0),
    )


def _low_cut(rate: int) -> tuple[tuple[float, float, float], tuple[float, float]]:
    """Return (b, a) of the high-pass filter (RLB weighting)."""
    f0, q = 38.13547087613982, 0.5003270373253953
    k = np.tan(np.pi * f0 / rate)
    a0 = 1 + k / q + k * k
    return (1.0, -2.0, 1.0), (2 * (k * k - 1) / a0, (1 - k / q + k * k) / a0)
