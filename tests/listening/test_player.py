"""Players embed a clip at its own level and state that level beside it."""

import base64
import io
import math

import pytest
import soundfile
import torch
from PIL import Image

import lib.listening.player
from lib.audio.plots import clip_image
from lib.listening.player import COLOURS, HEADROOM, OTHERS, SCRIPT, STYLE, Players, PlayerWidget, loudness

RATE = 24_000


def tone(amplitude: float, seconds: float = 0.1, frequency: float = 440.0, rate: int = RATE) -> torch.Tensor:
    """`[1, N]`."""
    return amplitude * torch.sin(2 * torch.pi * frequency * torch.arange(round(seconds * rate)) / rate)[None]


def noise(level: float, seconds: float = 1.0, seed: int = 0) -> torch.Tensor:
    """`[1, N]` of that RMS."""
    wav = torch.randn(1, round(seconds * RATE), generator=torch.Generator().manual_seed(seed))
    return level * wav / wav.square().mean().sqrt()


@pytest.fixture
def embedded(parse):
    """`embedded(players)`: every clip in the HTML, decoded: `[N]` and its rate."""

    def decode(players: Players) -> list[tuple[torch.Tensor, int]]:
        found = []
        for audio in parse(players._repr_html_()).all("audio"):
            kind, data = audio["src"].split(",")
            assert kind == "data:audio/flac;base64"
            samples, rate = soundfile.read(io.BytesIO(base64.b64decode(data, validate=True)), dtype="float32")
            found.append((torch.from_numpy(samples), rate))
        return found

    return decode


@pytest.fixture
def figures(parse):
    """`figures(players)`: the attributes of the `<figure>` of every clip."""
    return lambda players: parse(players._repr_html_()).all("figure")


# --- level ------------------------------------------------------------------------------------------------------------


def test_embedded_audio_is_the_clip_itself(embedded):
    torch.manual_seed(0)
    noise = 0.2 * torch.randn(1, 5000).clamp(-3, 3)
    (first, rate), (second, _) = embedded(Players({"a": noise, "b": tone(0.5)}))
    assert rate == RATE
    assert torch.allclose(first, noise[0], rtol=0, atol=2**-15)
    assert torch.allclose(second, tone(0.5)[0], rtol=0, atol=2**-15)


def test_both_channels_are_played_and_their_mean_is_shown(embedded):
    wav = torch.cat([tone(0.9), torch.zeros(1, 2400)])
    ((played, rate),) = embedded(Players({"a": wav}))
    assert rate == RATE
    assert torch.allclose(played, wav.T, rtol=0, atol=2**-15)
    assert clip_image(wav) == clip_image(wav.mean(0, keepdim=True)) != clip_image(wav[:1])


def test_a_quiet_clip_stays_quiet(embedded):
    players = Players({"quiet": tone(0.001), "loud": tone(0.9)})
    (quiet, _), (loud, _) = embedded(players)
    assert quiet.abs().max() == pytest.approx(0.001, abs=2**-15)
    assert loud.abs().max() == pytest.approx(0.9, abs=1e-3)
    alone = embedded(Players({"quiet": tone(0.001)}))[0][0]  # nor is a single quiet clip raised
    assert torch.equal(alone, quiet)
    assert "turned down" not in players._repr_html_()


@pytest.mark.parametrize("peak", [0.2, 0.995, 1.0])
def test_clips_within_full_scale_are_not_touched(embedded, peak):
    wav = tone(1.0)
    wav *= peak / wav.abs().max()
    players = Players({"a": wav})
    assert players.gain == 1
    assert embedded(players)[0][0].abs().max() == pytest.approx(peak, abs=2**-14)


def test_above_full_scale_all_clips_are_turned_down_alike_and_the_heading_says_so(embedded):
    players = Players({"over": tone(2.0, frequency=3000), "other": tone(0.5)})  # 3000 Hz: a sample at the crest
    assert players.gain == pytest.approx(0.495, abs=1e-4)
    (over, _), (other, _) = embedded(players)
    assert torch.allclose(over, players.gain * tone(2.0, frequency=3000)[0], rtol=0, atol=2**-15)
    assert torch.allclose(other, players.gain * tone(0.5)[0], rtol=0, atol=2**-15)
    assert over.abs().max() < 1
    assert f"turned down by {-20 * math.log10(players.gain):.1f} dB" in players._repr_html_()


def test_levels_are_of_the_waveform_before_the_gain():
    square = torch.tensor([[2.0, -2.0, 2.0, -2.0]]).repeat(1, RATE // 4)
    half = torch.tensor([[0.5, -0.5, 0.0, 0.0]]).repeat(1, RATE // 4)
    players = Players({"square": square, "half": half})
    loud = [f"{loudness(wav):.1f}" for wav in (square, half)]
    levels = {
        "square": f"RMS 2.0000, peak 2.000, {loud[0]} LUFS",
        "half": f"RMS 0.3536, peak 0.500, {loud[1]} LUFS",
    }
    assert players.levels() == levels
    assert levels["half"] in players._repr_html_()
    assert repr(players) == "\n".join(f"{name}: {level}" for name, level in levels.items())


# --- loudness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [RATE, 48_000])
@pytest.mark.parametrize("decibels", [-40, -20, -6, 0, 6])
def test_loudness_of_a_sine_is_what_the_standard_says(decibels, rate):
    """ITU-R BS.1770-4: 997 Hz at full scale in one channel is -3.01 LUFS, and every dB less is one less."""
    sine = tone(10 ** (decibels / 20), 2, 997, rate)
    assert loudness(sine, rate) == pytest.approx(decibels - 3.01, abs=0.1)


def test_loudness_weighs_frequencies_as_the_standard_does():
    """The shelf lifts the treble by 4 dB of 1 kHz's 0.7, the high-pass takes the bass away."""
    at = {frequency: loudness(tone(0.1, 2, frequency)) for frequency in (20, 997, 8000)}
    assert at[8000] - at[997] == pytest.approx(3.3, abs=0.2)
    assert at[997] - at[20] > 10


def test_loudness_leaves_out_pauses_and_quiet_parts():
    loud = tone(0.5, 4, 997)
    alone = loudness(loud)
    assert loudness(torch.cat([loud, torch.zeros(1, 4 * RATE)], 1)) == pytest.approx(alone, abs=0.3)
    assert loudness(torch.cat([loud, 0.1 * loud], 1)) == pytest.approx(alone, abs=0.3)  # 20 dB down: below the gate
    assert loudness(torch.cat([loud, 0.5 * loud], 1)) == pytest.approx(alone - 2.04, abs=0.1)  # 6 dB down: within it


def test_loudness_follows_the_level_past_full_scale():
    wav = noise(0.05)
    for decibels in (-20, 12, 24, 40):
        assert loudness(wav * 10 ** (decibels / 20)) == pytest.approx(loudness(wav) + decibels, abs=0.05)


@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.39, 0.4, 0.41])
def test_a_clip_shorter_than_the_window_is_as_loud_as_a_long_one(seconds):
    assert loudness(tone(0.1, seconds, 1000)) == pytest.approx(loudness(tone(0.1, 2, 1000)), abs=0.1)


@pytest.mark.parametrize("num_samples", [1, 4, RATE // 10, RATE])
def test_silence_has_no_loudness(num_samples):
    assert loudness(torch.zeros(1, num_samples)) == -math.inf


# --- equal loudness ---------------------------------------------------------------------------------------------------

UNLIKE = {
    "one passes full scale": {"a": tone(3.0, 1), "b": noise(0.01), "c": tone(0.2, 0.7, 3000)},
    "all pass full scale": {"a": noise(1.5), "b": tone(2.0, 1)},
    "none does": {"a": tone(0.5, 1), "b": noise(0.002), "c": noise(0.1, 0.2)},
    "one is a click": {"a": noise(0.1), "b": torch.nn.functional.one_hot(torch.tensor([700]), RATE).float()},
    "one clip": {"a": noise(0.03)},
}


@pytest.mark.parametrize("wavs", UNLIKE.values(), ids=UNLIKE)
def test_with_their_gains_all_clips_are_equally_loud_and_none_passes_full_scale(embedded, figures, wavs):
    """Of what plays: the embedded audio times the gain beside it."""
    players = Players(wavs)
    gains = [float(figure["data-gain"]) for figure in figures(players)]
    heard = [gain * wav[None] for (wav, _), gain in zip(embedded(players), gains, strict=True)]
    levels = [loudness(wav) for wav in heard]
    assert levels == pytest.approx([levels[0]] * len(levels), abs=0.1)
    peaks = [float(wav.abs().max()) for wav in heard]
    assert max(peaks) == pytest.approx(HEADROOM, abs=0.01)  # as loud as can be
    assert max(peaks) < 1
    assert [float(figure["data-gain"]) for figure in figures(players)] == pytest.approx(
        list(players.matching_gains().values()), rel=1e-5
    )


def test_equal_clips_far_apart_in_level_get_what_makes_up_for_it():
    gains = Players({"a": noise(0.1), "b": noise(0.01)}).matching_gains()
    assert gains["b"] / gains["a"] == pytest.approx(10, rel=1e-3)


def test_silence_keeps_its_gain_and_holds_no_other_back():
    silence = torch.zeros(1, RATE)
    with_it, without = Players({"a": noise(0.1), "z": silence}), Players({"a": noise(0.1)})
    assert with_it.matching_gains() == {"a": without.matching_gains()["a"], "z": 1}
    assert Players({"y": silence, "z": silence}).matching_gains() == {"y": 1, "z": 1}
    assert "-inf LUFS" in repr(with_it)
    assert Players({"a": tone(3.0), "z": silence}).matching_gains()["z"] == 1


# --- HTML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [1, 4, 1000])
def test_very_short_clips_are_shown_too(embedded, figures, num_samples):
    wavs = {"a": noise(0.1)[:, :num_samples], "silent": torch.zeros(1, num_samples)}
    players = Players(wavs)
    assert [len(wav) for wav, _ in embedded(players)] == [num_samples, num_samples]
    page = players._repr_html_()
    assert "nan" not in page.partition("base64")[0].lower()
    assert all(math.isfinite(float(figure["data-gain"])) for figure in figures(players))
    assert "nan" not in repr(players).lower()


def test_clips_of_unlike_length_share_a_time_axis(parse, embedded):
    players = Players({"long": tone(0.1, 1.5), "short": tone(0.1, 0.5)})
    page = parse(players._repr_html_())
    (root,) = [tag for tag in page.all("div") if tag.get("class") == "players"]
    assert float(root["data-seconds"]) == 1.5
    widths = [float(image["style"].removeprefix("width: ").removesuffix("%")) for image in page.all("img")]
    assert widths == pytest.approx([100, 100 / 3], abs=1e-3)
    assert [len(wav) for wav, _ in embedded(players)] == [1.5 * RATE, 0.5 * RATE]


def test_pictures_are_embedded_in_the_colour_of_the_clip(parse):
    names = ["input", "stage 1", "output", "stage 2", "target", "plain average"]
    wavs = {name: noise(0.1, 0.2, seed) for seed, name in enumerate(names)}
    images = parse(Players(wavs)._repr_html_()).all("img")
    colours = [COLOURS["input"], OTHERS[0], COLOURS["output"], OTHERS[1], COLOURS["target"], COLOURS["plain average"]]
    assert not {COLOURS["input"], COLOURS["target"]} & set(OTHERS)
    for name, image, colour in zip(names, images, colours, strict=True):
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        content = base64.b64decode(data, validate=True)
        assert content == clip_image(wavs[name], colour)
        assert Image.open(io.BytesIO(content)).size == (480, 140)


def test_more_clips_than_colours():
    assert Players({f"clip {i}": tone(0.1) for i in range(7)})._repr_html_().count("<figure") == 7


def test_names_are_escaped_and_every_player_is_labelled(parse):
    name = "<script>\"x\" & 'y'</script>"
    source = Players({name: tone(0.1), "plain": tone(0.1)})._repr_html_()
    page = parse(source)
    assert "<script" not in source
    assert name in page.text
    assert [audio["aria-label"] for audio in page.all("audio")] == [name, "plain"]
    assert [figure["data-name"] for figure in page.all("figure")] == [name, "plain"]
    assert page.all("img")[0]["alt"] == f"waveform and mel spectrogram of {name}"


def test_the_players_work_where_no_script_runs(parse):
    page = parse(Players({"a": tone(0.1), "b": tone(0.2)})._repr_html_())
    assert {tag for tag, _ in page.tags} == {"div", "small", "figure", "figcaption", "img", "audio"}
    assert all("controls" in audio and "hidden" not in audio for audio in page.all("audio"))
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_another_rate_is_kept(embedded, parse):
    players = Players({"a": tone(0.1, rate=48_000)}, sample_rate=48_000)
    assert embedded(players)[0][1] == 48_000
    assert 'data-seconds="0.100000"' in players._repr_html_()
    assert players.loudness["a"] == pytest.approx(loudness(tone(0.1)), abs=0.1)


def test_tensors_of_inference_mode_play_too(embedded):
    with torch.inference_mode():
        wav = tone(0.1)
    assert len(embedded(Players({"a": wav}))) == 1


# --- widget -----------------------------------------------------------------------------------------------------------


def test_the_widget_sends_script_style_and_html_to_the_front_end():
    widget = PlayerWidget(html="<b>x</b>")
    sent = widget.get_state()
    assert sent["_esm"] == SCRIPT.read_text()
    assert sent["_css"] == STYLE.read_text()
    assert sent["html"] == "<b>x</b>"
    widget.close()


@pytest.mark.parametrize("live", [True, False])
def test_a_front_end_gets_the_panel_and_others_the_plain_players(monkeypatch, live):
    monkeypatch.setattr(lib.listening.player, "can_show_widgets", lambda: live)
    players = Players({"a": tone(0.1)})
    shown = players.show()
    if live:
        assert isinstance(shown, PlayerWidget)
        assert shown.html == players._repr_html_()
    else:
        assert shown is players
