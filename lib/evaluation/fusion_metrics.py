"""Objective metrics of fused sound against its two clips, by librosa, mir_eval and a packaged transcriber. Training
uses none of this code; its hits (`lib.audio.features`) are built much like these onsets, its notes are not.

Onsets are those of hits, not of notes, which `notes` measures. A hit is short and raises most of a band; a note lasts
and raises its partials only. So what lasts is removed first (the median over 0.2 s of each frequency), and a band rises
by the median over its frequencies. Legend: N samples, M mel bands, K bands, F frames of a spectrogram (75 a second).

The transcriber is basic-pitch (Bittner et al., ICASSP 2022, doi 10.1109/ICASSP43922.2022.9746549), a network of 17,000
parameters by Spotify, Apache-2.0 (`basic_pitch.LICENSE`).
"""

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import librosa
import mir_eval
import numpy as np
import onnxruntime
from scipy.ndimage import maximum_filter1d, median_filter
from scipy.signal import find_peaks
from torch import Tensor

from lib.audio.files import SAMPLE_RATE
from lib.model.rms_law import pair_rms

HOP = 320
FFT = 1024
LASTING = 17  # frames
EDGES = 0, 150, 2400, 4800, 12000  # Hz, of bands that count alike: a kick, a snare's body and noise, a hi-hat
EMPTY = 10**-4.5  # of a clip's power: −45 dB; what leaks past the upper end of a codec lies below
NOTE = 0.3  # posterior above which there is a note
CHROMA_FFT = 4096  # 5.9 Hz a bin
CHROMA_HOP = 4 * HOP  # 53 ms
# of the transcriber, whose windows are a whole number of frames apart
NOTE_RATE, NOTE_HOP = 22_050, 256  # 86 frames a second
WINDOW = 2 * NOTE_RATE - NOTE_HOP  # 172 frames
MARGIN, KEPT = 15, 141  # frames of a window: dropped at its ends, used
PITCHES = 88  # semitones from A0, 27.5 Hz


@dataclass(frozen=True)
class SoundFeatures:
    """The features of one clip that `sound_metrics` compares."""

    mel: np.ndarray  # power [M, F]
    rises: np.ndarray  # of each band's level, from hits [K, F − 5]: two frames at each end see padding
    full: np.ndarray  # which bands are not empty [K]
    notes: np.ndarray  # whether each of 88 notes sounds [frames of 11.6 ms, 88]
    beats: np.ndarray  # s
    strength: np.ndarray  # librosa's onset strength [F]
    chroma: np.ndarray  # librosa's share of each pitch class minus 1/12 [12, frames of 53 ms]
    rms: float
    peak: float  # largest absolute sample
    movement: float  # standard deviation over mean of the RMS of 250 segments: 0 for a sound of constant level


def sound_features(wav: Tensor) -> SoundFeatures:
    """Features of a clip `[C, N]`, the channels' mean, at 24 kHz, N at least 320 (`ValueError`). A non-finite clip
    counts as silence."""
    samples = wav.mean(0).float().cpu().numpy()
    if len(samples) < HOP:
        raise ValueError(f"onsets need at least {HOP} samples, got {len(samples)}")
    samples = samples if np.isfinite(samples).all() else np.zeros_like(samples)
    spectrum = np.abs(librosa.stft(samples.astype(float), n_fft=FFT, hop_length=HOP))
    inner = slice(2, -2) if spectrum.shape[1] > 8 else slice(None)  # a clip that begins or ends in a note is no hit
    hits = np.square((spectrum - median_filter(spectrum, (1, LASTING))).clip(0))[:, inner]
    rises = np.diff(np.log(hits + 1e-3 * hits.max() + 1e-20), axis=1)
    frequencies = librosa.fft_frequencies(sr=SAMPLE_RATE, n_fft=FFT)
    bands = [(frequencies >= low) & (frequencies < high) for low, high in itertools.pairwise(EDGES)]
    power = np.square(spectrum)
    levels = np.array([band.sum() * np.median(power[band, inner].sum(axis=1)) for band in bands])
    strength = librosa.onset.onset_strength(y=samples, sr=SAMPLE_RATE, hop_length=HOP)
    # not `beat_track`: where two processes compile it at once, numba stores what crashes (its issue 10128)
    span = min(384, len(strength) // 2 * 2)  # frames, 5.1 s
    pulse = librosa.beat.plp(
        onset_envelope=strength, sr=SAMPLE_RATE, hop_length=HOP, win_length=span, tempo_min=60, tempo_max=240
    )
    classes = librosa.feature.chroma_stft(
        y=samples, sr=SAMPLE_RATE, n_fft=CHROMA_FFT, hop_length=CHROMA_HOP, tuning=0.0, norm=1
    )  # [12, frames], zeros where there is silence
    length = len(samples) // 250
    envelope = np.sqrt(np.square(samples[: 250 * length].astype(float)).reshape(250, length).mean(axis=1) + 1e-10)
    return SoundFeatures(
        librosa.feature.melspectrogram(S=power, sr=SAMPLE_RATE, norm=None),
        # below a millionth it is rounding, which is another on each processor
        np.stack([np.median(rises[band], axis=0) for band in bands]).clip(0).round(6),
        levels > EMPTY * power.sum(),
        note_posteriors(samples) > NOTE,
        find_peaks(pulse)[0] * HOP / SAMPLE_RATE,
        strength,
        np.where(classes.sum(axis=0) > 0, classes - 1 / 12, 0.0),  # or two silent passages would match
        float(np.sqrt(np.square(samples.astype(float)).mean())),
        float(np.abs(samples).max()),
        float(envelope.std(ddof=1) / envelope.mean()),
    )


@functools.cache
def _network() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # the same sums on any machine
    path = Path(__file__).with_name("basic_pitch.onnx")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def note_posteriors(samples: np.ndarray) -> np.ndarray:
    """Posterior of each of 88 notes in every frame of 11.6 ms, `[N]` at 24 kHz → `[F, 88]`, 0 to 1, F at least 1."""
    samples = librosa.resample(samples.astype(np.float32), orig_sr=SAMPLE_RATE, target_sr=NOTE_RATE)  # by soxr
    frames = max(1, len(samples) // NOTE_HOP)
    windows = -(-frames // KEPT)
    padded = np.pad(samples, (MARGIN * NOTE_HOP, windows * KEPT * NOTE_HOP + WINDOW - len(samples)))
    batch = np.stack([padded[start : start + WINDOW] for start in KEPT * NOTE_HOP * np.arange(windows)])[..., None]
    (notes,) = _network().run(["StatefulPartitionedCall:1"], {"serving_default_input_2:0": batch})
    return notes[:, MARGIN : MARGIN + KEPT].reshape(-1, PITCHES)[:frames]


def sound_metrics(output: SoundFeatures, input: SoundFeatures, target: SoundFeatures) -> dict[str, float]:
    """Objective metrics of a fusion against its two clips.

    onsets           correlation of the rises of output and input, mean over bands, −1 to 1. A band that is empty in
                     both clips does not count
    beats            F-measure of the beats of output and input, 0 to 1
    notes            F-measure of the notes of output and target, frame by frame, 0 to 1
    onsets_left      share of the target's onsets that the output keeps, 0 to 1: the regression weight of the target's
                     rises beside the input's, so that a copy of the input has 0 however alike the clips are
    notes_left       share of the notes of the input alone that the output keeps, 0 to 1
    artifacts        share of the output's power that neither clip explains, 0 to 1: above four times the louder of them
    level, peak      RMS in dB over `pair_rms` of the clips, −120 for silence; largest absolute sample
    onset_score, note_score            onsets · (1 − onsets_left), at least 0; notes · (1 − notes_left)
    merit            the figure of merit: harmonic mean of both scores. High only for the input's rhythm *and* the
                     target's harmony, with nothing else of either clip
    rhythm, harmony, plain_merit       correlation of the onset strengths of output and input; cosine of the chroma of
                     output and target; their harmonic mean
    movement_ratio                     movement over the clips' mean
    """
    counts = input.full | target.full
    if not counts.any():
        counts = ~counts
    clips = (output, input), (output, target), (input, target)
    kept, taken, alike = (correlation(x.rises[counts], y.rises[counts]) for x, y in clips)
    onsets = float(kept.mean())
    onsets_left = float(((taken - kept * alike) / np.maximum(1 - alike**2, 0.1)).clip(0, 1).mean())
    frames = min(len(x.notes) for x in (output, input, target))
    found, unwanted, wanted = (x.notes[:frames] for x in (output, input, target))
    unwanted = unwanted & ~wanted
    notes = 2 * (found & wanted).sum() / max(1, found.sum() + wanted.sum())
    notes_left = (found & unwanted).sum() / max(1, unwanted.sum())
    limit = 4 * maximum_filter1d(np.maximum(input.mel, target.mel), 3, axis=1)
    scores = max(onsets, 0.0) * (1 - onsets_left), float(notes * (1 - notes_left))
    rhythm = float(correlation(output.strength, input.strength))
    harmony = float(cosine(output.chroma.ravel(), target.chroma.ravel()))
    return {
        "onsets": onsets,
        "beats": mir_eval.beat.f_measure(input.beats, output.beats) if len(input.beats) and len(output.beats) else 0.0,
        "notes": float(notes),
        "onsets_left": onsets_left,
        "notes_left": float(notes_left),
        "artifacts": float((output.mel - limit).clip(0).sum() / max(output.mel.sum(), 1e-20)),
        "level": 20 * float(np.log10(max(output.rms / (pair_rms(input.rms, target.rms) + 1e-8), 1e-6))),
        "peak": output.peak,
        "onset_score": scores[0],
        "note_score": scores[1],
        "merit": harmonic_mean(*scores),
        "rhythm": rhythm,
        "harmony": harmony,
        "plain_merit": harmonic_mean(rhythm, harmony),
        "movement_ratio": 2 * output.movement / (input.movement + target.movement + 1e-8),
    }


def harmonic_mean(x: float, y: float) -> float:
    """Harmonic mean of two similarities, negative values counted as 0."""
    x, y = max(x, 0.0), max(y, 0.0)
    return 2 * x * y / (x + y) if x + y else 0.0


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation along the last axis; 0 if one is constant."""
    return cosine(x - x.mean(axis=-1, keepdims=True), y - y.mean(axis=-1, keepdims=True))


def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosine along the last axis; 0 for zeros."""
    lengths = np.sqrt(np.square(x).sum(axis=-1) * np.square(y).sum(axis=-1))
    return (x * y).sum(axis=-1) / np.maximum(lengths, 1e-30)
