"""Audio in and out, and what can be measured of it.

- `files`: `load_audio`, `save_audio`, `AudioWriter`, `check_audio`
- `walk`: the music files below a folder
- `chunks`: long files in overlapping chunks, crossfaded
- `features`: mel spectrogram, onsets, chroma and loudness, differentiable
- `synth`: the demo songs
- `plots`: waveforms, mel spectrograms and spectra
"""

from lib.audio.files import AudioError, AudioWriter, check_audio, load_audio, save_audio
