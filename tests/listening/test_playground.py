"""The playground: it plays what its controls say, and saves what it played with a recipe for it."""

import base64
import html
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ipywidgets
import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

import lib.listening.playground
from lib.audio.files import load_audio, save_audio
from lib.data.pairs import load_pair, read_manifest
from lib.listening.panel import Listening
from lib.listening.playground import Playground, _Panel
from lib.listening.render import Settings, follow_recipe, render
from lib.listening.widgets import describe_clip
from lib.model.cascade import CascadeConfig
from lib.model.fusion import FusionModel, load_model
from lib.model.rms_law import Clips
from lib.training.run import Run

AS_TRAINED = Settings(stages=2, residual_weight=0.3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, codec, save_run) -> dict[str, Run]:
    """Two stages of unlike residual weights with learned masks; one stage without masks, of an uncommon weight."""
    folder, reference = tmp_path_factory.mktemp("a folder"), CascadeConfig.reference
    two = reference(2, num_layers=1).with_stage(0, residual_weight=0.7).with_stage(1, residual_weight=0.3)
    return {
        "two": save_run(folder / "two", codec, two, "learned", seed=1),
        "one": save_run(folder / "one", codec, reference(1, num_layers=1, residual_weight=2.5), seed=2),
    }


@pytest.fixture(scope="module")
def models(runs) -> dict[str, FusionModel]:
    return {name: load_model(run) for name, run in runs.items()}


def make(codec, songs, runs, favourites: Path) -> Playground:
    """A playground whose uploaded files are beside its favourites."""
    listening = Listening(codec, songs, runs, favourites.parent / "uploads", favourites.parent / "superres")
    return Playground(listening, favourites)


@pytest.fixture
def playground(tmp_path, codec, songs, runs) -> Playground:
    return make(codec, songs, runs, tmp_path / "my favourites")


@pytest.fixture
def panel(playground) -> _Panel:
    return _Panel(playground)


@pytest.fixture
def renderings(monkeypatch) -> list[Settings]:
    """The settings of everything that is fused from now on."""
    found, fuse = [], Playground.fuse

    def counted(playground, run, input, targets, settings):
        found.append(settings)
        return fuse(playground, run, input, targets, settings)

    monkeypatch.setattr(Playground, "fuse", counted)
    return found


@pytest.fixture
def rendered(codec, models, playground) -> Callable[..., Tensor]:
    """`rendered(settings, run, target)`: the fusion of the first pair, or with another target."""

    def wanted(settings: Settings = AS_TRAINED, run: str = "two", target: str = "") -> Tensor:
        clips = (
            playground.listening.clips[playground.first[0]],
            playground.listening.clips[target or playground.first[1]],
        )
        return render(models[run], codec, *load_pair(*clips), settings).wav

    return wanted


def played(page: str) -> dict[str, Tensor]:
    """Name → samples `[1, N]` of every player in the HTML."""
    found = re.findall(r'<audio [^>]*aria-label="([^"]*)" src="data:audio/flac;base64,([^"]*)"', page)
    wavs = {html.unescape(name): soundfile.read(io.BytesIO(base64.b64decode(data)))[0] for name, data in found}
    return {name: torch.from_numpy(wav).float()[None] for name, wav in wavs.items()}


def output(panel: _Panel) -> Tensor:
    """The variant that plays."""
    return played(panel.players.html)["variant"]


def sounds_like(heard: Tensor, wanted: Tensor) -> bool:
    """Equal but for the 16 bits of the players."""
    return heard.shape == wanted.shape and torch.allclose(heard, wanted, rtol=0, atol=1e-4)


# --- what plays -------------------------------------------------------------------------------------------------------


def test_it_begins_with_the_first_pair_as_trained(panel, songs, rendered):
    first = songs.split("val")[0]
    heard = played(panel.players.html)
    assert list(heard) == ["input", "target", "variant", "unmodified output", "plain average", "HPSS"]
    for role, clip in (("input", first.input), ("target", first.target)):
        samples, _ = soundfile.read(songs.path(clip), start=clip.offset, frames=12_000, dtype="float32")
        assert sounds_like(heard[role], torch.from_numpy(samples)[None])
    assert sounds_like(heard["plain average"], (heard["input"] + heard["target"]) / 2)
    assert describe_clip(first.input) == panel.input.value
    assert panel.settings() == AS_TRAINED
    assert torch.equal(rendered(AS_TRAINED), rendered(Settings()))
    assert sounds_like(output(panel), rendered(Settings()))
    assert panel.work.message.value == ""


def test_every_clip_of_the_validation_pairs_can_be_chosen_and_no_other(panel, songs):
    wanted = {describe_clip(clip) for pair in songs.split("val") for clip in (pair.input, pair.target)}
    assert set(panel.input.options) == set(panel.targets.options) == wanted
    assert len(panel.input.options) == len(wanted) < len(songs.pairs)


CHANGED = {"residual_weight": 1.2, "noise": 0.4, "mask_hardness": 10.0, "whole_band": False}


@pytest.mark.parametrize("field", CHANGED)
def test_every_slider_reaches_the_sound(panel, rendered, field):
    before = output(panel)
    panel.controls[field].value = CHANGED[field]
    settings = replace(AS_TRAINED, **{field: CHANGED[field]})
    assert panel.settings() == settings
    assert sounds_like(output(panel), rendered(settings))
    assert not sounds_like(output(panel), before)


def test_the_seed_chooses_the_noise(panel, rendered):
    panel.controls["noise"].value = 0.5
    before = output(panel)
    panel.controls["seed"].value = 12
    settings = replace(AS_TRAINED, noise=0.5, seed=12)
    assert panel.settings() == settings
    assert sounds_like(output(panel), rendered(settings))
    assert not sounds_like(output(panel), before)


def test_all_sliders_at_once(panel, rendered):
    wanted = Settings(stages=1, residual_weight=0.45, noise=0.2, mask_hardness=0.1, seed=3)
    for name, control in panel.controls.items():
        control.value = getattr(wanted, name)
    assert panel.settings() == wanted
    assert sounds_like(output(panel), rendered(wanted))


def test_another_input_plays(panel, codec, models, playground):
    other = next(name for name in playground.listening.clips if name not in playground.first)
    panel.input.value = other
    pair = load_pair(playground.listening.clips[other], playground.listening.clips[playground.first[1]])
    assert sounds_like(played(panel.players.html)["input"], pair[0])
    assert sounds_like(output(panel), render(models["two"], codec, *pair, AS_TRAINED).wav)


def test_fewer_stages_bring_that_stages_own_weight_and_are_rendered_once(panel, rendered, renderings):
    assert (
        panel.controls["stages"].min,
        panel.controls["stages"].max,
        panel.controls["stages"].value,
        panel.controls["residual_weight"].value,
    ) == (1, 2, 2, 0.3)
    panel.controls["stages"].value = 1
    assert panel.controls["residual_weight"].value == 0.7
    assert renderings == [Settings(stages=1, residual_weight=0.7)]
    assert sounds_like(output(panel), rendered(Settings(stages=1)))
    panel.controls["stages"].value = 2
    assert panel.controls["residual_weight"].value == 0.3
    assert renderings[1:] == [AS_TRAINED]
    assert sounds_like(output(panel), rendered())


def test_the_sliders_fit_another_run(panel, rendered, renderings):
    panel.run.value = "one"
    assert (panel.controls["stages"].value, panel.controls["stages"].max) == (1, 1)
    assert (panel.controls["residual_weight"].value, panel.controls["mask_hardness"].disabled) == (2.5, True)
    assert sounds_like(output(panel), rendered(Settings(), "one"))
    assert renderings[-1] == Settings(stages=1, residual_weight=2.5)
    panel.run.value = "two"
    assert (panel.controls["stages"].value, panel.controls["stages"].max) == (2, 2)
    assert (
        panel.controls["residual_weight"].value,
        panel.controls["residual_weight"].max,
        panel.controls["mask_hardness"].disabled,
    ) == (0.3, 2.0, False)
    assert sounds_like(output(panel), rendered())


def test_a_run_without_stages_offers_none(tmp_path, codec, songs, runs, save_run, renderings):
    none = {"none": save_run(tmp_path / "none", codec, CascadeConfig.reference(0), "wide")}
    playground = make(codec, songs, none | runs, tmp_path / "favourites")
    panel = _Panel(playground)
    assert panel.work.message.value == ""
    assert renderings[-1] == Settings()
    off = [name for name, control in panel.controls.items() if control.disabled]
    assert off == ["stages", "residual_weight"]
    assert panel.greyed.value == "Greyed: stages and residual weight: this run has no cascade."
    assert panel.level.value == ""
    assert len(playground.settings_side_by_side().axes) >= 2 * 3
    panel.run.value = "two"
    assert renderings[-1] == AS_TRAINED
    assert not any(control.disabled for control in panel.controls.values())
    assert panel.greyed.value == ""
    panel.run.value = "none"
    assert renderings[-1] == Settings()


def test_nothing_is_rendered_twice_in_a_row(panel, renderings):
    panel.controls["seed"].value = 1
    panel.redraw()
    panel.redraw()
    assert renderings == [replace(AS_TRAINED, seed=1)]


# --- several targets --------------------------------------------------------------------------------------------------


def test_every_target_plays_and_can_be_saved(panel, playground, rendered):
    targets = tuple(playground.listening.clips)[:3]
    panel.targets.value = targets
    heard = played(panel.players.html)
    kinds = ("target", "variant", "unmodified output", "plain average", "HPSS")
    of = {targets[0]: "", targets[1]: f", {targets[1]}", targets[2]: f", {targets[2]}"}
    assert list(heard) == ["input", *(f"{kind}{of[target]}" for target in targets for kind in kinds)]
    for target in targets:
        assert sounds_like(heard[f"variant{of[target]}"], rendered(target=target))
    assert panel.favourite.options == targets
    panel.favourite.value = targets[1]
    panel.targets.value = targets[1:]
    assert (panel.favourite.options, panel.favourite.value) == (targets[1:], targets[1])  # the choice stays
    panel.targets.value = targets[2:]
    assert panel.favourite.value == targets[2]


def test_without_a_target_the_players_stay_and_the_message_says_what_to_do(panel):
    before, targets = panel.players.html, panel.targets.value
    panel.targets.value = ()
    assert "targets (one or more): none is selected; click one" in panel.work.message.value
    assert 'role="alert"' in panel.work.message.value
    assert panel.players.html == before
    panel.targets.value = targets
    assert panel.work.message.value == ""


# --- favourites -------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_played_and_its_recipe_renders_it_again(panel, playground, songs, rendered):
    targets = tuple(playground.listening.clips)[1:4]
    panel.targets.value = targets
    panel.favourite.value = targets[1]
    (
        panel.controls["noise"].value,
        panel.controls["seed"].value,
        panel.controls["mask_hardness"].value,
        panel.controls["stages"].value,
    ) = 0.3, 7, 4.0, 1
    heard = played(panel.players.html)[f"variant, {targets[1]}"]
    panel.name.value = "mine"
    panel.button.click()
    wav, recipe = (playground.favourites / f"mine.{suffix}" for suffix in ("wav", "json"))
    saved = load_audio(wav)
    assert sounds_like(heard, saved)
    wanted = Settings(stages=1, residual_weight=0.7, noise=0.3, mask_hardness=4.0, seed=7)
    assert torch.equal(saved, rendered(wanted, target=targets[1]))
    made = follow_recipe(recipe)
    assert made.equal
    assert torch.equal(made.wav, saved)
    clips = [playground.listening.clips[name] for name in (playground.first[0], targets[1])]
    assert made.files == tuple(Path(clip.path) for clip in clips)
    told = html.unescape(panel.work.message.value)
    assert f"Saved mine.wav in {playground.favourites}. " in told
    assert f"python -m lib.fuse --recipe '{recipe}' -o again.wav" in told  # the folder's name has a space


def test_nothing_is_overwritten(panel, playground):
    contents = {}
    for number, name in enumerate(("favourite", "favourite_2", "favourite_3")):
        panel.controls["seed"].value = number
        panel.controls["noise"].value = 0.5
        panel.button.click()
        assert f"Saved {name}.wav" in panel.work.message.value
        assert all((playground.favourites / f"{stem}.wav").read_bytes() == wav for stem, wav in contents.items())
        contents[name] = (playground.favourites / f"{name}.wav").read_bytes()
    assert len(set(contents.values())) == 3
    (playground.favourites / "favourite_4.json").write_text("mine")
    panel.button.click()
    assert "Saved favourite_5.wav" in panel.work.message.value
    assert (playground.favourites / "favourite_4.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("", "favourite"),
        (" / ", "favourite"),
        ("..", "favourite"),
        ("../../outside", "outside"),
        ("/etc/passwd", "etc_passwd"),
        ("loud & clear.wav", "loud_clear.wav"),
        ("Übung é", "Übung_é"),
        ("x" * 400, "x" * 100),
        ("音楽" * 150, "楽" + "音楽" * 16),
    ],
    ids=lambda text: text[-12:],
)
def test_any_name_becomes_a_file_in_the_folder(playground, name, wanted):
    recipe = playground.save(name, "one", *playground.first, Settings())
    assert recipe == playground.favourites / f"{wanted}.json"
    assert sorted(path.name for path in playground.favourites.iterdir()) == [f"{wanted}.json", f"{wanted}.wav"]
    assert follow_recipe(recipe).equal


def test_what_cannot_be_saved_is_reported(panel, playground):
    playground.favourites.write_text("a file")
    panel.button.click()
    assert "my favourites: cannot be written" in panel.work.message.value


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_songs(tmp_path, songs) -> Path:
    """Songs to spoil."""
    shutil.copytree(songs.root, tmp_path / "songs")
    shutil.copy(songs.root.parent / "manifest.json", tmp_path)
    return tmp_path


def spoil(path: Path, num_samples: int) -> None:
    wav = 0.1 * np.random.default_rng(9).standard_normal(num_samples)
    soundfile.write(path, wav, 24_000, subtype="PCM_24")


def test_a_file_that_is_shorter_now_or_gone_is_reported(own_songs, codec, runs):
    panel = _Panel(make(codec, read_manifest(own_songs / "manifest.json"), runs, own_songs / "favourites"))
    before = panel.players.html
    path = Path(panel.playground.listening.clips[panel.input.value].path)
    content = path.read_bytes()
    spoil(path, 400)
    panel.controls["noise"].value = 0.5
    assert re.search(r"song_\d\.wav: ends before sample \d+; restore the file", panel.work.message.value)
    path.unlink()
    panel.controls["noise"].value = 0.6
    assert re.search(r"song_\d\.wav: no such file; check the path", panel.work.message.value)
    assert panel.players.html == before
    path.write_bytes(content)
    panel.controls["noise"].value = 0.7
    assert panel.work.message.value == ""
    assert panel.players.html != before


def test_another_file_of_the_same_name_is_not_saved(own_songs, codec, runs):
    panel = _Panel(make(codec, read_manifest(own_songs / "manifest.json"), runs, own_songs / "favourites"))
    spoil(Path(panel.playground.listening.clips[panel.favourite.value].path), 42_000)
    panel.button.click()
    assert re.search(r"song_\d\.wav: not the file that the pair was made of", panel.work.message.value)
    assert list((own_songs / "favourites").iterdir()) == []


def test_what_never_played_cannot_be_saved(own_songs, codec, runs):
    manifest = read_manifest(own_songs / "manifest.json")
    shutil.rmtree(own_songs / "songs")
    panel = _Panel(make(codec, manifest, runs, own_songs / "favourites"))
    assert "no such file" in panel.work.message.value
    panel.button.click()
    assert "nothing to save yet" in panel.work.message.value
    assert not (own_songs / "favourites").exists()


def test_a_damaged_run_is_reported_and_another_can_be_selected(tmp_path, codec, songs, runs, save_run):
    bad = save_run(tmp_path / "bad", codec, CascadeConfig.reference(3, num_layers=1))
    (bad.path / "best" / "model.safetensors").write_bytes(b"damaged")
    panel = _Panel(make(codec, songs, {"two": runs["two"], "bad": bad}, tmp_path / "favourites"))
    before = panel.players.html
    panel.run.value = "bad"
    assert "model.safetensors: truncated or changed" in panel.work.message.value
    assert panel.players.html == before
    panel.run.value = "two"
    assert panel.work.message.value == ""


# --- without a front end ----------------------------------------------------------------------------------------------


SHOWN = {
    "as trained": Settings(),
    "half noise": Settings(noise=0.5),
    "one stage": Settings(stages=1),
    "last residual 0.1": Settings(residual_weight=0.1),
    "all-or-nothing masks": Settings(mask_hardness=100.0),
}


@pytest.mark.parametrize(("run", "left_out"), [("two", ()), ("one", ("one stage", "all-or-nothing masks"))])
def test_settings_side_by_side_are_those_that_the_run_has(
    tmp_path, codec, songs, runs, monkeypatch, rendered, run, left_out
):
    monkeypatch.setattr(lib.listening.playground, "waveforms_and_mels", lambda wavs: wavs)
    drawn = make(codec, songs, {run: runs[run]}, tmp_path / "favourites").settings_side_by_side()
    assert list(drawn) == [name for name in SHOWN if name not in left_out]
    for name, wav in drawn.items():
        assert torch.equal(wav, rendered(SHOWN[name], run))


def test_the_settings_become_a_figure_and_the_panel_a_box(playground):
    figure = playground.settings_side_by_side()
    titles = [axes.get_title() for axes in figure.axes]
    assert [title for title in titles if title] == list(SHOWN)
    assert isinstance(playground.panel(), ipywidgets.VBox)


def test_a_recipe_names_the_run_that_was_chosen(panel, playground, runs):
    panel.run.value = "one"
    panel.button.click()
    recipe = json.loads((playground.favourites / "favourite.json").read_text())
    assert (playground.favourites / recipe["run"]).resolve() == runs["one"].path.resolve()
    assert recipe["settings"]["stages"] == 1
    assert recipe["settings"]["residual_weight"] == 2.5


def test_uploaded_files_are_offered_and_saved_with_a_recipe(playground, songs, tmp_path, codec, runs):
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    save_audio(uploads / "0123456789ab_my song.wav", torch.rand(1, 9000) - 0.5)
    (uploads / "broken.wav").write_bytes(b"RIFF")
    with_uploads = make(codec, songs, runs, tmp_path / "favourites")
    (offered,) = with_uploads.listening.clips.keys() - playground.listening.clips.keys()
    assert offered == "my song.wav 0–0.375 s"
    recipe = with_uploads.save("mine", next(iter(runs)), with_uploads.first[0], offered, Settings())
    assert follow_recipe(recipe).equal
    assert json.loads(recipe.read_text())["target"]["path"].endswith("uploads/0123456789ab_my song.wav")


# --- beside the variant -----------------------------------------------------------------------------------------------


def test_the_unmodified_output_stays_while_the_variant_changes(panel, rendered):
    panel.controls["noise"].value = 0.5
    heard = played(panel.players.html)
    assert sounds_like(heard["unmodified output"], rendered(Settings()))
    assert not sounds_like(heard["variant"], heard["unmodified output"])


def test_masks_are_shown_where_a_run_has_some(panel, playground):
    assert panel.masks.layout.display is None
    before = bytes(panel.masks.value)
    panel.controls["mask_hardness"].value = 10.0
    assert bytes(panel.masks.value) != before
    _, parts, _ = playground.fuse("two", *playground.first[:1], playground.first[1:], AS_TRAINED)
    assert list(parts) == ["variant", "unmodified output"]
    panel.run.value = "one"
    assert panel.masks.layout.display == "none"


def test_the_level_is_that_of_the_last_applied_stage_beside_the_laws(panel, playground, models, codec):
    panel.controls["residual_weight"].value = 0.1
    pair = load_pair(*(playground.listening.clips[name] for name in playground.first))
    (*_, trace) = render(models["two"], codec, *pair, replace(AS_TRAINED, residual_weight=0.1)).traces
    goal = (trace.target_scale * trace.rms_before_scaling).item()
    config = models["two"].cascade.config.with_stage(1, residual_weight=0.1)
    law = config.predict_rms(Clips(goal, goal))[1]
    measured = f"RMS {trace.output_rms.item():.2f} of {goal:.2f}"
    predicted = f"by the law, before training, {law.output_rms:.2f}"
    safe = f"smallest safe weight {law.smallest_safe_weight:.2f}"
    assert panel.level.value == f"{measured}; {predicted}; {safe}"
    assert law.smallest_safe_weight > 0.1


# --- undo and reset ---------------------------------------------------------------------------------------------------


def chosen(panel: _Panel) -> tuple:
    return tuple(choice.value for choice in panel.choices)


def test_undo_goes_back_one_change_at_a_time_and_plays_each_once(panel, rendered, renderings):
    begun = chosen(panel)
    panel.controls["noise"].value = 0.5
    panel.controls["stages"].value = 1
    panel.run.value = "one"
    renderings.clear()
    panel.undo.click()
    assert panel.settings() == Settings(stages=1, residual_weight=0.7, noise=0.5)
    assert sounds_like(output(panel), rendered(panel.settings()))
    panel.undo.click()
    assert panel.settings() == replace(AS_TRAINED, noise=0.5)
    for _ in range(3):  # more often than there were changes
        panel.undo.click()
        assert chosen(panel) == begun
    assert len(renderings) == 3
    assert sounds_like(output(panel), rendered())


def test_reset_restores_the_beginning_and_can_be_undone(panel, rendered):
    begun = chosen(panel)
    panel.controls["mask_hardness"].value = 10.0
    panel.controls["residual_weight"].value = 1.2
    changed = chosen(panel)
    panel.reset.click()
    assert chosen(panel) == begun
    assert sounds_like(output(panel), rendered())
    panel.undo.click()
    assert chosen(panel) == changed


def test_a_file_that_is_uploaded_meanwhile_is_offered_at_once(panel, playground, tmp_path):
    before, playing = chosen(panel), panel.players.html
    (tmp_path / "uploads").mkdir()
    save_audio(tmp_path / "uploads" / "0123456789ab_mine.wav", torch.rand(1, 9000) - 0.5)
    playground.listening.offer_uploads()
    for listed in (panel.input, panel.targets):
        assert listed.options[-1] == "mine.wav 0–0.375 s"
    assert (chosen(panel), panel.players.html) == (before, playing)
    panel.targets.value = ("mine.wav 0–0.375 s",)
    assert played(panel.players.html)["target"].shape == (1, 9000)
