"""Audio in and out, what can be measured of it, and the demo songs."""

from lib.audio.files import AudioError, AudioWriter, check_audio, load_audio, save_audio
