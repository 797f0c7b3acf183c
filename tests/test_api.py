"""What users do in Python: the README's API section, executed as it stands; and a codec of another rate and size."""

import hashlib
import json
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import soundfile
import torch
from conftest import BLOCKS

import lib.project
from lib.audio.files import load_audio
from lib.audio.synth import make_demo_dataset
from lib.codec.codec import load_codec
from lib.data.latents import LatentPairs
from lib.data.pairs import whole_clip
from lib.evaluation.baselines import mean_metrics, measure_fusions
from lib.fuse import main
from lib.lab.claims import NOT_TESTED
from lib.listening.render import Settings, follow_recipe, save_with_recipe
from lib.model.cascade import CascadeConfig
from lib.model.fusion import load_model
from lib.pipeline import parse_overrides
from lib.presets import load_preset
from lib.project import open_project
from lib.train import train_project

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder, which is the repository too, with five songs of 5 s in data/demo."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(lib.project, "ROOT", tmp_path)
    make_demo_dataset(tmp_path / "data" / "demo", num_songs=5, seconds=5)
    yield tmp_path
    for module in ("mine", "own_blocks"):
        sys.modules.pop(module, None)


def test_the_readmes_api_section_runs_as_it_stands(folder, save_run, capsys):
    """Its paths are relative, so that the working folder decides what they mean."""
    section = re.search(r"^## API\n(.*?)^## ", README.read_text(), re.MULTILINE | re.DOTALL)[1]
    snippet, module = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    save_run(folder / "outputs" / "demo", load_codec("mdct"), CascadeConfig.reference(num_layers=1), "learned")
    (folder / "mine.py").write_text(module)
    names = {}
    exec(snippet, names)
    fusion, T = names["fusion"], 375
    assert fusion.wav.shape == names["input"].shape == (1, 5 * 24_000)
    assert [mask.shape for mask in fusion.masks] == 2 * [(1, 128, T)]
    assert [latents.shape for latents in (*fusion.latents, *fusion.stages)] == 4 * [(1, 128, T)]
    assert len(fusion.traces) == 2
    run = names["mine"]
    assert run.path == folder / "outputs" / "mine"
    assert run.metrics("train")[-1]["step"] == 24
    source = hashlib.sha256(module.encode()).hexdigest()
    term = {"function": "mine:steady", "weight": 0.1, "source": source}
    assert run.config["train"]["loss"]["own"] == {"steady": term}
    assert all(row["loss/steady"] > 0 for row in run.metrics())
    merits = eval(capsys.readouterr().out)
    assert {"demo", "mine", "input", "average of waveforms"} <= set(merits)
    assert all(0 <= merit <= 1 for merit in merits.values())
    command = re.search(r"--set '(train\.loss\.own=.*?)'", section)[1]
    assert (
        load_preset("smoke", parse_overrides([command])).train.loss
        == load_preset("smoke", {"train.loss.own": {"steady": {"function": "mine:steady", "weight": 0.1}}}).train.loss
    )


OWN = {"train.max_steps": 3, "data.clip_seconds": 1.0, "listening.seconds": 1.0, "model.num_layers": 1}
OWN |= {"codec": "own_blocks:Blocks"}


def executed(notebook: str, **parameters: object) -> dict:
    """The names that a notebook's cells leave, with these parameters."""
    names: dict = {}
    for cell in nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", 4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
            names |= parameters if "parameters" in cell.metadata.get("tags", ()) else {}
    return names


def test_notebooks_01_and_05_work_with_a_codec_of_another_rate_and_size(folder):
    (folder / "own_blocks.py").write_text(BLOCKS)
    where = {"overrides": OWN, "data_dir": "data/demo", "out_dir": "outputs/mine"}
    first = executed("01_encoding", **where)
    assert first["wav"].shape == first["decoded"].shape == (1, 16 * 16_000)
    assert first["latents"].shape == (64, 16 * 125)
    assert {wav.shape for wav in first["sounds"].values()} == {(1, 16 * 24_000)}
    stored = json.loads((folder / "outputs" / "mine" / "report" / "01_encoding.json").read_text())
    (claims,) = (item["claims"] for item in stored["items"] if item["kind"] == "claims")
    assert {claim["verdict"] for claim in claims} == {NOT_TESTED}
    run = train_project(first["project"])
    fifth = executed("05_listening", **where)
    assert {players.seconds for players in fifth["players"].values()} == {1.0}
    saved = [soundfile.info(path) for path in (run.path / "audio").glob("val_*/*.wav")]
    assert saved
    assert {(file.samplerate, file.frames) for file in saved} == {(16_000, 16_000)}
    assert {axes.get_xlim() for axes in fifth["pictures"].axes if axes.get_xlabel() == "time (s)"} == {(0.0, 1.0)}


def test_a_codec_of_another_rate_and_size_encodes_trains_and_fuses(folder, monkeypatch, capsys):
    (folder / "own_blocks.py").write_text(BLOCKS)
    project = open_project(load_preset("smoke", OWN), "data/demo", "outputs/mine")
    codec, manifest = project.codec, project.manifest
    assert manifest.sample_rate == manifest.clip_length == 16_000
    pairs = LatentPairs(project.index, "val")
    first = manifest.split("val")[-1]
    clips = [whole_clip(manifest, clip) for clip in (first.input, first.target)]
    for clip, latents in zip(clips, pairs[len(pairs) - 1], strict=True):
        wav = load_audio(clip.path, clip.offset, clip.length, 16_000)
        torch.testing.assert_close(latents, codec.encode(wav[None])[0], rtol=0, atol=1e-3)
    run = train_project(project)
    assert run.codec["name"] == "own_blocks:Blocks"
    assert run.config["cascade"]["latent_dim"] == 64
    assert all(row["loss/onsets"] > 0 for row in run.metrics("train"))
    for name in ("input", "last"):
        assert soundfile.info(run.path / "audio" / f"pair_0_{name}.wav").samplerate == 16_000

    for name, seconds in (("a", 1.5), ("b", 1.2)):  # a tone of 500 Hz in stereo, which the codec carries
        tone = 0.2 * np.sin(2 * np.pi * 500 * np.arange(seconds * 44_100) / 44_100)
        soundfile.write(f"{name}.wav", np.stack([tone, tone / 2], axis=1), 44_100)
    monkeypatch.setattr(sys, "argv", ["lib.fuse", "a.wav", "b.wav", "-o", "out.wav", "--run", "outputs/mine"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert capsys.readouterr().out.startswith("out.wav: 1.20 s")
    out = soundfile.info("out.wav")
    assert (out.samplerate, out.channels, out.frames) == (16_000, 2, 19_200)
    assert 0.01 < load_audio("out.wav", sample_rate=16_000).square().mean().sqrt() < 1

    recipe = save_with_recipe(folder / "favourite.wav", run, codec, *clips, Settings(mask_blend=0.5))
    assert follow_recipe(recipe).equal
    assert soundfile.info("favourite.wav").samplerate == 16_000
    measured = measure_fusions([pairs[0]], codec, {"model": load_model(run)})
    assert mean_metrics(measured["input"])["onsets"] == pytest.approx(1)
    assert np.isfinite(list(mean_metrics(measured["model"]).values())).all()
