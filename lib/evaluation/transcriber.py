"""Notes of a clip as a packaged transcriber finds them: basic-pitch (Bittner et al., ICASSP 2022, doi
10.1109/ICASSP43922.2022.9746549), a network of 17,000 parameters by Spotify, Apache-2.0 (`basic_pitch.LICENSE`). It
reads windows of two seconds, a whole number of frames apart, and frames near their ends are dropped."""

import functools
from pathlib import Path

import librosa
import numpy as np
import onnxruntime

from lib.audio.files import SAMPLE_RATE

RATE, HOP = 22_050, 256  # of the network: 86 frames a second
WINDOW = 2 * RATE - HOP  # 172 frames
MARGIN, KEPT = 15, 141  # frames of a window
PITCHES = 88  # semitones from A0, 27.5 Hz


@functools.cache
def _network() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # the same sums on any machine
    path = Path(__file__).with_name("basic_pitch.onnx")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def note_posteriors(samples: np.ndarray) -> np.ndarray:
    """Posterior of each of 88 notes in every frame of 11.6 ms, `[N]` at 24 kHz → `[F, 88]`, 0 to 1, F at least 1."""
    samples = librosa.resample(samples.astype(np.float32), orig_sr=SAMPLE_RATE, target_sr=RATE, res_type="soxr_hq")
    frames = max(1, len(samples) // HOP)
    windows = -(-frames // KEPT)
    padded = np.pad(samples, (MARGIN * HOP, windows * KEPT * HOP + WINDOW - len(samples)))
    batch = np.stack([padded[start : start + WINDOW] for start in KEPT * HOP * np.arange(windows)])[..., None]
    (notes,) = _network().run(["StatefulPartitionedCall:1"], {"serving_default_input_2:0": batch})
    return notes[:, MARGIN : MARGIN + KEPT].reshape(-1, PITCHES)[:frames]
