"""The command line: what it says, what reaches the restoration, and how it fails."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch

from lib.audio.files import load_audio, save_audio
from lib.superres import __main__ as command
from lib.superres.resolver import Restoration
from superres.conftest import NoiseResolver, band, white

Result = tuple[int, str, str]


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., Result]:
    """`call(*argv)` runs the command; returns its exit code, stdout and stderr. A traceback would fail the test."""

    def run(*argv: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["lib.superres", *map(str, argv)])
        code = 0
        try:
            command.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def clip(tmp_path) -> Path:
    save_audio(tmp_path / "a clip.wav", band(white(9_600), 0, 5_000), 48_000)
    return tmp_path / "a clip.wav"


def check_one_line(result: Result, words: str) -> None:
    code, said, errors = result
    assert (code, said) == (2, ""), errors
    assert re.fullmatch(r"error: [^\n]+\n", errors), errors
    assert re.search(words, errors), errors


def test_a_file_is_one_line(call, clip, trained, tmp_path):
    out = tmp_path / "out é.wav"
    code, said, errors = call(clip, "-o", out, "--run", trained, "--steps", 1)
    assert code == 0
    assert "error" not in errors
    assert re.fullmatch(
        rf"{re.escape(str(out))}: 0.20 s, mono, band up to 2[34]\.\d kHz, -inf LUFS, true peak -\d+\.\d dBTP"
        r"( \(lowered by \d\.\d dB\))?, restored above 5\.[01] kHz\n",
        said,
    )
    assert soundfile.info(out).frames == 9_600
    first = load_audio(out, sample_rate=48_000)
    assert call(clip, "-o", out, "--run", trained, "--steps", 1, "--seed", 1)[0] == 0
    assert not torch.equal(load_audio(out, sample_rate=48_000), first)
    assert call(clip, "-o", out, "--run", trained, "--steps", 1, "--seed", 0)[0] == 0
    assert torch.equal(load_audio(out, sample_rate=48_000), first)


@pytest.mark.parametrize(
    ("options", "settings", "vocoder"),
    [
        ((), Restoration(level="none"), None),
        (("--vocoder", "hifigan"), Restoration(level="none"), "hifigan"),
        (("--steps", 7), Restoration(steps=7, level="none"), None),
        (("--vocoder", "griffin-lim"), Restoration(level="none"), "griffin-lim"),
        (("--seed", 9), Restoration(seed=9, level="none"), None),
        (("--cutoff", 4_000), Restoration(cutoff=4_000, level="none"), None),
        (("--level", "peak"), Restoration(level="peak"), None),
        (("--steps", 3, "--seed", 4, "--cutoff", 250.5), Restoration(3, 4, 250.5, "none"), None),
    ],
)
def test_options_reach_the_restoration(call, clip, monkeypatch, tmp_path, options, settings, vocoder):
    made, calls = [], []
    monkeypatch.setattr(command, "SuperResolver", lambda run, **options: made.append((run, options)) or "the resolver")

    def restore(path, out, resolver, settings):
        calls.append((path, out, resolver, settings))
        return "what was written", 4_800.0

    monkeypatch.setattr(command, "restore_file", restore)
    code, said, _ = call(clip, "-o", tmp_path / "out.wav", "--run", "a run", *options)
    assert code == 0
    assert calls == [(str(clip), str(tmp_path / "out.wav"), "the resolver", settings)]
    assert made == [("a run", {"vocoder": vocoder})]
    assert said == "what was written, restored above 4.8 kHz\n"


def test_a_folder_is_a_line_a_file_and_what_is_skipped_goes_to_stderr(call, clip, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "SuperResolver", lambda run, **options: NoiseResolver(12_000))
    (tmp_path / "in").mkdir()
    clip.rename(tmp_path / "in" / "a.wav")
    save_audio(tmp_path / "in" / "b.flac", band(white(8_000, channels=2), 0, 2_000, 16_000), 16_000)
    (tmp_path / "in" / "c.wav").write_text("no audio")
    code, said, errors = call(tmp_path / "in", "-o", tmp_path / "out", "--run", "r")
    assert code == 0
    lines = said.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(tmp_path / "out" / name) for name in ("a.wav", "b.wav")]
    assert "0.50 s, stereo" in lines[1]
    assert f"skipped {tmp_path / 'in' / 'c.wav'}: not audio" in errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", -1), "steps=-1 is not allowed"),
        (("--steps", 1_000), "steps=1000 is not allowed; use a whole number, 0 or more, at most 999"),
        (("--seed", -1), "seed=-1 is not allowed"),
        (("--seed", 2**63), "seed=9223372036854775808 is not allowed"),
        (("--cutoff", 50), "cutoff=50.0 is not allowed"),
    ],
)
def test_impossible_options_are_one_line(call, clip, trained, tmp_path, options, words):
    check_one_line(call(clip, "-o", tmp_path / "out.wav", "--run", trained, *options), words)
    assert not (tmp_path / "out.wav").exists()


def test_what_is_missing_is_one_line(call, clip, trained, tmp_path):
    out = tmp_path / "out.wav"
    check_one_line(call(clip, "-o", out, "--run", tmp_path / "none"), "none/diffusion: no run here")
    check_one_line(call(clip, "-o", out, "--run", trained, "--vocoder", "hifigan"), "hifigan: no run here")
    check_one_line(call(tmp_path / "none.wav", "-o", out, "--run", trained), "none.wav: no such file; check the path")
    check_one_line(call(clip, "-o", clip, "--run", trained), "is the input itself")
    check_one_line(call(clip, "-o", tmp_path / "x" / "out.wav", "--run", trained), "choose an existing folder")
    (tmp_path / "empty").mkdir()
    check_one_line(call(tmp_path / "empty", "-o", tmp_path / "o", "--run", trained), "no usable audio file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a clip.wav", "empty"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "required: input, -o/--out, --run"),
        (("a.wav", "-o", "b.wav"), "required: --run"),
        (("a.wav", "--run", "r"), "required: -o/--out"),
        (("a.wav", "-o", "b.wav", "--run", "r", "--steps", "many"), "invalid int value: 'many'"),
        (("a.wav", "-o", "b.wav", "--run", "r", "--seed", "1.5"), "invalid int value: '1.5'"),
        (("a.wav", "-o", "b.wav", "--run", "r", "--vocoder", "world"), "invalid choice: 'world'"),
    ],
)
def test_usage(call, argv, words):
    code, said, errors = call(*argv)
    assert (code, said) == (2, "")
    assert errors.startswith("usage: python -m lib.superres")
    assert words in errors
