"""Dialogue by espeak-ng (the extra `speech`): speech without weights, and recognizably synthetic.

`synthesize` runs this module as a process for one text, because espeak-ng keeps state: the same text differs when spoken twice in one
process, and a fresh process gives the same samples each time. The process writes blocks to its standard output: a big-endian header
(characters of the text reached so far, size in bytes) and s16 mono samples. It may be killed at any moment. GPL-3 code stays inside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable
from typing import IO, Final

import msgspec
import numpy as np
import numpy.typing as npt

from movieq.errors import EngineUnavailable, InternalFault, InvalidInput
from movieq.pdeathsig import end_with_parent
from movieq.tasks.params import spoken_language
from workers.child.words import Words

LIMIT_S: Final = 120.0
"""5,000 characters take about 4 s; a text that takes longer than this hangs."""
SAMPLE_RATE: Final = 22_050
"""The sample rate of espeak-ng."""

_HEADER: Final = struct.Struct(">II")
_POLL_S: Final = 0.05


class Delivery(msgspec.Struct, frozen=True):
    """How a line is spoken, in espeak-ng's units.

    `rate` is in words a minute; `pitch` and its `range` are 0 to 100, where 50 is the voice's own.
    """

    rate: int = 165
    pitch: int = 50
    range: int = 50


PACES: Final = {"slow": 0.76, "normal": 1.0, "fast": 1.32}
_PACE_WORDS: Final = Words(
    {
        "slow": "slow*, measured, deliberate, deliberately, languid*, calm, calmly",
        "fast": "fast, faster, quick*, rapid*, brisk*, hurried, hurriedly, urgent, urgently",
        "normal": "normal, normally, medium, moderate, moderately, even, evenly, natural, naturally, default",
    }
)
EMOTIONS: Final = {
    "neutral": (1.0, 50, 50),
    "excited": (1.10, 72, 80),
    "happy": (1.06, 64, 68),
    "angry": (1.10, 56, 78),
    "fearful": (1.14, 70, 44),
    "tender": (0.94, 54, 40),
    "sad": (0.86, 36, 24),
    "tired": (0.82, 40, 20),
}
"""Emotion -> factor of the rate, pitch, range."""
_EMOTION_WORDS: Final = Words(
    {
        "excited": "excit*, thrill*, ecstatic*, enthusias*, elated, elation, shout*",
        "happy": "happy, happily, happier, happiness, joy*, cheer*, glad, gladly, amused, amusement, warm, warmly, warmth",
        "angry": "angry, angrily, angrier, anger, furious, furiously, fury, rage, raging, enraged, outraged, irritat*",
        "fearful": "fear*, afraid, scared, terrified, terrifying, terror, anxious, anxiously, anxiety, nervous, nervously, panic*",
        "tender": "tender, tenderly, tenderness, gentle, gently, loving, lovingly, soft, softly, soothing, soothingly, hope*, hoping",
        "sad": "sad, sadly, sadder, sadness, grief, griev*, sorrow*, mourn*, melanchol*, depress*, despair*",
        "tired": "tired, tiredly, weary, wearily, weariness, exhaust*, bored, boredom, sleepy, sleepily",
        "neutral": "neutral, neutrally, plain, plainly, flat, flatly, natural, naturally",
    }
)


_FORMS: Final = frozenset({"<font>", "<wide>", "<narrow>", "<square>", "<initial>", "<medial>", "<final>", "<isolated>"})
"""The compatibility forms that are other shapes of plain letters and digits (Unicode Standard Annex #44, table 14)."""
_SCRIPTS: Final = (
    ("Chinese characters", re.compile("[\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"), {"cmn", "yue"}),
    ("kana", re.compile("[\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff]"), {"ja"}),
    ("bopomofo", re.compile("[\u3105-\u312f\u31a0-\u31bf]"), {"cmn"}),
)
"""Scripts of which espeak-ng says "Chinese letter" or "Japanese letter" for each letter, and the languages in which it reads them."""


def delivery(pace: str | None, emotion: str | None) -> tuple[Delivery, list[str]]:
    """Return how to speak, and a warning for each word that is not known and changes nothing."""
    tempo, warnings = _PACE_WORDS.first(pace), []
    feeling = _EMOTION_WORDS.first(emotion)
    if pace and tempo is None:
        warnings.append(f"pace {pace!r} is not known and was taken as normal; known: {', '.join(PACES)}")
    if emotion and feeling is None:
        warnings.append(f"emotion {emotion!r} is not known and was taken as neutral; known: {', '.join(EMOTIONS)}")
    share, pitch, span = EMOTIONS[feeling or "neutral"]
    return Delivery(round(165 * PACES[tempo or "normal"] * share), pitch, span), warnings


def espeak_voice(language: str) -> str:
    """Return espeak-ng's name for a BCP 47 language tag."""
    primary, rest = spoken_language(language)
    if primary == "en" and not rest:
        return "en-us"
    return f"{primary}-{rest}" if rest else primary


def prepared(text: str) -> str:
    """Return the text in the characters that espeak-ng knows.

    Accents are composed with their letters (NFC); ligatures, wide and narrow forms and letters of mathematics become plain ones. Other
    compatibility characters stay, because NFKC would change what they mean: 1½, x².
    """
    return unicodedata.normalize("NFC", "".join(map(_plain, unicodedata.normalize("NFC", text))))


def _plain(character: str) -> str:
    form = unicodedata.decomposition(character).partition(" ")[0]
    if form in _FORMS or (form == "<compat>" and unicodedata.category(character) in ("Lu", "Ll", "Lt")):
        return unicodedata.normalize("NFKC", character)
    return character


def _refuse_unreadable(text: str, language: str) -> None:
    """Raise InvalidInput if the text has letters of a script that espeak-ng does not know in the language: it reads them all alike."""
    primary, _ = spoken_language(language)
    for name, letters, languages in _SCRIPTS:
        if primary not in languages and (found := "".join(dict.fromkeys(letters.findall(text)))):
            advice = "write them in kana" if primary == "ja" else "leave them out, or ask for their own language"
            raise InvalidInput(f"text: espeak-ng cannot read the {name} {found[:20]!r} in {language!r}: {advice}")


def synthesize(text: str, language: str, delivery: Delivery, progress: Callable[[int, int], None]) -> npt.NDArray[np.float32]:
    """Return the spoken text, mono at `SAMPLE_RATE`; call `progress(characters spoken, characters)` at least twenty times a second.

    An exception from `progress` ends the process. Raises EngineUnavailable without the extra, InvalidInput if nothing of the text can be
    spoken, if espeak-ng cannot read letters of it, or if it does not have the language.
    """
    if importlib.util.find_spec("espeakng_loader") is None:
        raise EngineUnavailable("dialogue needs espeak-ng, which is not installed here: pip install 'movieq[speech]'")
    text = prepared(text)
    _refuse_unreadable(text, language)
    command = [sys.executable, "-P", "-m", __name__, espeak_voice(language), str(delivery.rate), str(delivery.pitch), str(delivery.range)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            samples = _read_speech(process, text, progress)
        finally:
            process.kill()
    if not len(samples) or np.abs(samples).max() < 1e-4:
        raise InvalidInput(f"text: nothing in {text[:80]!r} can be spoken in {language!r}")
    return samples


def _read_speech(process: subprocess.Popen[bytes], text: str, progress: Callable[[int, int], None]) -> npt.NDArray[np.float32]:
    """Write the text to the process, and return the samples that it answers, -1 to 1."""
    assert process.stdin
    assert process.stdout
    assert process.stderr
    threading.Thread(target=_write_text, args=(process.stdin, text.encode()), daemon=True).start()
    buffer, samples, reached, end_s = bytearray(), bytearray(), 0, time.monotonic() + LIMIT_S
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        while True:
            progress(min(reached, len(text)), len(text))
            if time.monotonic() > end_s:
                raise InternalFault(f"espeak-ng did not finish within {LIMIT_S:.0f} s")
            if waiting.select(_POLL_S):
                part = os.read(process.stdout.fileno(), 65536)
                if not part:
                    break
                buffer += part
                reached = max(reached, _unpack(buffer, samples))
    if code := process.wait():
        words = process.stderr.read().decode(errors="replace").strip()
        if code == _NO_VOICE:
            raise InvalidInput(f"language: {words}")
        print(words[-2000:], file=sys.stderr)  # noqa: T201  # for the worker's log
        raise InternalFault(f"espeak-ng ended with {code}: the worker's log says more")
    return np.frombuffer(bytes(samples), "<i2").astype(np.float32) / np.float32(32768)


def _write_text(stdin: IO[bytes], text: bytes) -> None:
    """Write the text in a thread: a long one fills the pipe before the process reads."""
    with contextlib.suppress(BrokenPipeError), stdin:  # a process that ended early reports the reason itself
        stdin.write(text)


def _unpack(buffer: bytearray, samples: bytearray) -> int:
    """Move the samples of complete blocks from `buffer` to `samples`; return the text position that the last of them reached."""
    reached = 0
    while len(buffer) >= _HEADER.size:
        position, size = _HEADER.unpack_from(buffer)
        if len(buffer) < _HEADER.size + size:
            break
        samples += buffer[_HEADER.size : _HEADER.size + size]
        del buffer[: _HEADER.size + size]
        reached = position
    return reached


class _Voice(ctypes.Structure):
    """espeak_VOICE of speak_lib.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("xx1", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    )


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h; a list of events ends with type 0."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


_NO_VOICE: Final = 3
_SYNCHRONOUS, _UTF8 = 2, 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def main(arguments: list[str]) -> int:
    """The process: voice, rate, pitch and range as arguments, the text on standard input, blocks of samples on standard output."""
    import espeakng_loader

    end_with_parent(signal.SIGKILL)
    voice, rate, pitch, span = arguments
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # espeak-ng prints warnings to standard output
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_GetCurrentVoice.restype = ctypes.POINTER(_Voice)
    if library.espeak_Initialize(_SYNCHRONOUS, 200, espeakng_loader.get_data_path().encode(), 0) != SAMPLE_RATE:
        raise RuntimeError("espeak_Initialize failed")
    wanted = _Voice(languages=voice.encode())
    if library.espeak_SetVoiceByProperties(ctypes.byref(wanted)) != 0 or not _speaks(library.espeak_GetCurrentVoice().contents, voice):
        sys.stderr.write(f"{voice!r} is not a language of espeak-ng")
        return _NO_VOICE
    for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, span)):
        library.espeak_SetParameter(parameter, int(value), 0)
    position = 0

    def write_block(wave: ctypes._Pointer[ctypes.c_short], count: int, events: ctypes._Pointer[_Event]) -> int:
        nonlocal position
        index = 0
        while events[index].type != 0:
            position = max(position, events[index].text_position)
            index += 1
        if count > 0:
            out.write(_HEADER.pack(position, 2 * count) + ctypes.string_at(wave, 2 * count))
            out.flush()
        return 0

    callback = _CALLBACK(write_block)  # a variable, so that it is not freed while espeak-ng uses it
    library.espeak_SetSynthCallback(callback)
    text = sys.stdin.buffer.read() + b"\0"
    if library.espeak_Synth(text, len(text), 0, 0, 0, _UTF8, None, None) != 0:
        raise RuntimeError("espeak_Synth failed")
    return 0


def _speaks(found: _Voice, voice: str) -> bool:
    """Whether the voice that espeak-ng chose speaks the language: its list is (priority byte, name, NUL), repeated."""
    primary = voice.partition("-")[0]
    first: bytes = found.languages[1:]
    return first.decode().partition("-")[0] == primary


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
