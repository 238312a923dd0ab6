"""Spoken words to train on: eSpeak NG says them, in many languages and voices, and `log_mel` is what a network hears.

    "seven" ──▶ eSpeak NG ──▶ wave (22,050 numbers a second) ──▶ power by frequency, every 12.5 ms ──▶ 40 bands on the
    mel scale ──▶ logarithm, mean 0 and spread 1 ──▶ (64 frames, 40 bands)

The synthesiser comes as a library with the package `espeakng-loader` (GPL-3) of `pip install "minipeft[beyond]"`. It is
called as it is, through ctypes; nothing of it is copied here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import random
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from minipeft.world.real import SourceError, package_folder

RATE = 22_050  # samples a second
FRAMES, BANDS, HOP, WINDOW = 64, 40, 276, 552  # 12.5 ms a step, 25 ms a window; 64 frames are 0.8 s
CHARACTERS, UTF8, SYNCHRONOUS = 1, 1, 2  # of speak_lib.h: position type, flag, output mode
SPEED, PITCH, RANGE = 1, 3, 4  # of speak_lib.h: espeak_PARAMETER
VARIANTS = "espeak-ng-data/voices/!v"
LOCK = threading.Lock()

WORDS = {
    "en": "zero one two three four five six seven eight nine",
    "de": "null eins zwei drei vier fünf sechs sieben acht neun",
}
VOICES = ("m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3", "f4")
# What is said, in which voices, and how high (eSpeak's pitch goes from 0 to 99).
WORLDS = {
    "English": ("en", VOICES, (25, 65)),
    "whispered": ("en", ("whisper", "whisperf"), (25, 65)),
    "children": ("en", ("f1", "f2", "f5"), (90, 99)),
    "German": ("de", VOICES, (25, 65)),
}
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Spoken(NamedTuple):
    """`x` (n, 64, 40), log-mel frames; `y` (n,), the digit."""

    x: torch.Tensor
    y: torch.Tensor


def say(text: str, voice: str = "en", pitch: int = 50, speed: int = 175, span: int = 50) -> np.ndarray:
    """The wave of a spoken text, floats from −1 to 1 at 22,050 a second, without silence at its ends.

    `voice`: a language, or with a variant "en+f2"; `pitch` and its `span` from 0 to 99; `speed` in words a minute, from
    80 to 450. The same call gives the same wave: the library remembers its breath and its trembling from word to word,
    so each word has it opened anew, which takes 1 ms.

    Raises ValueError for values beyond these, an unknown voice, and a text of which nothing is heard;
    ModuleNotFoundError without the package, SourceError if its library does not open.
    """
    for name, value, low, high in (("pitch", pitch, 0, 99), ("speed", speed, 80, 450), ("span", span, 0, 99)):
        if isinstance(value, bool) or not (isinstance(value, int) and low <= value <= high):
            raise ValueError(f"{name}={value!r} is not a whole number from {low} to {high}.")
    parts, data = [], text.encode()

    def hear(wave, n: int, _events) -> int:
        if wave and n:
            parts.append(np.ctypeslib.as_array(wave, (n,)).copy())
        return 0

    with LOCK, opened() as library:
        callback = CALLBACK(hear)  # kept, or it would be collected while the library still calls it
        library.espeak_SetSynthCallback(callback)
        variant = voice.partition("+")[2]
        known = not variant or (package_folder("espeakng_loader", "beyond") / VARIANTS / variant).is_file()
        if not known or library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"There is no voice {voice!r}; write a language, and a variant if you like: en+f2.")
        for name, value in ((SPEED, speed), (PITCH, pitch), (RANGE, span)):
            library.espeak_SetParameter(name, value, 0)
        library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, CHARACTERS, 0, UTF8, None, None)
    wave = np.concatenate(parts or [np.zeros(0, np.int16)]).astype(np.float32) / 32768
    loud = np.flatnonzero(np.abs(wave) > 0.01)
    if not len(loud):
        raise ValueError(f"Nothing is heard of {text!r} in the voice {voice!r}: give it a word.")
    return wave[loud[0] : loud[-1] + 1]


@contextlib.contextmanager
def opened() -> Iterator[ctypes.CDLL]:
    """eSpeak NG's library, as it is when nothing was said yet; closed afterwards."""
    folder = package_folder("espeakng_loader", "beyond")
    import _ctypes

    import espeakng_loader

    try:
        library = ctypes.CDLL(espeakng_loader.get_library_path())
    except OSError as error:
        raise SourceError(f"The synthesiser in {folder} does not open on this machine ({error}).") from error
    try:
        if library.espeak_Initialize(SYNCHRONOUS, 0, str(folder).encode(), 0) != RATE:
            raise SourceError(f"The synthesiser in {folder} lacks its voices: reinstall espeakng-loader.")
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # of its breath, which else follows the clock
        yield library
        library.espeak_Terminate()
    finally:
        getattr(_ctypes, "dlclose", getattr(_ctypes, "FreeLibrary", None))(library._handle)


@functools.cache
def filters() -> torch.Tensor:
    """(frequencies, 40): how much each band hears of each frequency, triangles on Slaney's mel scale."""
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(WINDOW // 2 + 1, BANDS, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(bank).float()


def log_mel(wave: np.ndarray, frames: int = FRAMES) -> torch.Tensor:
    """ln(mel power + 10⁻⁶) of a wave, scaled to mean 0 and spread 1: (frames, 40). What is longer is cut, and silence
    follows what is shorter. Raises ValueError for a wave that is empty or not finite."""
    if not len(wave) or not np.isfinite(wave).all():
        raise ValueError("A wave needs at least one number, and all of them finite.")
    wave = torch.nn.functional.pad(torch.from_numpy(np.asarray(wave, np.float32)), (0, frames * HOP))[: frames * HOP]
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(wave, WINDOW, HOP, window=window, center=True, return_complex=True)[:, :frames]
    mel = (spectrum.abs().square().T @ filters() + 1e-6).log()
    return (mel - mel.mean()) / mel.std().clamp_min(1e-6)


def spoken(world: str, n: int, seed: int = 0, noise: float = 0.02) -> Spoken:
    """`n` of each digit in one of WORLDS, each in a voice, at a pitch and a speed that `seed` draws, in white noise.

    Raises ValueError for an unknown world or n below 1.
    """
    if world not in WORLDS:
        raise ValueError(f"There is no world {world!r}: choose one of {', '.join(WORLDS)}.")
    if n < 1:
        raise ValueError(f"n={n} of each digit is none: give at least 1.")
    language, voices, (low, high) = WORLDS[world]
    rng, found, y = random.Random(f"{world} {seed}"), [], []
    hiss = np.random.default_rng(rng.getrandbits(32))
    for _ in range(n):
        for digit, word in enumerate(WORDS[language].split()):
            voice = f"{language}+{rng.choice(voices)}"
            wave = say(word, voice, rng.randint(low, high), rng.randint(130, 230), rng.randint(30, 70))
            found.append(log_mel(wave + noise * hiss.standard_normal(len(wave)).astype(np.float32)))
            y.append(digit)
    return Spoken(torch.stack(found), torch.tensor(y))


def ast(seed: int = 0) -> torch.nn.Module:
    """An audio spectrogram transformer with random weights: patches of 8×8, 4 blocks of width 64, 10 classes.

    141,770 numbers. Source: Gong et al. 2021, "AST"; transformers' own class.
    """
    from transformers import ASTConfig, ASTForAudioClassification

    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    patches = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = ASTConfig(max_length=FRAMES, num_mel_bins=BANDS, num_labels=10, **patches, **sizes)
        return ASTForAudioClassification(config).eval()
