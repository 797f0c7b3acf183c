"""Players: what is embedded is the clip at its own level, and the text beside it says which that is."""

import base64
import io
import math
import re

import pytest
import soundfile
import torch

from lib.player import Players

RATE = 24_000


def tone(amplitude: float, seconds: float = 0.1, frequency: float = 440.0) -> torch.Tensor:
    """`[1, N]`."""
    return amplitude * torch.sin(2 * torch.pi * frequency * torch.arange(round(seconds * RATE)) / RATE)[None]


def embedded(players: Players) -> list[tuple[torch.Tensor, int]]:
    """Every clip in the HTML, decoded: `[N]` and its rate."""
    found = re.findall(r'src="data:audio/flac;base64,([^"]*)"', players._repr_html_())
    decoded = [soundfile.read(io.BytesIO(base64.b64decode(text, validate=True)), dtype="float32") for text in found]
    return [(torch.from_numpy(samples), rate) for samples, rate in decoded]


def test_embedded_audio_is_the_clip_itself():
    torch.manual_seed(0)
    noise = 0.2 * torch.randn(1, 5000).clamp(-3, 3)
    (first, rate), (second, _) = embedded(Players({"a": noise, "b": tone(0.5)}))
    assert rate == RATE
    assert torch.allclose(first, noise[0], rtol=0, atol=2**-15)
    assert torch.allclose(second, tone(0.5)[0], rtol=0, atol=2**-15)


def test_a_quiet_clip_stays_quiet():
    players = Players({"quiet": tone(0.001), "loud": tone(0.9)})
    (quiet, _), (loud, _) = embedded(players)
    assert quiet.abs().max() == pytest.approx(0.001, abs=2**-15)
    assert loud.abs().max() == pytest.approx(0.9, abs=1e-3)
    alone = embedded(Players({"quiet": tone(0.001)}))[0][0]  # nor is it raised for want of a louder one
    assert torch.equal(alone, quiet)
    assert "turned down" not in players._repr_html_()


@pytest.mark.parametrize("peak", [0.2, 0.995, 1.0])
def test_clips_within_full_scale_are_not_touched(peak):
    wav = tone(1.0)
    wav *= peak / wav.abs().max()
    players = Players({"a": wav})
    assert players.gain == 1
    assert embedded(players)[0][0].abs().max() == pytest.approx(peak, abs=2**-14)


def test_above_full_scale_all_clips_are_turned_down_alike_and_the_heading_says_so():
    players = Players({"over": tone(2.0, frequency=3000), "other": tone(0.5)})  # 3000 Hz: a sample at the crest
    assert players.gain == pytest.approx(0.495, abs=1e-4)
    (over, _), (other, _) = embedded(players)
    assert torch.allclose(over, players.gain * tone(2.0, frequency=3000)[0], rtol=0, atol=2**-15)
    assert torch.allclose(other, players.gain * tone(0.5)[0], rtol=0, atol=2**-15)
    assert over.abs().max() < 1
    assert f"turned down by {-20 * math.log10(players.gain):.1f} dB" in players._repr_html_()


def test_levels_are_of_the_waveform_before_the_gain():
    square = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    half = torch.tensor([[0.5, -0.5, 0.0, 0.0]])
    players = Players({"square": square, "half": half})
    assert players.levels() == [
        {"clip": "square", "RMS": "2.0000", "peak": "2.000"},
        {"clip": "half", "RMS": "0.3536", "peak": "0.500"},
    ]
    assert "RMS 0.3536, peak 0.500" in players._repr_html_()
    assert repr(players) == "square: RMS 2.0000, peak 2.000\nhalf: RMS 0.3536, peak 0.500"


def test_names_are_escaped_and_every_player_is_labelled():
    name = "<script>\"x\" & 'y'</script>"
    page = Players({name: tone(0.1), "plain": tone(0.1)})._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    labels = re.findall(r'<audio [^>]*aria-label="([^"]*)"', page)
    assert labels == ["&lt;script&gt;&quot;x&quot; &amp; &#x27;y&#x27;&lt;/script&gt;", "plain"]
    assert page.count("<audio controls") == 2


def test_another_rate_is_kept():
    assert embedded(Players({"a": tone(0.1)}, sample_rate=48_000))[0][1] == 48_000


def test_tensors_of_inference_mode_play_too():
    with torch.inference_mode():
        wav = tone(0.1)
    assert len(embedded(Players({"a": wav}))) == 1
