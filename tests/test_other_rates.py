"""Panel, playground and uploads with a codec of 16 kHz and 64 channels: every second, rate and frequency is right."""

import base64
import dataclasses
import datetime
import html
import io
import re
import shutil

import numpy as np
import pytest
import soundfile
import torch
from listening.test_widgets import audio
from torch import Tensor

import lib.listening.panel
from lib.audio.files import load_audio
from lib.audio.plots import mixing_maps
from lib.data.pairs import Manifest, build_manifest
from lib.listening import panel, playground
from lib.listening.panel import Listening, taken
from lib.listening.player import Players
from lib.listening.render import Rendition, Settings, follow_recipe, render
from lib.listening.widgets import Upload
from lib.model.cascade import CascadeConfig
from lib.model.fusion import FusionModel, load_model
from lib.model.masks import MaskingConfig, Masks
from lib.training.run import Run

RATE, LENGTH = 16_000, 8_000  # of the clips of half a second


@pytest.fixture(scope="module")
def at_16_khz(tmp_path_factory, songs, blocks) -> Manifest:
    path = tmp_path_factory.mktemp("manifest") / "manifest.json"
    return build_manifest(songs.root, path, 0.5, mode="both", sample_rate=blocks.sample_rate)


@pytest.fixture(scope="module")
def run(tmp_path_factory, blocks, save_run) -> Run:
    cascade = dataclasses.replace(CascadeConfig.reference(1, num_layers=1), latent_dim=blocks.dim)
    return save_run(tmp_path_factory.mktemp("run") / "own", blocks, cascade, "learned")


@pytest.fixture
def listening(tmp_path, blocks, at_16_khz, run) -> Listening:
    return Listening(blocks, at_16_khz, {"own": run}, tmp_path / "uploads", tmp_path / "superres")


def played(page: str) -> dict[str, tuple[Tensor, int]]:
    """Name → samples `[1, N]` and rate of every player in the HTML."""
    found = re.findall(r'<audio [^>]*aria-label="([^"]*)" src="data:audio/flac;base64,([^"]*)"', page)
    files = {html.unescape(name): soundfile.read(io.BytesIO(base64.b64decode(data))) for name, data in found}
    return {name: (torch.from_numpy(wav).float()[None], rate) for name, (wav, rate) in files.items()}


def test_the_panel_plays_and_shows_clips_at_the_codecs_rate(listening, at_16_khz, blocks, run, monkeypatch):
    drawn = []
    monkeypatch.setattr(panel, "mixing_maps", lambda *what: drawn.append(what) or mixing_maps(*what))
    shown = panel._Panel(listening)
    heard, pair = played(shown.players.html), at_16_khz.split("val")[0]
    clips = [load_audio(at_16_khz.path(clip), clip.offset, LENGTH, RATE) for clip in (pair.input, pair.target)]
    assert {rate for _, rate in heard.values()} == {RATE}
    wanted = {"input": clips[0], "target": clips[1], "output": render(load_model(run), blocks, *clips).wav}
    for name, wav in wanted.items():
        torch.testing.assert_close(heard[name][0], wav, rtol=0, atol=1e-4)
    assert 'data-seconds="0.500000" data-rate="16000"' in shown.players.html
    begin = pair.input.offset / RATE
    assert f"{pair.input.path} {begin:.4g}–{begin + 0.5:.4g} s of " in shown.playing.value
    ((parts, seconds),) = drawn
    assert seconds == 0.5
    assert [power.shape for power in parts["output"]] == 2 * [(80, 63 * 192 // 256 + 1)]  # 63 frames, at 24 kHz


def test_a_tone_stands_beside_its_own_frequency_in_the_picture_of_masks(blocks):
    time = torch.arange(RATE) / RATE
    latents = 2 * (blocks.encode(0.3 * (2 * torch.pi * 2000 * time).sin()[None, None]),)
    masks = Masks(*(torch.ones_like(x) for x in latents))
    powers = taken(FusionModel(masking=MaskingConfig("none")), blocks, Rendition(time[None], latents, masks, ()))
    (axes, *_) = mixing_maps({"tone": powers}, 1.0).axes
    ticks = {label.get_text(): place for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
    band = powers[0].sum(1).argmax().item()
    assert abs(band - np.interp(np.log(2000), np.log((1000, 3000)), (ticks["1,000"], ticks["3,000"]))) < 3


def test_an_uploaded_file_is_cut_in_seconds(tmp_path, listening):
    content, upload = audio(36_000), Upload("input", tmp_path / "uploads", LENGTH, RATE)
    file = {"name": "a.wav", "type": "audio/wav", "size": len(content), "content": memoryview(content)}
    sent = (file | {"last_modified": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)},)
    upload.button.value = sent
    upload.keep()
    assert upload.begin.max == 1.0  # where the last whole part of 1.5 s begins
    upload.begin.value = 0.75
    clip = upload.clip()
    assert (clip.offset, clip.length, clip.sample_rate) == (12_000, LENGTH, RATE)
    assert upload.part() == "a.wav 0.75–1.25 s of 1.5 s"
    listening.offer_uploads()
    assert listening.clips["a.wav 0–0.5 s"] == dataclasses.replace(clip, offset=0)
    shown = panel._Panel(listening)
    for file in shown.files:
        file.button.value = sent
    heard, rate = played(shown.players.html)["input"]
    assert rate == RATE
    torch.testing.assert_close(heard, load_audio(clip.path, 0, LENGTH, RATE), rtol=0, atol=1e-4)
    assert shown.playing.value == "playing a.wav 0–0.5 s of 1.5 s + a.wav 0–0.5 s of 1.5 s"


def test_a_restored_upper_band_begins_where_the_codecs_ends(tmp_path, listening, tiny_superres, monkeypatch):
    shutil.copytree(tiny_superres, tmp_path / "superres", symlinks=True)
    edges = []
    original = lib.listening.panel.band_edge
    monkeypatch.setattr(panel, "band_edge", lambda wav, rate: edges.append(original(wav, rate)) or edges[-1])
    pair = next(iter(listening.pairs.values()))
    players, *_ = listening.compare(*pair, {"output": ("own", Settings())}, restored=True)
    assert players.sample_rate == 48_000
    assert {wav.shape for wav in players.wavs.values()} == {(1, 24_000)}
    assert 4_000 < edges[0] <= 8_000


def test_the_playground_plays_draws_and_saves_at_the_codecs_rate(tmp_path, listening, run):
    ground = playground.Playground(listening, tmp_path / "favourites")
    first, second = ground.first
    players, *_ = ground.fuse("own", first, (second, first), Settings())
    assert (players.sample_rate, players.seconds) == (RATE, 0.5)
    figure = ground.settings_side_by_side()
    ends = [axes.images[0].get_extent()[1] for axes in figure.axes if axes.images]
    assert ends
    assert set(ends) == {0.5}
    recipe = ground.save("mine", "own", first, second, Settings(noise=0.2))
    assert soundfile.info(recipe.with_suffix(".wav")).samplerate == RATE
    made = follow_recipe(recipe)
    assert (made.equal, made.sample_rate, made.wav.shape) == (True, RATE, (1, LENGTH))


def test_players_give_their_clips_at_another_rate():
    tone = (2 * torch.pi * 1000 * torch.arange(RATE) / RATE).sin()[None]
    found = Players({"tone": tone}, RATE).resampled()["tone"]
    assert found.shape == (1, 24_000)
    assert torch.fft.rfft(found[0]).abs().argmax() == 1000  # bins of 1 Hz
