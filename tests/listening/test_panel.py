"""The listening panel: what it plays and shows is what the runs render, and every mistake is reported."""

import base64
import datetime
import hashlib
import html
import io
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import soundfile
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import Tensor

import lib.listening.panel
import lib.listening.widgets
from lib.audio.plots import mel_power, mixing_maps
from lib.data.pairs import Manifest, Pair
from lib.fuse import fuse_clips
from lib.listening.panel import BLENDS, UPLOADED, Listening, _Panel, marked, taken
from lib.listening.render import Rendition, Settings, render
from lib.listening.widgets import Upload, describe_clip
from lib.model.cascade import CascadeConfig
from lib.model.fusion import FusionModel, load_model
from lib.model.masks import MaskingConfig, Masks
from lib.training.run import Run
from listening.test_widgets import audio

HALF = 12_000  # samples of a clip
AS_TRAINED = Settings()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, codec, save_run) -> dict[str, Run]:
    """Two runs with learned masks and one without."""
    folder, cascade = tmp_path_factory.mktemp("runs"), CascadeConfig.reference(1, num_layers=1)
    masked = {name: save_run(folder / name, codec, cascade, "learned", seed) for seed, name in enumerate(("a", "b"))}
    return masked | {"plain": save_run(folder / "plain", codec, cascade)}


@pytest.fixture(scope="module")
def models(runs) -> dict[str, FusionModel]:
    return {name: load_model(run) for name, run in runs.items()}


@pytest.fixture
def listening(tmp_path, codec, songs, runs) -> Listening:
    return Listening(codec, songs, runs, tmp_path / "uploads", tmp_path / "superres")


@pytest.fixture
def compare(listening) -> Callable[..., tuple[dict[str, Tensor], dict]]:
    """`compare(runs, settings)`: the clips of the first pair with the output of each run, and what each took."""

    def first_pair(runs: list[str], settings: Settings = AS_TRAINED) -> tuple[dict[str, Tensor], dict]:
        outputs = {f"output: {run}" if len(runs) > 1 else "output": (run, settings) for run in runs}
        players, parts, found = listening.compare(*next(iter(listening.pairs.values())), outputs)
        assert all(torch.equal(players.wavs[name], found[name].wav) for name in outputs)
        return players.wavs, parts

    return first_pair


@pytest.fixture
def panel(listening, monkeypatch) -> _Panel:
    """Its pictures are the bare colours, which are faster than a PNG."""

    def colours(figure: Figure) -> bytes:
        plt.close(figure)
        return b"".join(image.get_array().tobytes() for axes in figure.axes for image in axes.images)

    monkeypatch.setattr(lib.listening.widgets, "figure_png", colours)
    return _Panel(listening)


@pytest.fixture(scope="module")
def pair(songs) -> tuple[Tensor, Tensor]:
    """The first validation pair `[1, N]`, read without the project's code."""
    first = songs.split("val")[0]
    return window(songs.path(first.input), first.input.offset), window(songs.path(first.target), first.target.offset)


def window(path: Path, begin: int = 0, length: int = HALF) -> Tensor:
    samples, rate = soundfile.read(path, start=begin, frames=length, dtype="float32")
    assert rate == 24_000
    return torch.from_numpy(samples)[None]


def played(page: str) -> dict[str, Tensor]:
    """Name → samples `[1, N]` of every player in the HTML."""
    found = re.findall(r'<audio [^>]*aria-label="([^"]*)" src="data:audio/flac;base64,([^"]*)"', page)
    wavs = {html.unescape(name): soundfile.read(io.BytesIO(base64.b64decode(data)))[0] for name, data in found}
    return {name: torch.from_numpy(wav).float()[None] for name, wav in wavs.items()}


def sounds_like(heard: Tensor, wanted: Tensor) -> bool:
    """Equal but for the 16 bits of the players."""
    return heard.shape == wanted.shape and torch.allclose(heard, wanted, rtol=0, atol=1e-4)


# --- what plays -------------------------------------------------------------------------------------------------------


def test_input_and_target_are_untouched_and_the_average_has_the_fusions_band(compare, codec, models, pair):
    wavs, _ = compare(["a"], Settings(whole_band=False))
    assert list(wavs) == ["input", "target", "output", "plain average", "HPSS"]
    assert torch.equal(wavs["input"], pair[0])
    assert torch.equal(wavs["target"], pair[1])
    average = (pair[0] + pair[1]) / 2
    wanted = codec.decode(codec.encode(average[None]), length=HALF)[0]
    assert torch.equal(wavs["plain average"], wanted)
    assert not torch.allclose(wanted, average, atol=1e-3)  # which would have another band
    for whole in (False, True):
        wanted = fuse_clips(*(wav[None] for wav in pair), models["a"], codec, whole)[0]
        assert torch.allclose(wavs["output"], wanted, rtol=0, atol=1e-5)  # two clips in one batch
        wavs, _ = compare(["a"])
    torch.testing.assert_close(wavs["plain average"], average, rtol=0, atol=1e-5)


def test_what_needs_no_model_is_made_once_for_a_pair(compare, monkeypatch):
    made = []
    monkeypatch.setattr(lib.listening.panel, "recipes", lambda *clips: made.append(clips) or {})
    lib.listening.panel.by_hand.cache_clear()
    for blend in (0.0, 0.3):  # a slider moves
        compare(["a"], Settings(mask_blend=blend))
    lib.listening.panel.by_hand.cache_clear()
    assert len(made) == 1


def test_several_outputs_have_their_runs_names(compare, codec, models, pair):
    wavs, parts = compare(list(models), Settings(mask_blend=0.5))
    assert list(wavs) == ["input", "target", "output: a", "output: b", "output: plain", "plain average", "HPSS"]
    assert list(parts) == ["output: a", "output: b"]
    for name, model in models.items():
        wanted = render(model, codec, *pair, Settings(mask_blend=0.5))
        assert torch.equal(wavs[f"output: {name}"], wanted.wav)
        if f"output: {name}" in parts:
            powers = taken(model, codec, wanted)
            assert all(torch.equal(x, y) for x, y in zip(parts[f"output: {name}"], powers, strict=True))


def test_a_model_is_loaded_again_once_another_training_has_replaced_it(tmp_path, codec, songs, save_run):
    cascade = CascadeConfig.reference(1, num_layers=1)
    runs = {"a": save_run(tmp_path / "a", codec, cascade, seed=0)}
    listening = Listening(codec, songs, runs, tmp_path / "uploads", tmp_path / "superres")
    first = listening.model("a")
    assert listening.model("a") is first
    shutil.rmtree(tmp_path / "a")
    save_run(tmp_path / "a", codec, cascade, seed=1)
    os.utime(tmp_path / "a" / "best" / "meta.json", ns=(1, 1))
    second = listening.model("a")
    assert not all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("restored", [False, True])
def test_what_is_taken_has_energy_where_its_mask_is_open(codec, pair, restored):
    """The input for the first half, the target throughout: the powers are those of the clips' own sound, or more where
    the model restores levels."""
    latents = tuple(codec.encode(wav[None]) for wav in pair)
    frames = latents[0].shape[-1]
    opened = torch.ones_like(latents[0])
    opened[..., frames // 2 :] = 0
    masks = Masks(opened, torch.ones_like(opened))
    model = FusionModel(masking=MaskingConfig("learned", restore_rms=restored))
    of_input, of_target = taken(model, codec, Rendition(pair[0], latents, masks, ()))
    assert of_input.shape == of_target.shape == (80, 320 * frames // 256 + 1)
    half = of_input.shape[1] // 2
    assert of_input[:, half + 3 :].sum() < 1e-4 * of_input[:, : half - 3].sum()
    torch.testing.assert_close(of_target, mel_power(codec.decode(latents[1])[0]))
    unmasked = mel_power(codec.decode(latents[0])[0])
    louder = (of_input[:, 3 : half - 3].sum() / unmasked[:, 3 : half - 3].sum()).item()
    assert louder > 1.5 if restored else louder == pytest.approx(1, rel=1e-4)


# --- without a front end ----------------------------------------------------------------------------------------------


def test_blends_go_from_the_masks_to_one_half(listening, codec, models, pair):
    figure = listening.blends()
    shown = {}
    for title, blend in BLENDS.items():
        rendition = render(models["a"], codec, *pair, Settings(mask_blend=blend))
        shown[title] = taken(models["a"], codec, rendition)
    wanted = mixing_maps(shown, 0.5)
    for axes, expected in zip(figure.axes[:3], wanted.axes[:3], strict=True):
        assert axes.get_title() == expected.get_title()
        (image,), (other,) = axes.images, expected.images
        assert np.array_equal(image.get_array(), other.get_array())
        assert image.get_extent() == other.get_extent()
    first, _, last = (axes.images[0].get_array() for axes in figure.axes[:3])
    assert not np.array_equal(first, last)


def test_a_run_without_masks_has_no_picture(tmp_path, codec, songs, runs):
    assert Listening(codec, songs, {"plain": runs["plain"]}, tmp_path, tmp_path).blends() is None


# --- the panel --------------------------------------------------------------------------------------------------------


def test_the_first_pair_and_the_first_run_play_at_once(panel, codec, models, pair, songs):
    heard = played(panel.players.html)
    assert list(heard) == ["input", "target", "output", "plain average", "HPSS"]
    assert sounds_like(heard["input"], pair[0])
    assert sounds_like(heard["target"], pair[1])
    assert sounds_like(heard["output"], render(models["a"], codec, *pair).wav)
    assert panel.work.message.value == ""
    validation = songs.split("val")
    assert panel.pair.options == (*(marked(pair) for pair in validation), UPLOADED)
    assert len(validation) > 3


def test_the_panel_is_all_of_its_parts_and_draws_a_real_picture(listening):
    before = plt.get_fignums()
    box = listening.panel()
    kinds = [type(child).__name__ for child in box.children]
    controls = ["Upload", "Upload", "Text", "Dropdown", "SelectMultiple", "FloatSlider", "Checkbox", "Checkbox"]
    assert kinds == [*controls, "Label", "Work", "Label", "PlayerWidget", "Image"]
    picture = imread(io.BytesIO(bytes(box.children[-1].value)))
    assert picture.std() > 0.05
    assert plt.get_fignums() == before


def test_another_pair_plays(panel, songs):
    other = songs.split("val")[1]
    assert panel.playing.value == playing(songs, songs.split("val")[0])
    panel.pair.value = marked(other)
    assert panel.playing.value == playing(songs, other)
    heard = played(panel.players.html)
    assert sounds_like(heard["input"], window(songs.path(other.input), other.input.offset))
    assert sounds_like(heard["target"], window(songs.path(other.target), other.target.offset))


def playing(songs: Manifest, pair: Pair) -> str:
    """What the panel says while a pair plays."""
    clips = (pair.input, pair.target)
    return "playing " + " + ".join(
        f"{describe_clip(c)} of {soundfile.info(songs.path(c)).duration:.4g} s" for c in clips
    )


def test_another_part_of_a_pairs_song_plays_and_is_named(panel, songs, monkeypatch):
    pair = next(pair for pair in songs.split("val") if pair.input.offset)
    panel.pair.value = marked(pair)
    begin, seconds = role_of(panel, "input").begin, soundfile.info(songs.path(pair.input)).duration
    assert (begin.value, begin.max) == (pair.input.offset / 24_000, max(seconds - 0.5, pair.input.offset / 24_000))
    renderings = []
    monkeypatch.setattr(panel, "render", lambda: renderings.append(1) or _Panel.render(panel))
    begin.value = 0.25
    assert panel.playing.value.startswith(f"playing {pair.input.path} 0.25–0.75 s of {seconds:.4g} s + ")
    heard = played(panel.players.html)
    assert sounds_like(heard["input"], window(songs.path(pair.input), 6_000))
    assert sounds_like(heard["target"], window(songs.path(pair.target), pair.target.offset))
    panel.pair.value = marked(songs.split("val")[0])  # both begin elsewhere
    assert len(renderings) == 2


def test_several_runs_play_and_show_their_masks(panel, monkeypatch, codec, models, pair):
    titles = []
    monkeypatch.setattr(
        lib.listening.panel,
        "mixing_maps",
        lambda found, seconds: titles.append(list(found)) or mixing_maps(found, 0.5),
    )
    panel.runs.value = ("a", "plain", "b")
    heard = played(panel.players.html)
    assert list(heard) == ["input", "target", "output: a", "output: plain", "output: b", "plain average", "HPSS"]
    for name, model in models.items():
        assert sounds_like(heard[f"output: {name}"], render(model, codec, *pair).wav)
    assert titles == [["output: a", "output: b"]]


def test_without_a_run_the_players_stay_and_the_message_says_what_to_do(panel):
    before = panel.players.html
    panel.runs.value = ()
    assert 'role="alert"' in panel.work.message.value
    assert "runs (one or more): none is selected; click one" in panel.work.message.value
    assert panel.players.html == before
    panel.runs.value = ("b",)
    assert panel.work.message.value == ""
    assert panel.players.html != before


def test_a_run_without_masks_hides_the_picture(panel):
    panel.runs.value = ("plain",)
    assert panel.masks.layout.display == "none"
    assert list(played(panel.players.html)) == ["input", "target", "output", "plain average", "HPSS"]
    panel.runs.value = ("plain", "b")
    assert panel.masks.layout.display is None


def test_the_slider_blends_the_masks_of_what_plays_and_is_seen(panel, codec, models, pair):
    before, picture = played(panel.players.html), bytes(panel.masks.value)
    panel.controls["blend"].value = 1.0
    heard = played(panel.players.html)
    assert sounds_like(heard["output"], render(models["a"], codec, *pair, Settings(mask_blend=1.0)).wav)
    assert not sounds_like(heard["output"], before["output"])
    assert sounds_like(heard["input"], before["input"])
    assert bytes(panel.masks.value) != picture


def test_the_codecs_band_alone_plays_where_the_whole_band_is_off(panel, codec, models, pair):
    before = played(panel.players.html)
    panel.controls["whole_band"].value = False
    heard = played(panel.players.html)
    assert sounds_like(heard["output"], render(models["a"], codec, *pair, Settings(whole_band=False)).wav)
    assert not sounds_like(heard["output"], before["output"])


def test_a_damaged_run_is_reported(tmp_path, codec, songs, save_run, runs):
    bad = save_run(tmp_path / "bad", codec, CascadeConfig.reference(1, num_layers=1))
    (bad.path / "best" / "model.safetensors").write_bytes(b"damaged")
    panel = _Panel(Listening(codec, songs, {"a": runs["a"], "bad": bad}, tmp_path / "uploads", tmp_path))
    before = panel.players.html
    panel.runs.value = ("bad",)
    assert "model.safetensors: truncated or changed" in panel.work.message.value
    assert panel.players.html == before


# --- searching --------------------------------------------------------------------------------------------------------


def test_pairs_are_marked_and_found_by_words_in_any_order_and_case(panel, songs):
    search, everything = panel.controls["search"], panel.pair.options
    modes = [pair.mode for pair in songs.split("val")]
    assert [name.partition(": ")[0] for name in everything[:-1]] == modes
    assert {"cross", "continuation"} == set(modes)
    song = songs.split("val")[0].input.path
    search.value = f"{song.upper()} Cross"
    wanted = [name for name in everything[:-1] if name.startswith("cross: ") and song in name]
    assert 0 < len(wanted) < modes.count("cross") + modes.count("continuation")
    assert panel.pair.options == (*wanted, UPLOADED)
    assert panel.pair.value == wanted[0]
    first = next(pair for pair in songs.split("val") if marked(pair) == wanted[0])
    assert panel.playing.value == playing(songs, first)
    assert search.description == f"find pairs ({len(wanted)} found)"
    search.value = ""
    assert panel.pair.options == everything
    assert panel.playing.value == playing(songs, first)  # still, among all


def test_where_no_pair_has_all_words_all_are_offered_and_nothing_changes(panel):
    everything, said = panel.pair.options, panel.playing.value
    panel.controls["search"].value = "no such song"
    assert panel.controls["search"].description == "find pairs (0 found)"
    assert (panel.pair.options, panel.playing.value) == (everything, said)


# --- uploaded files ---------------------------------------------------------------------------------------------------


def upload(panel: _Panel, role: str, name: str, content: bytes) -> None:
    """What a front end sends when a file is chosen."""
    when = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    file = {"name": name, "type": "audio/wav", "size": len(content), "last_modified": when}
    role_of(panel, role).button.value = ({**file, "content": memoryview(content)},)


def role_of(panel: _Panel, role: str) -> Upload:
    return panel.files[("input", "target").index(role)]


def test_what_is_greyed_says_why(panel, listening, monkeypatch):
    restored = panel.controls["restored"]
    assert restored.disabled
    assert restored.description.endswith(": needs notebook 06, which trains the super-resolver")
    (listening.superres / "diffusion" / "best").mkdir(parents=True)
    restored = _Panel(listening).controls["restored"]
    assert (restored.disabled, restored.description) == (False, "restore the outputs' upper band (48 kHz)")
    assert (panel.controls["blend"].disabled, panel.greyed.value) == (False, "")
    panel.runs.value = ("plain",)
    assert panel.controls["blend"].disabled
    assert panel.greyed.value == "Greyed: blending: no chosen run has masks."
    panel.runs.value = ("plain", "b")
    assert not panel.controls["blend"].disabled
    monkeypatch.setattr(lib.listening.panel, "leaves_out", lambda codec: False)
    panel = _Panel(listening)
    assert panel.controls["whole_band"].disabled
    assert panel.greyed.value == "Greyed: whole band: this codec's channels are no bands."


def test_both_clips_limit_a_restored_band(listening, songs, monkeypatch):
    seen = []

    class Resolver:
        def __init__(self, folder):
            assert folder == listening.superres

        def restore_signal(self, wav, settings, sources):
            seen.append((settings.cutoff, [(source.shape, end) for source, end in sources]))
            return wav

    monkeypatch.setattr(lib.listening.panel, "SuperResolver", Resolver)
    input, target = next(iter(listening.pairs.values()))
    players, *_ = listening.compare(input, target, {"output": ("a", Settings())}, restored=True)
    shape = (1, players.wavs["output"].shape[-1])
    ((cutoff, sources),) = seen
    assert [found for found, _ in sources] == [shape, shape]
    assert all(2_000 <= end <= 12_000 for end in (cutoff, *(end for _, end in sources)))


def test_two_files_play_and_are_kept_under_their_hash(panel, listening, codec, models):
    before = panel.players.html
    contents = audio(HALF), audio(HALF, seed=1, format="FLAC")
    upload(panel, "input", "mine.wav", contents[0])
    assert panel.pair.value == UPLOADED  # without a click
    assert "Choose two audio files" in panel.work.message.value  # one is missing yet
    assert panel.players.html == before
    upload(panel, "target", "yours.flac", contents[1])
    assert panel.work.message.value == ""
    wavs = [torch.from_numpy(soundfile.read(io.BytesIO(c), dtype="float32")[0])[None] for c in contents]
    heard = played(panel.players.html)
    for role, wav in zip(("input", "target"), wavs, strict=True):
        assert sounds_like(heard[role], wav)
    assert sounds_like(heard["output"], render(models["a"], codec, *wavs).wav)
    kept = {path.name: path.read_bytes() for path in listening.uploads.iterdir()}
    names = [hashlib.sha256(content).hexdigest()[:12] for content in contents]
    assert kept == {f"{names[0]}_mine.wav": contents[0], f"{names[1]}_yours.flac": contents[1]}
    assert {"mine.wav 0–0.5 s", "yours.flac 0–0.5 s"} <= set(listening.clips)


def test_a_chosen_part_of_a_file_plays_and_is_named(panel, listening):
    content = audio(3 * HALF)
    upload(panel, "input", "a.wav", content)
    upload(panel, "target", "b.wav", audio(3 * HALF, seed=1))
    samples = torch.from_numpy(soundfile.read(io.BytesIO(content), dtype="float32")[0])[None]
    assert sounds_like(played(panel.players.html)["input"], samples[:, :HALF])
    assert panel.playing.value == "playing a.wav 0–0.5 s of 1.5 s + b.wav 0–0.5 s of 1.5 s"
    chosen = role_of(panel, "input")
    assert chosen.begin.max == 1.0  # where the last whole part begins
    chosen.begin.value = 0.75
    assert panel.playing.value == "playing a.wav 0.75–1.25 s of 1.5 s + b.wav 0–0.5 s of 1.5 s"
    assert sounds_like(played(panel.players.html)["input"], samples[:, 18_000 : 18_000 + HALF])
    clip = chosen.clip()
    assert (clip.offset, clip.length, clip.sha256) == (18_000, HALF, hashlib.sha256(content).hexdigest())
    assert Path(clip.path).read_bytes() == content
    upload(panel, "input", "c.wav", audio(2 * HALF, seed=2))
    assert panel.playing.value == "playing c.wav 0–0.5 s of 1 s + b.wav 0–0.5 s of 1.5 s"  # from its beginning


def test_of_a_shorter_file_all_plays(panel):
    upload(panel, "input", "a.wav", audio(20_000))
    upload(panel, "target", "b.wav", audio(9_000, seed=1))
    assert role_of(panel, "target").begin.max == 0
    assert {wav.shape for wav in played(panel.players.html).values()} == {(1, 9_000)}


def test_a_broken_file_is_reported_under_its_own_name_and_the_one_before_it_stays(panel, listening):
    upload(panel, "input", "good.wav", audio())
    upload(panel, "target", "other.wav", audio(seed=1))
    before = panel.players.html
    upload(panel, "target", "my song (1).wav", b"RIFF no sound")
    assert "my song (1).wav: not audio" in panel.work.message.value
    assert 'role="alert"' in panel.work.message.value
    assert panel.players.html == before
    assert panel.playing.value == "playing good.wav 0–0.5 s of 0.5 s + other.wav 0–0.5 s of 0.5 s"
    assert sorted(path.name.split("_")[1] for path in listening.uploads.iterdir()) == ["good.wav", "other.wav"]
    upload(panel, "target", "third.wav", audio(seed=2))
    assert panel.work.message.value == ""
    assert panel.players.html != before


def test_the_same_file_plays_again_when_it_is_uploaded_again(panel):
    contents = {"input": audio(), "target": audio(seed=1)}
    for role, content in contents.items():
        upload(panel, role, f"{role}.wav", content)
    uploaded = panel.playing.value
    panel.pair.value = panel.pair.options[0]
    assert panel.playing.value != uploaded
    upload(panel, "input", "input.wav", contents["input"])
    assert panel.playing.value == uploaded


def test_a_folder_that_cannot_be_written_is_reported(panel, listening, tmp_path):
    (tmp_path / "uploads").write_text("a file")
    content = audio()
    upload(panel, "input", "a.wav", content)
    assert "uploads: cannot be written" in panel.work.message.value
    (tmp_path / "uploads").unlink()
    upload(panel, "input", "a.wav", content)
    assert "Choose two audio files" in panel.work.message.value


def test_a_files_name_is_no_markup(panel):
    upload(panel, "input", "<b>bold.wav", b"no sound")
    assert "&lt;b&gt;bold.wav: not audio" in panel.work.message.value
    assert "<b>" not in panel.work.message.value


def test_the_players_are_those_of_the_compared_clips(panel, listening, songs):
    """To the letter: levels, gains and pictures as well."""
    first = next(iter(listening.pairs.values()))
    assert panel.players.html == listening.compare(*first, {"output": ("a", AS_TRAINED)})[0]._repr_html_()


# --- cancelling -------------------------------------------------------------------------------------------------------


def test_a_cancelled_rendering_leaves_what_plays(panel, monkeypatch):
    before, said = panel.players.html, panel.playing.value
    fused = []

    def render_and_cancel(*what):
        fused.append(what)
        panel.work.button.click()
        return render(*what)

    monkeypatch.setattr(lib.listening.panel, "render", render_and_cancel)
    panel.controls["blend"].value = 0.5
    assert len(fused) == 1
    assert (panel.players.html, panel.playing.value) == (before, said)
    assert "Cancelled" in panel.work.message.value
    assert panel.work.busy.layout.display == "none"
    monkeypatch.undo()
    panel.controls["blend"].value = 0.6
    assert panel.players.html != before
    assert panel.work.message.value == ""
