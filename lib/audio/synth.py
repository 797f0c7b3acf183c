"""A seeded generator of demo songs: drums, bass, chords and melody, in one key and one tempo per song. At 24 kHz most
energy lies below 4.8 kHz, the band of the embedded codec; at 48 kHz it reaches 20 kHz. A song depends on (seed, index),
rate and length, to the bit on every processor: a hash of it decides the split. Sounds are `[num_samples]`, float64."""

import io
import json
import math
import tomllib
from collections.abc import Iterator
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io.wavfile

from lib.audio.files import SAMPLE_RATE
from lib.util.errors import UserError
from lib.util.files import file_sha256, write_atomic
from lib.util.provenance import code_fingerprint

PEAK = 0.8
MUSIC = Path(__file__).with_suffix(".toml")
TABLES = tomllib.loads(MUSIC.read_text())


def drawn(rng: np.random.Generator, choices: list) -> Any:
    return choices[rng.integers(len(choices))]


class Song:
    """Key, tempo, harmony and instruments of song `index`, and the generator that draws its rhythms."""

    def __init__(self, seed: int, index: int, sample_rate: int = SAMPLE_RATE):
        self.rng = rng = np.random.default_rng([seed, index])
        self.scale = str(rng.choice(list(TABLES["scales"])))
        self.tempo = int(rng.integers(80, 141))  # beats per minute
        self.tonic = int(rng.integers(48, 60))  # MIDI note
        self.progression = drawn(rng, TABLES["progressions"][self.scale])
        self.arrangement = drawn(rng, TABLES["arrangements"])
        self.lead = str(rng.choice(["piano", "bell", "flute", "reed"]))
        self.pad = str(rng.choice(["organ", "piano", "string"]))
        self.bass = str(rng.choice(["piano", "reed", "flute"]))
        self.sample_rate = sample_rate
        self.step = 30 / self.tempo * sample_rate  # samples in an eighth note

    def note(self, degree: int) -> int:
        """MIDI note of a scale degree above the tonic; 7 is the octave."""
        octave, index = divmod(degree, 7)
        return self.tonic + 12 * octave + TABLES["scales"][self.scale][index]


def make_demo_dataset(
    root: str | Path, num_songs: int = 12, seconds: float = 40.0, seed: int = 0, sample_rate: int = SAMPLE_RATE
) -> list[Path]:
    """Write `song_00.wav`, ... (mono, 16 bit) under `root`; return their paths. Songs are kept if their length is right
    and `.songs.json` names this seed, rate and code. `UserError` for a folder with other songs."""
    root, num_samples = Path(root), round(seconds * sample_rate)
    code = [code_fingerprint("lib.audio.synth"), file_sha256(MUSIC)]
    recipe = json.dumps({"seed": seed, "sample_rate": sample_rate, "code": code})
    paths = [root / f"song_{index:02d}.wav" for index in range(num_songs)]
    try:
        root.mkdir(parents=True, exist_ok=True)
        marker = root / ".songs.json"
        songs = sorted(path for path in root.glob("song_*.wav") if path.stem.removeprefix("song_").isdigit())
        if songs and not marker.exists():
            raise UserError(f"{songs[0]}: not a generated demo song; choose another folder or move it away")
        if not marker.exists() or marker.read_text() != recipe:
            for path in songs:  # before the mark is replaced
                path.unlink()
            write_atomic(marker, recipe)
        for index, path in enumerate(paths):
            if not path.exists() or path.stat().st_size != 44 + 2 * num_samples:  # a header of 44 bytes, 16 bits each
                song, content = render_song(seed, index, num_samples, sample_rate), io.BytesIO()
                scipy.io.wavfile.write(content, sample_rate, np.rint(2**15 * song).astype("<i2"))
                write_atomic(path, content.getvalue())
    except OSError as error:
        raise UserError(f"{root}: cannot hold demo songs ({error.strerror}); choose another folder") from error
    return paths


def render_song(
    seed: int, index: int, num_samples: int, sample_rate: int = SAMPLE_RATE, parts: str = "dbcm"
) -> np.ndarray:
    """Song `index` as `[num_samples]`, float64, peak 0.8. Fewer `parts`, by first letter, make a stem at its level."""
    song = Song(seed, index, sample_rate)
    bar = 8 * song.step
    num_bars = math.ceil(num_samples / bar)
    sections = [section for section in song.arrangement for _ in range(4 if num_bars >= 12 else 2)]  # by bar
    mixes = np.zeros((2, int((num_bars + 1) * bar) + 2 * sample_rate))  # song and stem; the last notes ring out
    chords = [(number, song.progression[number % len(song.progression)]) for number in range(num_bars)]
    for letter, play in {"d": _drums, "b": _bass, "c": _chords, "m": _melody}.items():
        bars = [(number, chord) for number, chord in chords if letter in sections[number % len(sections)]]
        for number, step, sound in play(song, bars):  # all parts draw from one generator
            start = round(number * bar + step * song.step)
            mixes[: 1 + (letter in parts), start : start + len(sound)] += sound[: mixes.shape[1] - start]
    mixes = 1 - 2 / (_exp(2 * (1.2 * mixes[:, :num_samples])) + 1)  # tanh, which compresses
    fade = min(num_samples, sample_rate // 2)
    mixes[:, -fade:] *= np.linspace(1, 0, fade)
    return PEAK * mixes[1] / np.abs(mixes[0]).max()


# A part draws its pattern for a song, then plays the bars that it is given
Bars = list[tuple[int, int]]  # number, chord
Notes = Iterator[tuple[int, float, np.ndarray]]  # number of the bar, step, sound


def _drums(song: Song, bars: Bars) -> Notes:
    kicks = drawn(song.rng, TABLES["kicks"])
    hats = range(8) if song.rng.random() < 0.6 else range(0, 8, 2)
    tuning = _frequency(song.tonic)  # drums in the song's key
    seconds = np.arange(round(0.3 * song.sample_rate)) / song.sample_rate
    sweep = tuning / 4 * seconds - 4 * _exp(-30 * seconds)  # reaches a quarter of `tuning` within 0.1 s
    kick = _sin(sweep) * _exp(-12 * seconds)
    seconds = seconds[: round(0.2 * song.sample_rate)]
    # the snare's noise is smoothed by a Hann window: below about 4 kHz at 24 kHz, twice that at 48 kHz
    padded, slope = np.pad(_noise(song.rng, len(seconds)), 3), math.sqrt(0.125)
    window = (0.5 - slope, 0.5, 0.5 + slope, 1, 0.5 + slope, 0.5, 0.5 - slope)
    noise = sum(weight / 5 * padded[i : i + len(seconds)] for i, weight in enumerate(window))
    snare = (0.9 * noise + 0.5 * _sin(tuning * seconds)) * _exp(-22 * seconds)
    seconds = seconds[: round(0.08 * song.sample_rate)]
    hat = np.diff(_noise(song.rng, len(seconds) + 1)) * _exp(-70 * seconds)
    for number, _ in bars:
        yield from ((number, step, 0.9 * kick) for step in kicks)
        yield from ((number, step, 0.5 * snare) for step in (2, 6))
        yield from ((number, step, (0.12 if step % 2 else 0.2) * hat) for step in hats)
        if number % 4 == 3:  # a fill leads into the next four bars
            yield from ((number, step, 0.35 * snare) for step in (7, 7.5))


def _bass(song: Song, bars: Bars) -> Notes:
    steps = drawn(song.rng, TABLES["basses"])
    fifths = song.rng.random() < 0.5
    for number, chord in bars:
        for step, until in zip(steps, (*steps[1:], 8), strict=True):
            note = song.note((chord + 4 * (fifths and step == steps[-1])) % 7) - 12
            length = round(0.9 * (until - step) * song.step)
            yield number, step, 0.4 * _tone(song.bass, note, length, song.sample_rate)


def _chords(song: Song, bars: Bars) -> Notes:
    stabs = song.rng.random() < 0.5  # short chords off the beat, or one that lasts the bar
    steps, level, length = ((1, 3, 5, 7), 0.16, 0.8) if stabs else ((0,), 0.14, 7.8)
    for number, chord in bars:
        # close position around the tonic: each note in the octave nearest to it
        notes = [song.note((chord + third) % 7) + 12 * (third == 0 and chord == 0) for third in (0, 2, 4)]
        tones = [level * _tone(song.pad, note, round(length * song.step), song.sample_rate) for note in notes]
        yield from ((number, step, tone) for step in steps for tone in tones)


def _melody(song: Song, bars: Bars) -> Notes:
    """A motif of two bars, repeated; its notes follow the chord."""
    rhythm = [drawn(song.rng, TABLES["melodies"]) for _ in range(2)]
    moves = [np.cumsum(song.rng.choice([-2, -1, -1, 0, 1, 1, 2], size=len(steps))) for steps in rhythm]
    echo = round(3 * song.step)  # dotted quarter
    for number, chord in bars:
        steps, walk = rhythm[number % 2], moves[number % 2]
        for step, until, move in zip(steps, (*steps[1:], 8), walk - walk[0], strict=True):
            degree = 7 + chord % 7 + int(np.clip(move, -4, 5))
            if step in (0, 4):  # a chord tone on the strong beats
                degree = 7 + chord % 7 + min((-3, 0, 2, 4), key=lambda third: abs(third - move))
            length = round(0.95 * (until - step) * song.step)
            tone = 0.3 * _tone(song.lead, song.note(degree), length, song.sample_rate)
            sound = np.pad(tone, (0, echo))
            sound[echo:] += 0.25 * tone
            yield number, step, sound


@lru_cache(maxsize=256)  # a song repeats few notes
def _tone(timbre: str, note: int, num_samples: int, sample_rate: int) -> np.ndarray:
    """A note `[num_samples]` as a sum of harmonics; higher ones are weaker and decay faster."""
    amplitudes, decay, attack = TABLES["timbres"][timbre]
    frequency, seconds = _frequency(note), np.arange(num_samples) / sample_rate
    turns = frequency * seconds
    if timbre in ("flute", "string"):
        turns += 0.3 / (2 * math.pi) * _sin(5 * seconds) * np.minimum(seconds, 1)  # vibrato
    sound, highest = np.zeros(num_samples), TABLES["highest_tone"][str(sample_rate)]
    for number, amplitude in enumerate(amplitudes, start=1):
        if number * frequency < highest:
            sound += amplitude * _sin(number * turns) * _exp(-_power(number, "0.7") / decay * seconds)
    if sample_rate > SAMPLE_RATE:  # more harmonics than the timbre has, -6 dB per octave
        upper = _harmonics(turns, number + 1, int(highest / frequency))
        sound += amplitude * number * upper * _exp(-_power(2 * number, "0.7") / decay * seconds)
    release = min(num_samples, round(0.03 * sample_rate))
    envelope = np.minimum(seconds / attack, 1)
    envelope[num_samples - release :] *= np.linspace(1, 0, release)
    return sound * envelope / math.sqrt(math.fsum(amplitude * amplitude for amplitude in amplitudes))


def _harmonics(turns: np.ndarray, first: int, last: int) -> np.ndarray:
    """Σ sin(n·x)/n for n from `first` to `last`, by sin((n+1)x) = 2·cos(x)·sin(n·x) − sin((n−1)x): three sines."""
    twice, before, now = 2 * _sin(turns + 0.25), _sin((first - 1) * turns), _sin(first * turns)
    total = np.zeros(len(turns))
    for number in range(first, last + 1):
        total += now / number
        before, now = now, twice * now - before
    return total


# NumPy and the C library choose sin, exp, tanh, pow and log by the processor, and the last bits differ. The functions
# below use only what IEEE 754 defines exactly: sums, products and quotients of pairs, rounding, powers of two.
# `np.polyval` is Horner's rule.


def _sin(turns: np.ndarray) -> np.ndarray:
    """sin(2π·turns), within 1e-12: Taylor series on the quarter turn around zero."""
    shifted = turns - 0.25
    shifted -= np.rint(shifted)
    x = 0.25 - np.abs(shifted)
    return x * np.polyval(_SINE, x * x)


def _exp(x: np.ndarray) -> np.ndarray:
    """Relative error below 1e-12: 2^k·exp(r), |r| ≤ ln(2)/2, exp(r) by its Taylor series."""
    exponent = np.rint(x / math.log(2))
    return np.ldexp(np.polyval(_EXPONENTIAL, x - exponent * math.log(2)), exponent.astype(np.int32))


_EXPONENTIAL = [1 / math.factorial(n) for n in range(11, -1, -1)]
_SINE = [float((-1) ** n * (2 * Decimal(math.pi)) ** (2 * n + 1) / math.factorial(2 * n + 1)) for n in range(9, -1, -1)]


def _power(base: int, exponent: str) -> float:
    return float(Decimal(base) ** Decimal(exponent))


def _noise(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """White noise of variance 1, rounded, because NumPy computes its rare large values by a logarithm."""
    return np.rint(rng.standard_normal(num_samples) * 2**20) / 2**20


def _frequency(note: int) -> float:
    """Hz of a MIDI note; A4 = 69 = 440 Hz."""
    return float(440 * Decimal(2) ** (Decimal(note - 69) / 12))
