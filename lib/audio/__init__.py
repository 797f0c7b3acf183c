"""Audio in and out, what can be measured of it, and the demo songs."""

from lib.audio.decode import AudioError
from lib.audio.files import AudioWriter, check_audio, load_audio, save_audio
