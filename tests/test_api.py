"""The README's API section, executed as it stands: what users do in Python, with a loss term and a codec of theirs."""

import contextlib
import hashlib
import itertools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import soundfile
import torch

import lib.fuse
import lib.project
import lib.train
from lib.audio.decode import resample
from lib.audio.files import load_audio
from lib.audio.synth import make_demo_dataset
from lib.codec.codec import load_codec
from lib.compare import Compared, fused
from lib.data.latents import LatentPairs
from lib.data.pairs import whole_clip
from lib.evaluation.baselines import encoded, mean_metrics, measure_fusions
from lib.lab.claims import NOT_TESTED
from lib.listening.render import Settings, follow_recipe, render, save_with_recipe
from lib.model.cascade import CascadeConfig
from lib.model.fusion import load_model
from lib.presets import load_preset
from lib.project import open_project
from lib.train import train_project
from lib.training.run import Run
from lib.util.errors import UserError

ROOT = Path(__file__).parents[1]
SECTION = re.search(r"^## API\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
SNIPPET, MODULE = re.findall(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(command) for command in re.findall(r"^ {4}python -m (.*)$", SECTION, re.MULTILINE)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder, which is the repository too: five songs of 5 s in data/demo, and the README's mine.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(lib.project, "ROOT", tmp_path)
    make_demo_dataset(tmp_path / "data" / "demo", num_songs=5, seconds=5)
    (tmp_path / "mine.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.fixture
def stereo(folder) -> Path:
    """The same, its songs in stereo: on the right another song, more quietly; and a file whose channels cancel."""
    songs = sorted((folder / "data" / "demo").glob("*.wav"))
    wavs = [soundfile.read(song)[0] for song in songs]
    for song, left, right in zip(songs, wavs, wavs[1:] + wavs[:1], strict=True):
        soundfile.write(song, np.stack([left, 0.3 * right], axis=1), 24_000)
    opposite = np.stack([wavs[0], -wavs[0]], axis=1)  # silence in mono, which metrics would hear
    soundfile.write(songs[0].with_name("opposite.wav"), opposite, 24_000)
    return folder


def test_the_readmes_api_section_runs_as_it_stands(folder, save_run, capsys):
    """Its paths are relative, so that the working folder decides what they mean."""
    save_run(folder / "outputs" / "demo", load_codec("mdct"), CascadeConfig.reference(num_layers=1), "learned")
    names = {}
    exec(SNIPPET, names)
    fusion, T = names["fusion"], 375
    assert fusion.wav.shape == names["input"].shape == (1, 5 * 24_000)
    assert [mask.shape for mask in fusion.masks] == 2 * [(1, 128, T)]
    assert [latents.shape for latents in (*fusion.latents, *fusion.stages)] == 4 * [(1, 128, T)]
    assert len(fusion.traces) == 2
    run = names["mine"]
    assert run.path == folder / "outputs" / "mine"
    assert run.metrics("train")[-1]["step"] == 24
    source = hashlib.sha256(MODULE.encode()).hexdigest()
    term = {"function": "mine:steady", "weight": 0.1, "source": source}
    assert run.config["train"]["loss"]["own"] == {"steady": term}
    assert all(row["loss/steady"] > 0 for row in run.metrics())
    merits = eval(capsys.readouterr().out)
    assert {"demo", "mine", "input", "average of waveforms"} <= set(merits)
    assert all(0 <= merit <= 1 for merit in merits.values())


def test_the_readmes_commands_train_with_an_own_term_and_fuse_with_an_own_codec(stereo, monkeypatch, capsys):
    """With fewer steps. Of a stereo file, its codec keeps both channels."""
    small = ("train.max_steps=3", "data.clip_seconds=1", "model.num_layers=1", "listening.seconds=1")
    small = ["--data", "data/demo", *(f"--set={setting}" for setting in small)]
    for name, *arguments in COMMANDS:
        command = {"lib.train": lib.train.main, "lib.fuse": lib.fuse.main}[name]
        monkeypatch.setattr(sys, "argv", [name, *arguments, *(small if name == "lib.train" else ())])
        with contextlib.ExitStack() as ends:
            if name == "lib.fuse":
                assert ends.enter_context(pytest.raises(SystemExit)) is not None
            command()
    steady, frames = (Run.open(stereo / "outputs" / name) for name in ("steady", "frames"))
    assert steady.config["train"]["loss"]["own"]["steady"]["weight"] == 0.1
    assert all(row["loss/steady"] > 0 for row in steady.metrics("train"))
    assert frames.codec["name"] == "mine:Frames"
    assert "frames.wav: 5.00 s, stereo" in capsys.readouterr().out
    assert soundfile.info("frames.wav").samplerate == 16_000


OWN = {"train.max_steps": 3, "data.clip_seconds": 1.0, "listening.seconds": 1.0, "model.num_layers": 1}
OWN |= {"codec": "mine:Frames"}


def executed(notebook: str, **parameters: object) -> dict:
    """The names that a notebook's cells leave, with these parameters."""
    names: dict = {}
    for cell in nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", 4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
            names |= parameters if "parameters" in cell.metadata.get("tags", ()) else {}
    return names


def test_notebooks_01_and_05_work_with_a_stereo_codec_of_another_rate(stereo):
    where = {"overrides": OWN, "data_dir": "data/demo", "out_dir": "outputs/mine"}
    first = executed("01_encoding", **where)
    assert first["wav"].shape == first["decoded"].shape == (2, 16 * 16_000)
    assert first["latents"].shape == (128, 16 * 250)
    assert {wav.shape for wav in first["sounds"].values()} == {(2, 16 * 24_000)}
    stored = json.loads((stereo / "outputs" / "mine" / "report" / "01_encoding.json").read_text())
    (claims,) = (item["claims"] for item in stored["items"] if item["kind"] == "claims")
    assert {claim["verdict"] for claim in claims} == {NOT_TESTED}
    run = train_project(first["project"])
    fifth = executed("05_listening", **where)
    assert {players.seconds for players in fifth["players"].values()} == {1.0}
    saved = [soundfile.info(path) for path in (run.path / "audio").glob("val_*/*.wav")]
    assert saved
    assert {(file.samplerate, file.channels, file.frames) for file in saved} == {(16_000, 2, 16_000)}
    for players in fifth["players"].values():
        assert all((wav[0] - wav[1]).abs().max() > 0.01 for wav in players.wavs.values())
    assert {axes.get_xlim() for axes in fifth["pictures"].axes if axes.get_xlabel() == "time (s)"} == {(0.0, 1.0)}


def test_a_stereo_codec_of_another_rate_encodes_trains_and_fuses(stereo, save_run, monkeypatch, capsys):
    project = open_project(load_preset("smoke", OWN), "data/demo", "outputs/mine")
    codec, manifest = project.codec, project.manifest
    assert manifest.sample_rate == manifest.clip_length == 16_000
    for found in (manifest, project.listening()):  # which agree on what is held out
        ((path, reason),) = ((skipped.path, skipped.reason) for skipped in found.skipped)
        assert path == "opposite.wav"
        assert "cancel in the mono mix" in reason
    pairs = LatentPairs(project.index, "val")
    first = manifest.split("val")[-1]
    clips = [whole_clip(manifest, clip) for clip in (first.input, first.target)]
    wavs = [load_audio(clip.path, clip.offset, clip.length, 16_000, 2) for clip in clips]
    for wav, latents in zip(wavs, pairs[len(pairs) - 1], strict=True):
        assert (wav[0] - wav[1]).abs().max() > 0.05
        torch.testing.assert_close(latents, codec.encode(wav[None])[0], rtol=0, atol=1e-3)
    run = train_project(project)
    assert run.codec["name"] == "mine:Frames"
    assert run.config["cascade"]["latent_dim"] == 128
    assert all(row["loss/onsets"] > 0 for row in run.metrics("train"))
    for name in ("input", "last"):
        saved = soundfile.info(run.path / "audio" / f"pair_0_{name}.wav")
        assert (saved.samplerate, saved.channels) == (16_000, 2)
    left, right = load_audio(run.path / "audio" / "pair_0_input.wav", sample_rate=16_000, channels=2)
    assert (left - right).abs().max() > 0.05

    model = load_model(run)
    rendition = render(model, codec, *wavs)
    latents = model(*(codec.encode(wav[None]) for wav in wavs)).latents
    torch.testing.assert_close(rendition.wav, codec.decode(latents, length=16_000)[0])
    mono = [wav[:1] for wav in wavs]
    assert torch.equal(render(model, codec, *mono).wav, render(model, codec, *(wav.expand(2, -1) for wav in mono)).wav)

    (found,) = encoded([tuple(mono)], codec)
    for latents, wav in zip(found, mono, strict=True):
        assert torch.equal(latents, codec.encode(wav.expand(2, -1)[None])[0])

    mdct = load_codec("mdct")
    other = save_run(stereo / "outputs" / "mdct", mdct, CascadeConfig.reference(num_layers=1), "learned")
    compared = [Compared("mine", run, ""), Compared("mdct", other, "")]
    players = fused(compared, *clips).wavs
    assert torch.equal(players["input"], wavs[0])
    assert torch.equal(players["mine"], rendition.wav)
    in_mono = [resample(wav, 16_000, 24_000).mean(0, keepdim=True) for wav in wavs]
    fusion = render(load_model(other), mdct, *in_mono).wav
    assert torch.equal(players["mdct"], resample(fusion, 24_000, 16_000)[:, :16_000])
    with pytest.raises(UserError, match="outputs/mdct: this run was trained on latents of codec 'mdct'"):
        render(load_model(other), codec, *wavs)
    with pytest.raises(UserError, match="outputs/mine: this run was trained on latents of codec 'mine:Frames'"):
        measure_fusions([tuple(wavs)], mdct, {"mine": model})

    for name, seconds in (("a", 1.5), ("b", 1.2)):  # a tone of 500 Hz, on the right more quietly
        tone = 0.2 * np.sin(2 * np.pi * 500 * np.arange(seconds * 44_100) / 44_100)
        soundfile.write(f"{name}.wav", np.stack([tone, tone / 2], axis=1), 44_100)
    soundfile.write("left.wav", tone, 44_100)
    levels = {}
    for out, first, options in (("out", "a.wav", ()), ("mono", "a.wav", ("--mono",)), ("of_mono", "left.wav", ())):
        second = "left_again.wav" if first == "left.wav" else "b.wav"
        shutil.copy("left.wav", "left_again.wav")
        arguments = [first, second, "-o", f"{out}.wav", "--run", "outputs/mine", *options]
        monkeypatch.setattr(sys, "argv", ["lib.fuse", *arguments])
        with pytest.raises(SystemExit, match="0"):
            lib.fuse.main()
        made = load_audio(f"{out}.wav", sample_rate=16_000, channels=None)
        levels[out] = made.square().mean(1).sqrt().tolist()
        assert made.shape[1] == 19_200
        assert soundfile.info(f"{out}.wav").samplerate == 16_000
    assert {out: len(level) for out, level in levels.items()} == {"out": 2, "mono": 1, "of_mono": 1}
    assert all(0.01 < level < 1 for level in itertools.chain.from_iterable(levels.values()))
    assert levels["out"][1] == pytest.approx(levels["out"][0] / 2, rel=0.2)
    assert "out.wav: 1.20 s, stereo" in capsys.readouterr().out

    recipe = save_with_recipe(stereo / "favourite.wav", run, codec, *clips, Settings(mask_blend=0.5))
    followed, wanted = follow_recipe(recipe), render(model, codec, *wavs, Settings(mask_blend=0.5)).wav
    assert followed.equal
    assert torch.equal(followed.wav, wanted)
    assert torch.equal(load_audio("favourite.wav", sample_rate=16_000, channels=2), wanted)
    of_latents = measure_fusions([pairs[len(pairs) - 1]], codec, {"model": model})
    of_sound = measure_fusions([tuple(wavs)], codec, {"model": model})
    assert mean_metrics(of_latents["input"])["onsets"] == pytest.approx(1)
    for name, rows in of_latents.items():
        assert mean_metrics(of_sound[name]) == pytest.approx(mean_metrics(rows), abs=1e-3)
