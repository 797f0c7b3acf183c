"""Preset full from end to end, as on a server: EnCodec's weights from a folder, all notebooks, several processes. What
is cut is cut by `--set`; sizes of the models are the preset's own, but for the ablation's stages, which have one layer,
and the vocoder, which is Griffin-Lim."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from conftest import write_weights
from torch.distributed.elastic.utils.distributed import get_free_port

from lib.pipeline import NOTEBOOKS
from lib.project import ROOT
from lib.training.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
CUT = {
    "data.clip_seconds": 1,
    "train.max_steps": 2,
    "train.batch_size": 2,
    "train.checkpoint_every": 1,
    "train.max_train_pairs": 8,
    "train.max_val_pairs": 2,
    "train.loss.window_seconds": 0.5,
    "listening.seconds": 1,
    "listening.pairs": 1,
    "evaluation.pairs": 2,
    "ablation.variants": "named",
    "ablation.layers": 1,
    "ablation.steps": 1,
    "ablation.seeds": 1,
    "ablation.clip_seconds": 1,
    "ablation.batch_size": 1,
    "ablation.val_pairs": 1,
    "superres.completion_steps": 1,
    "superres.vae_steps": 1,
    "superres.steps": 1,
    "superres.vocoder_steps": 0,  # HiFi-GAN at its full width takes minutes to judge
    "superres.sampler_steps": 1,
    "superres.clips": 1,
    "superres.clip_seconds": 0.32,
    "superres.batch_size": 1,
    "superres.examples": 4,
}


def settings(**changes: object) -> list[str]:
    return [f"--set={name}={value}" for name, value in (CUT | changes).items()]


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "encodec").parent


@pytest.fixture(scope="module")
def out(tmp_path_factory, weights) -> Path:
    out = tmp_path_factory.mktemp("full") / "full"
    run("lib.pipeline", "--preset=full", f"--codec={weights}", f"--out={out}", *settings())
    return out


def test_all_notebooks_run(out):
    marks = {name: json.loads((out / "report" / f"{name}.mark").read_text()) for name in NOTEBOOKS}
    assert all(mark["seconds"] > 0 for mark in marks.values())
    assert 'class="failed"' not in (out / "index.html").read_text()
    parts = {path.parent.name for path in (out / "superres").glob("*/best")}
    assert parts == {"completion", "vae", "diffusion"}
    assert Run.open(out).codec["name"] == "encodec"


def test_two_processes_train_and_one_resumes(out, weights, tmp_path):
    how = ("--preset=full", f"--codec={weights}", f"--out={tmp_path / 'run'}")
    port = get_free_port()
    run("torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", "-m", "lib.train", *how, *settings())
    run("lib.train", *how, "--resume", *settings(**{"train.max_steps": 3}))
    assert [row["step"] for row in Run.open(tmp_path / "run").metrics("train")] == [1, 2, 3]

    songs = [f"{ROOT}/data/demo/song_0{i}.wav" for i in (0, 1)]
    said = run("lib.fuse", *songs, f"--out={tmp_path / 'fused.wav'}", f"--run={out}")  # by the weights of its training
    assert soundfile.info(tmp_path / "fused.wav").samplerate == 24_000
    assert "in 3 chunk(s)" in said
    run("lib.compare", str(out), str(tmp_path / "run"), f"--out={tmp_path / 'both'}", "--pairs=1", "--judged=1")
    assert (tmp_path / "both" / "index.html").exists()
