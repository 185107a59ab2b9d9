"""Ambience without recordings: rain, wind, a street, synthesized from shaped noise and small events.

Every sound is a loop: its noise is built in the frequency domain and is periodic, its swells have whole cycles, its events wrap around the
end. The same generator gives the same samples. Samples are stereo float32 (n, 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from workers.child.media.encode import Samples
from workers.child.words import Words

Rng = np.random.Generator
Mono = npt.NDArray[np.float32]

LOOP_S: Final = 8
"""Length of a loop."""
CROSSFADE_S: Final = 0.25
"""Length of the crossfade between two scenes."""


def named_sounds(text: str) -> tuple[str, ...]:
    """Return the sounds that a text names, in the order of `SOUNDS`; empty if it names none."""
    named = _WORDS.named(text)
    return tuple(name for name in SOUNDS if name in named)


def loop(names: tuple[str, ...], rate: int, rng: Rng) -> Samples:
    """Return `LOOP_S` seconds of the sounds mixed together, (n, 2), peak 1."""
    sound = sum((_normalize_peak(SOUNDS[name](LOOP_S * rate, rate, rng)) for name in names), start=np.zeros((LOOP_S * rate, 2), np.float32))
    return _normalize_peak(sound)


def _normalize_peak(sound: Samples) -> Samples:
    return np.asarray(sound / max(float(np.abs(sound).max()), 1e-9), np.float32)


def bed(scenes: Sequence[tuple[str, ...]], length: int, rate: int, rng: Rng, changes: Sequence[int] = ()) -> Samples:
    """Return `length` samples of ambience, the sounds of one scene after another.

    Scenes change at the samples `changes` if there are enough of them, else evenly spaced, with an equal-power crossfade of a quarter
    second.
    """
    loops = {scene: loop(scene, rate, rng) for scene in dict.fromkeys(scenes)}
    starts = [0, *_change_points(changes, len(scenes) - 1, length)]
    out = np.zeros((length, 2), np.float32)
    fade = max(1, int(CROSSFADE_S * rate))
    for number, (scene, start) in enumerate(zip(scenes, starts, strict=True)):
        last_one = number + 1 == len(scenes)
        first = max(0, start - fade // 2) if number else 0
        last = length if last_one else min(length, starts[number + 1] + fade // 2)
        part = np.take(loops[scene], np.arange(first, last), axis=0, mode="wrap")
        n = min(fade, len(part))
        ramp = np.linspace(0, np.pi / 2, n, dtype=np.float32)[:, None]
        if number:
            part[:n] *= np.sin(ramp)
        if not last_one:
            part[len(part) - n :] *= np.cos(ramp)
        out[first:last] += part
    return out


def _change_points(changes: Sequence[int], count: int, length: int) -> list[int]:
    """Return `count` sample positions in order: evenly chosen from the picture changes if there are enough, else evenly spaced."""
    if len(changes) < count:
        return [length * (i + 1) // (count + 1) for i in range(count)]
    return [changes[i * len(changes) // count] for i in range(count)]


def _noise(n: int, rate: int, rng: Rng, shape: Callable[[npt.NDArray[np.floating]], npt.NDArray[np.floating]]) -> Mono:
    """Return periodic noise with RMS 1; `shape` gives its amplitude spectrum over Hz."""
    hertz = np.fft.rfftfreq(n, 1 / rate)
    hertz[0] = hertz[1]
    amplitude = shape(hertz)
    amplitude[0] = 0
    spectrum = amplitude * np.exp(2j * np.pi * rng.random(len(hertz)))
    samples = np.fft.irfft(spectrum, n)
    return np.asarray(samples / np.sqrt(np.mean(samples**2)), np.float32)


def _stereo(
    n: int, rate: int, rng: Rng, shape: Callable[[npt.NDArray[np.floating]], npt.NDArray[np.floating]], width: float = 0.7
) -> Samples:
    """Return noise in two channels that are independent by the share `width`."""
    middle, left, right = (_noise(n, rate, rng, shape) for _ in range(3))
    return np.stack([middle * (1 - width) + left * width, middle * (1 - width) + right * width], axis=1)


def _swell(n: int, rng: Rng, cycles: range, depth: float) -> Mono:
    """Return a slow modulation around 1, a sum of sines with whole cycles in the loop."""
    t = np.arange(n, dtype=np.float32) * np.float32(2 * np.pi / n)
    waves = sum((np.sin(t * c + np.float32(rng.uniform(0, 6.28))) / len(cycles) for c in cycles), start=np.zeros(n, np.float32))
    return np.asarray(1 + depth * waves, np.float32)


def _band(low: float, high: float, slope: float = 0.0) -> Callable[[npt.NDArray[np.floating]], npt.NDArray[np.floating]]:
    """Return a band-pass spectrum with soft edges (12 dB an octave), tilted by a power `slope` of frequency."""

    def shape(hertz: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        return np.asarray(hertz**slope / (1 + (low / hertz) ** 4) ** 0.5 / (1 + (hertz / high) ** 4) ** 0.5)

    return shape


def _scatter(n: int, rate: int, rng: Rng, times: npt.NDArray[np.float64], event: Callable[[], Mono], spread: float = 0.8) -> Samples:
    """Return stereo sound with an event at each of `times` (s), panned at random, wrapped around the end of the loop."""
    out = np.zeros((n, 2), np.float32)
    for time in times:
        sound = event()
        side = float(rng.uniform(-spread, spread))
        index = (int(time * rate) + np.arange(len(sound))) % n
        np.add.at(out, index, sound[:, None] * np.array([(1 - side) / 2, (1 + side) / 2], np.float32) * 1.4)
    return out


def _burst(rate: int, rng: Rng, seconds: float, low: float, high: float, decay: float) -> Mono:
    """Return band-limited noise with an exponential decay."""
    n = max(16, int(seconds * rate))
    t = np.arange(n, dtype=np.float32) / rate
    return _noise(n, rate, rng, _band(low, min(high, rate * 0.45))) * np.exp(-t * decay)


def _tone(rate: int, hertz: float, seconds: float, decay: float, bend: float = 0.0) -> Mono:
    t = np.arange(int(seconds * rate), dtype=np.float32) / rate
    return np.asarray(np.sin(2 * np.pi * hertz * (t + bend * t * t)) * np.exp(-t * decay), np.float32)


def _rain(n: int, rate: int, rng: Rng) -> Samples:
    hiss = _stereo(n, rate, rng, _band(900, 9000, -0.35)) * 0.22 * _swell(n, rng, range(1, 4), 0.3)[:, None]
    low = _stereo(n, rate, rng, _band(120, 700, -0.5)) * 0.05
    drops = _scatter(n, rate, rng, rng.uniform(0, n / rate, 260), lambda: _drop(rate, rng))
    return hiss + low + drops


def _drop(rate: int, rng: Rng) -> Mono:
    return _tone(rate, float(rng.uniform(1400, 3600)), 0.03, float(rng.uniform(120, 260)), 6) * float(rng.uniform(0.05, 0.4))


def _wind(n: int, rate: int, rng: Rng) -> Samples:
    body = _stereo(n, rate, rng, _band(60, 420, -0.6)) * (_swell(n, rng, range(1, 5), 1.0) ** 2)[:, None]
    whistle = _stereo(n, rate, rng, _band(520, 680), 0.5) * (_swell(n, rng, range(2, 6), 1.1) ** 3)[:, None] * 0.16
    return body * 0.5 + whistle


def _city(n: int, rate: int, rng: Rng) -> Samples:
    hum = _stereo(n, rate, rng, _band(40, 300, -0.9), 0.4) * 0.5
    traffic = _stereo(n, rate, rng, _band(200, 1800, -0.7)) * _swell(n, rng, range(1, 6), 0.9)[:, None] * 0.2
    horns = _scatter(n, rate, rng, rng.uniform(0, n / rate, 2), lambda: _horn(rate, rng))
    return hum + traffic + horns


def _horn(rate: int, rng: Rng) -> Mono:
    low, seconds = float(rng.uniform(320, 420)), float(rng.uniform(0.25, 0.5))
    t = np.arange(int(seconds * rate)) / rate
    envelope = np.minimum(1, np.minimum(t / 0.03, (seconds - t) / 0.12))
    voice = sum(np.sin(2 * np.pi * low * ratio * k * t) / k for ratio in (1, 1.26) for k in (1, 2, 3))
    return np.asarray(voice * envelope * 0.06, np.float32)


def _room(n: int, rate: int, rng: Rng) -> Samples:
    air = _stereo(n, rate, rng, _band(80, 900, -0.9), 0.5) * 0.5
    t = np.arange(n) / rate
    mains = sum(np.sin(2 * np.pi * 50 * k * t) / k**1.5 for k in (1, 2, 3, 4))  # 50 Hz has whole cycles in the loop
    return air + np.asarray(mains, np.float32)[:, None] * 0.06


def _footsteps(n: int, rate: int, rng: Rng) -> Samples:
    count = 16  # two a second: a walk
    times = (np.arange(count) + rng.normal(0, 0.03, count)) * (n / rate / count) % (n / rate)
    return _scatter(n, rate, rng, times, lambda: _footstep(rate, rng), 0.25) + _room(n, rate, rng) * 0.02


def _footstep(rate: int, rng: Rng) -> Mono:
    out = np.zeros(int(0.3 * rate), np.float32)
    for delay, level in ((0.0, 1.0), (0.07, 0.45)):  # heel and ball
        thud = _tone(rate, float(rng.uniform(80, 105)), 0.14, 34) * 0.9
        grit = _burst(rate, rng, 0.07, 700, 4200, 60) * 0.20
        start = int(delay * rate)
        out[start : start + len(thud)] += thud * level
        out[start : start + len(grit)] += grit * level
    return out * float(rng.uniform(0.75, 1.0))


def _fire(n: int, rate: int, rng: Rng) -> Samples:
    roar = _stereo(n, rate, rng, _band(50, 380, -0.5)) * _swell(n, rng, range(3, 14), 0.9)[:, None] * 0.18
    hiss = _stereo(n, rate, rng, _band(2500, 9000)) * 0.012
    crackle = _scatter(
        n,
        rate,
        rng,
        rng.uniform(0, n / rate, 130),
        lambda: _burst(rate, rng, 0.02, 1200, 8000, float(rng.uniform(180, 700))) * float(rng.exponential(0.16)),
    )
    return roar + hiss + crackle


def _sea(n: int, rate: int, rng: Rng) -> Samples:
    t = np.arange(n) / n
    out = _stereo(n, rate, rng, _band(40, 300, -0.6)) * 0.15
    for offset, level in ((0.12, 1.0), (0.58, 0.8)):  # two waves a loop: each gathers, breaks, and draws back over the stones
        phase = (t - offset) % 1
        breaking = np.where(phase < 0.12, (phase / 0.12) ** 2, np.exp(-(phase - 0.12) * 7))
        drawing = np.exp(-(((phase - 0.34) / 0.12) ** 2))
        out += _stereo(n, rate, rng, _band(120, 1600, -0.45)) * (breaking * level * 0.5).astype(np.float32)[:, None]
        out += (
            _stereo(n, rate, rng, _band(1800, 8000, -0.2)) * ((breaking * 0.3 + drawing * 0.25) * level * 0.35).astype(np.float32)[:, None]
        )
    return out


def _crowd(n: int, rate: int, rng: Rng) -> Samples:
    """Walla: many unintelligible voices, each a buzz through two formants, in syllables."""
    out = _stereo(n, rate, rng, _band(200, 1200, -0.6)) * 0.10
    for _ in range(14):
        side = float(rng.uniform(0.15, 0.85))
        voice = _babble(n, rate, rng)
        out += voice[:, None] * np.array([1 - side, side], np.float32) * 0.16
    return out


def _babble(n: int, rate: int, rng: Rng) -> Mono:
    pitch = float(rng.uniform(95, 230))
    syllables = int(rng.integers(24, 40))
    t = np.arange(n) / n
    talk = np.clip(
        np.sin(2 * np.pi * syllables * t + rng.uniform(0, 6)) + 0.4 * np.sin(2 * np.pi * int(rng.integers(2, 6)) * t + rng.uniform(0, 6)),
        0,
        1,
    )
    drift = 0.06 * pitch * np.sin(2 * np.pi * int(rng.integers(3, 9)) * t) * n / rate / (2 * np.pi * 6)
    phase = 2 * np.pi * (round(pitch * n / rate) * t + drift)
    formants = (float(rng.uniform(400, 750)), float(rng.uniform(1000, 1900)))
    voice = np.zeros(n)
    for k in range(1, 12):
        hertz = pitch * k
        gain = sum(1 / (1 + ((hertz - f) / 130) ** 2) for f in formants) + 0.05
        voice += np.sin(k * phase) * gain / k**0.4
    return np.asarray(voice * talk * 0.4, np.float32)


def _thunder(n: int, rate: int, rng: Rng) -> Samples:
    def roll() -> Mono:
        length = int(3.5 * rate)
        t = np.arange(length, dtype=np.float32) / rate
        crack = _noise(length, rate, rng, _band(60, 2500, -0.8)) * np.exp(-t * 6)
        rumble = (
            _noise(length, rate, rng, _band(25, 160, -0.4))
            * np.exp(-t * 1.1)
            * np.minimum(1, t * 4)
            * _swell(length, rng, range(5, 16), 1.0)
        )
        return np.asarray(crack * 0.6 + rumble, np.float32)

    return _scatter(n, rate, rng, rng.uniform(0, n / rate, 2), roll, 0.4) + _rain(n, rate, rng) * 0.12


def _birds(n: int, rate: int, rng: Rng) -> Samples:
    def song() -> Mono:
        start = float(rng.uniform(2200, 4800))
        notes = [
            _chirp(rate, start * float(rng.uniform(0.85, 1.2)), float(rng.uniform(0.05, 0.14)), rng) for _ in range(int(rng.integers(3, 8)))
        ]
        return np.concatenate(notes) * float(rng.uniform(0.1, 0.6))

    air = _stereo(n, rate, rng, _band(200, 3000, -0.8)) * 0.03
    return air + _scatter(n, rate, rng, rng.uniform(0, n / rate, 11), song, 0.9)


def _chirp(rate: int, hertz: float, seconds: float, rng: Rng) -> Mono:
    t = np.arange(int(seconds * rate)) / rate
    sweep = float(rng.uniform(-0.25, 0.35))
    envelope = np.sin(np.pi * t / seconds) ** 1.5
    sound = np.sin(2 * np.pi * hertz * (t + sweep * t**2 / (2 * seconds))) * envelope
    return np.asarray(np.concatenate([sound, np.zeros(int(0.03 * rate))]), np.float32)


def _night(n: int, rate: int, rng: Rng) -> Samples:
    t = np.arange(n) / rate
    out = _stereo(n, rate, rng, _band(80, 500, -0.8)) * 0.05
    for side, hertz, pulse in ((0.25, 4100.0, 14.0), (0.75, 4550.0, 16.5), (0.6, 3800.0, 12.0)):
        trill = np.clip(np.sin(2 * np.pi * pulse * t), 0, 1) ** 2 * np.clip(np.sin(2 * np.pi * (1.0 + side) * t) + 0.55, 0, 1)
        cricket = np.asarray(np.sin(2 * np.pi * min(hertz, rate * 0.4) * t) * trill, np.float32)
        out += cricket[:, None] * np.array([1 - side, side], np.float32) * 0.2
    return out


def _engine(n: int, rate: int, rng: Rng) -> Samples:
    t = np.arange(n) / rate
    hum = sum(np.sin(2 * np.pi * 45 * k * t + k) / k for k in range(1, 9))
    return (
        np.asarray(hum, np.float32)[:, None] * 0.22 * _swell(n, rng, range(1, 3), 0.2)[:, None]
        + _stereo(n, rate, rng, _band(60, 900, -0.7)) * 0.2
    )


SOUNDS: Final[dict[str, Callable[[int, int, Rng], Samples]]] = {
    "thunder": _thunder,
    "rain": _rain,
    "wind": _wind,
    "sea": _sea,
    "fire": _fire,
    "footsteps": _footsteps,
    "crowd": _crowd,
    "city": _city,
    "birds": _birds,
    "night": _night,
    "engine": _engine,
    "room": _room,
}
"""Name -> function of (samples, rate, rng) that returns a loop."""

_WORDS: Final = Words(
    {
        "thunder": "thunder*, storm, stormy, lightning",
        "rain": "rain, rainy, raining, rainfall, rainstorm, raindrop, drizzl*, downpour",
        "wind": "wind, windy, windswept, breeze, breezy, gust, gusty, gusting, blizzard",
        "sea": "sea, seaside, seashore, ocean, wave, surf, shore, shoreline, beach, river, riverside, water, waterfall",
        "fire": "fire, fireplace, fireside, flame, flaming, crackl*, burning, campfire",
        "footsteps": "footstep, steps, walking, running",
        "crowd": "crowd, crowded, people, chatter*, murmur*, audience, walla, restaurant, cafe, café, bar, party, parties, market",
        "city": "city, cities, traffic, street, cars, urban, horn",
        "birds": "bird, birdsong, forest, morning, meadow, garden",
        "night": "night, nighttime, cricket, insect, cicada",
        "engine": "engine, motor, motorcycle, machine, machinery, spaceship, train, generator, car, plane, drone",
        "room": "room, interior, office, hum, humming, silence, quiet, tone",
    }
)
