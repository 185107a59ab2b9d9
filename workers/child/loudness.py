"""Loudness by ITU-R BS.1770-4, as broadcasters measure it, and setting it."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from workers.child.media import Samples

BLOCK_S: Final = 0.4
STEP_S: Final = 0.1
ABSOLUTE_GATE: Final = -70.0
RELATIVE_GATE: Final = -10.0
CEILING: Final = 0.891
"""-1 dBFS: lossy encoders overshoot."""


def lufs(samples: Samples, rate: int) -> float:
    """Integrated loudness; -inf for silence. What is shorter than a block is taken as one."""
    power = (_k_weighted(samples, rate) ** 2).sum(axis=1)
    block, step = int(BLOCK_S * rate), int(STEP_S * rate)
    total = np.concatenate([[0.0], np.cumsum(power)])
    starts = np.arange(0, max(1, len(power) - block + 1), step)
    ends = np.minimum(starts + block, len(power))
    blocks = (total[ends] - total[starts]) / (ends - starts)
    blocks = blocks[blocks > _power(ABSOLUTE_GATE)]
    if not len(blocks):
        return float("-inf")
    loud = blocks[blocks > blocks.mean() * 10 ** (RELATIVE_GATE / 10)]
    return float(-0.691 + 10 * np.log10(loud.mean()))


def at(samples: Samples, rate: int, target: float) -> Samples:
    """The samples at that loudness, peaks rounded off below -1 dBFS; silence stays silence."""
    level = lufs(samples, rate)
    if not np.isfinite(level):
        return samples
    for _ in range(3):  # rounding peaks off costs a little loudness: asked for again
        louder = limited(samples * np.float32(10 ** ((target - level) / 20)))
        if abs(short := target - lufs(louder, rate)) < 0.2:
            break
        level -= short
    return louder


def limited(samples: Samples) -> Samples:
    """Peaks bent smoothly below the ceiling: unchanged up to 0.6, tanh above."""
    knee = 0.6
    size = np.abs(samples)
    bent = knee + (CEILING - knee) * np.tanh((size - knee) / (CEILING - knee))
    return np.where(size > knee, np.sign(samples) * bent, samples).astype(np.float32)


def _power(level: float) -> float:
    return float(10 ** ((level + 0.691) / 10))


def _k_weighted(samples: Samples, rate: int) -> npt.NDArray[np.float64]:
    """The samples through the head's high shelf and the low cut of BS.1770, both applied in the frequency domain."""
    size = 1 << (len(samples) + rate // 10).bit_length()  # zeros behind, so that nothing wraps round
    spectrum = np.fft.rfft(samples.astype(np.float64), size, axis=0)
    z = np.exp(-2j * np.pi * np.arange(size // 2 + 1) / size)[:, None]
    for b, a in (_shelf(rate), _low_cut(rate)):
        spectrum *= (b[0] + b[1] * z + b[2] * z**2) / (1 + a[0] * z + a[1] * z**2)
    return np.asarray(np.fft.irfft(spectrum, size, axis=0)[: len(samples)])


def _shelf(rate: int) -> tuple[tuple[float, float, float], tuple[float, float]]:
    """The pre-filter for any rate: the analogue values behind the 48 kHz table (Brecht De Man, "Evaluation of implementations", 2014)."""
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
    f0, q = 38.13547087613982, 0.5003270373253953
    k = np.tan(np.pi * f0 / rate)
    a0 = 1 + k / q + k * k
    return (1.0, -2.0, 1.0), (2 * (k * k - 1) / a0, (1 - k / q + k * k) / a0)
