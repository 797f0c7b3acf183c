"""Restoring clips, signals and files: the clip's own band stays, clips join without a seam, errors leave nothing."""

import copy
import json
import os
import shutil

import numpy as np
import psutil
import pytest
import soundfile
import torch
from torch import Tensor
from torchaudio.functional import loudness

import lib.superres.resolver
from lib.audio.chunks import crossfaded
from lib.audio.decode import AudioError
from lib.audio.files import AudioWriter, check_audio, load_audio, save_audio
from lib.superres.degradation import Degradation
from lib.superres.mel import bin_of, known_bands, log_mel, spectrum
from lib.superres.resolver import (
    FULL,
    OVERLAP,
    Restoration,
    SuperResolver,
    band_edge,
    continued,
    file_band,
    join_bands,
    limited,
    restore_file,
    restore_folder,
)
from lib.superres.training import VaeTraining, VocoderTraining, train_part
from lib.util.errors import UserError
from superres.conftest import (
    CLIP,
    DISCRIMINATORS,
    LOOP,
    VAE,
    VOCODER,
    NoiseResolver,
    band,
    decibels,
    inner,
    white,
    write_music,
)

QUICK = Restoration(steps=2)


@pytest.fixture(scope="module")
def low() -> Tensor:
    """Two clips `[2, 1, CLIP]` whose band ends at 4 kHz."""
    return band(white(CLIP, channels=2), 0, 4_000)[:, None]


# --- one clip ---------------------------------------------------------------------------------------------------------


def test_the_clips_own_band_stays_and_one_above_is_added(resolver, low):
    made = resolver.restore(low, 4_000, QUICK)
    assert made.shape == low.shape
    assert decibels(band(inner(made - low), 0, 3_600), low) < -80
    assert decibels(band(inner(made), 4_200), band(inner(low), 4_200)) > 40
    assert decibels(band(inner(made), 4_200), low) > -60
    elsewhere = resolver.restore(low, 8_000, QUICK)
    assert decibels(band(inner(elsewhere - low), 0, 7_600), low) < -80  # the cutoff that is given counts
    assert decibels(band(inner(elsewhere), 8_200), low) > -60


def test_the_same_seed_is_the_same_sound(resolver, low):
    made = resolver.restore(low, 4_000, QUICK)
    assert torch.equal(made, resolver.restore(low.clone(), 4_000, QUICK))
    for other in (
        resolver.restore(low, 4_000, Restoration(steps=2, seed=1)),
        resolver.restore(low, 4_000, QUICK, numbers=[1, 2]),
        resolver.restore(low, 4_000, Restoration(steps=3)),
    ):
        assert decibels(other - made, band(made, 4_100)) > -40
    assert resolver.restore(low, 4_000, Restoration(steps=1, seed=2**63 - 1), numbers=[3, 4]).isfinite().all()


def test_seed_and_number_change_the_mel_itself(resolver, low):
    mel = resolver.predict_mel(low, 4_000, QUICK)
    assert mel.shape == (2, 1, 256, 16)
    for other in (
        resolver.predict_mel(low, 4_000, Restoration(steps=2, seed=1)),
        resolver.predict_mel(low, 4_000, QUICK, numbers=[1, 2]),
    ):
        assert (other - mel).abs().mean() > 1e-3


def test_latents_are_scaled_for_the_denoiser_and_back_again(resolver, low, monkeypatch):
    seen = {}

    def given_back(denoiser, latents, mel, noise, **options):
        seen.update(denoiser=denoiser, latents=latents, mel=mel, noise=noise, options=options)
        return latents

    monkeypatch.setattr("lib.superres.resolver.sample", given_back)
    made = resolver.predict_mel(low, 4_000, Restoration(steps=7))
    with torch.inference_mode():
        completed = resolver.completion.complete(log_mel(low), 4_000)
        latents = resolver.vae.encode(completed)
        torch.testing.assert_close(made, resolver.vae.decode(2 * latents), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen["latents"], resolver.latent_scale * latents)
    assert abs(resolver.latent_scale - 1) > 0.01
    assert torch.equal(seen["mel"], completed)
    assert seen["denoiser"] is resolver.denoiser
    assert seen["noise"].std().item() == pytest.approx(1, abs=0.2)
    assert seen["options"] == {"steps": 7}


def test_without_steps_it_is_what_is_expected(resolver, low):
    with torch.inference_mode():
        expected = resolver.completion.complete(log_mel(low), 4_000)
    assert Restoration().steps == 0
    assert torch.equal(resolver.predict_mel(low, 4_000, Restoration(seed=3)), expected)
    assert not torch.equal(resolver.predict_mel(low, 5_000, Restoration()), expected)


def test_what_is_restored_follows_from_the_low_resolution_clip_alone(resolver):
    """Two originals that differ above 8 kHz only are the same once degraded."""
    common = band(white(CLIP), 0, 5_000)
    originals = [common + band(white(CLIP, seed=seed), 8_000) for seed in (1, 2)]
    assert decibels(originals[0] - originals[1], common) > 0
    lows = [Degradation(5_000)(wav)[None] for wav in originals]
    assert decibels(lows[0] - lows[1], lows[0]) < -45  # what the filter lets through
    mels = [resolver.predict_mel(wav, 5_000, QUICK) for wav in lows]
    apart = (log_mel(originals[0][None]) - log_mel(originals[1][None])).abs().mean()
    assert (mels[0] - mels[1]).abs().mean() < 0.05 * apart
    first, _, again = (resolver.restore(wav, 5_000, QUICK) for wav in (lows[0], lows[1], lows[0].clone()))
    assert torch.equal(first, again)


def test_both_bands_are_joined_at_the_cutoff():
    low, made = white(CLIP)[None], white(CLIP, seed=1)[None]
    joined = join_bands(low, made, 6_000)
    assert decibels(band(inner(joined - low), 0, 5_600), low) < -100
    assert decibels(band(inner(joined - made), 6_100), made) < -100
    torch.testing.assert_close(join_bands(low, low, 6_000), low)
    parts = join_bands(low, 0 * low, 6_000) + join_bands(0 * low, low, 6_000)
    torch.testing.assert_close(parts, low, atol=1e-6, rtol=1e-4)
    share = (spectrum(join_bands(0 * low, low, 6_000)).abs() / spectrum(low).abs()).median(dim=2).values[0]
    assert share[: bin_of(5_700)].max() < 0.05  # in between it rises steadily
    assert share[bin_of(6_000) + 2 :].min() > 0.95
    assert share[bin_of(5_860)].item() == pytest.approx(0.5, abs=0.1)


def test_hifigan_is_used_where_it_was_trained_and_griffin_lim_elsewhere(resolver, trained, library, tmp_path):
    low = band(white(CLIP), 0, 4_000)[None]
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    with pytest.raises(UserError, match="hifigan: no run here"):
        SuperResolver(tmp_path / "run", vocoder="hifigan")
    with pytest.raises(UserError, match="vocoder='world' is not allowed; use one of griffin-lim, hifigan"):
        SuperResolver(tmp_path / "run", vocoder="world")
    config = VocoderTraining(**LOOP | DISCRIMINATORS | {"max_steps": 1})
    train_part(tmp_path / "run", "hifigan", library, VOCODER, config)
    assert SuperResolver(tmp_path / "run", vocoder="griffin-lim").vocoder is resolver.vocoder is None
    other = SuperResolver(tmp_path / "run")
    mel = resolver.predict_mel(low, 4_000, QUICK)
    with torch.inference_mode():
        expected = join_bands(low, other.vocoder(mel), 4_000)
    chosen = SuperResolver(tmp_path / "run", vocoder="hifigan")
    for by_hifigan in (other, chosen):
        assert torch.equal(by_hifigan.restore(low, 4_000, QUICK), expected)
    untrained = resolver.restore(low, 4_000, QUICK)
    assert not torch.allclose(untrained, expected, atol=1e-4)
    assert torch.equal(join_bands(low, other.vocode(mel, low, 4_000, QUICK, neural=False), 4_000), untrained)


def test_parts_that_do_not_belong_together_are_refused(trained, library, tmp_path):
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    config = VaeTraining(**LOOP | {"seed": 3, "max_steps": 1})
    train_part(tmp_path / "run", "vae", library, VAE, config)
    with pytest.raises(UserError, match=r"diffusion: was trained with another vae than .*vae; put that one back"):
        SuperResolver(tmp_path / "run")
    with pytest.raises(UserError, match="diffusion: no run here"):
        SuperResolver(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": -1},
        {"steps": 1_000},
        {"steps": 2.0},
        {"seed": -1},
        {"seed": 2**63},
        {"cutoff": 100.0},
        {"cutoff": 24_001},
    ],
)
def test_impossible_settings_are_refused(fields):
    ((name, value),) = fields.items()
    with pytest.raises(UserError, match=f"{name}={value!r} is not allowed"):
        Restoration(**fields)


# --- where a band ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", [300, 4_800, 15_000])
@pytest.mark.parametrize("num_samples", [640, 2_047, 2_048, 10_000, 96_000])
def test_the_end_of_a_band_is_found(edge, num_samples):
    """A clip shorter than a frame of 2048 samples is one, in which frequencies lie less close."""
    wav = band(white(192_000), 0, edge)[:, 50_000 : 50_000 + num_samples]
    slack = 200 if num_samples >= 2_048 else 600_000 / num_samples
    assert edge - 200 < band_edge(wav) < edge + slack
    assert band_edge(1e-4 * wav) == pytest.approx(band_edge(wav), abs=50)  # whatever the level
    assert band_edge(torch.cat([0 * wav, wav])) == pytest.approx(band_edge(wav), abs=50)  # in any channel


def test_bands_that_lack_nothing_and_silence():
    assert band_edge(white(20_000)) == pytest.approx(24_000)
    for length in (0, 1, 5, 2_048, 10_000):
        assert band_edge(torch.zeros(2, length)) == 0
    assert 0 <= band_edge(torch.ones(1, 1)) <= 24_000
    faint = band(white(48_000), 0, 4_000) + 1e-5 * band(white(48_000, seed=1), 10_000)  # 80 dB less of each bin is -83
    assert band_edge(faint) < 4_200
    assert band_edge(faint + 1e-3 * band(white(48_000, seed=1), 10_000, 12_000)) == pytest.approx(12_000, abs=200)


# --- longer than a clip -----------------------------------------------------------------------------------------------


def cut(wav: Tensor, clip: int, overlap: int) -> list[Tensor]:
    return [wav[:, i : i + clip] for i in range(0, wav.shape[1] - overlap, clip - overlap)]


def high_levels(wav: Tensor, clip: int, above: float) -> tuple[float, float]:
    """Levels in dB of what is above a frequency (Hz), in the middle of the fades of clips of that length, and between
    them."""
    upper, overlap = band(wav, above), round(OVERLAP * clip)
    step = clip - overlap
    seams = range(step, wav.shape[1] - clip, step)
    faded = [upper[:, s + overlap // 9 : s + 2 * overlap // 9] for s in seams]
    between = [upper[:, s + overlap : s + step] for s in seams]
    return tuple(decibels(torch.cat(parts, dim=1), torch.ones(1)) for parts in (faded, between))


def test_what_is_added_keeps_its_level_where_clips_join():
    """Under a clip's own band, which is louder and the same in both, the fade must still see that they differ."""
    resolver = NoiseResolver(12_000)
    low = band(white(12_000 + 20 * 10_500, channels=1), 0, 4_000)
    made = resolver.restore_signal(low, Restoration(cutoff=4_000))
    faded, between = high_levels(made, 12_000, 4_500)
    assert faded == pytest.approx(between, abs=0.6)
    assert -45 < between < -39  # it is there: an rms of 0.01
    assert decibels(band(inner(made - low), 0, 3_500), low) < -60
    clips = [resolver.restore(clip[None], 4_000, numbers=[i])[0] for i, clip in enumerate(cut(low, 12_000, 4_500))]
    whole = torch.cat(list(crossfaded(clips, 4_500, margin=3_000, keep_power=True)), dim=1)
    faded, between = high_levels(whole, 12_000, 4_500)
    assert faded < between - 2  # faded as a whole it dips


def test_what_a_model_makes_of_the_end_of_a_clip_does_not_reach_the_output():
    """Its convolutions know nothing beyond it."""

    class Shy(NoiseResolver):
        def restore(self, low: Tensor, *args, **options) -> Tensor:
            added = super().restore(low, *args, **options) - low
            added[..., -3_000:] = 0
            return low + added

    low = band(white(12_000 + 20 * 7_500), 0, 4_000)
    made = Shy(12_000).restore_signal(low, Restoration(cutoff=4_000))
    levels = band(made, 4_500)[:, 12_000:-12_000].unfold(1, 750, 750).square().mean(dim=2).log10().mul(10)
    assert levels.min() > levels.median() - 2


def test_silence_stays_silent():
    low = band(white(40_000, channels=2), 0, 4_000)
    low[1] = 0
    low[0, 16_000:30_000] = 0
    made = NoiseResolver(12_000).restore_signal(low, Restoration(cutoff=4_000))
    assert not made[1].any()
    assert not made[0, 18_000:28_000].any()
    for heard in (slice(2_000, 14_000), slice(32_000, 38_000)):
        assert decibels(band(made[0, heard], 6_000), torch.ones(1)) == pytest.approx(-41, abs=1.5)


def test_a_band_ends_where_something_is_heard_for_a_moment():
    """A hi-hat now and then, 40 dB below a bass note."""
    time = torch.arange(96_000) / 48_000
    wav = 0.5 * torch.sin(2 * torch.pi * 80 * time)[None]
    for start in range(9_600, 90_000, 24_000):
        wav[:, start : start + 2_400] += inner(band(white(2_400, seed=start, rms=0.012), 3_000, 9_000))
    assert band_edge(wav) > 8_000


@pytest.mark.parametrize("num_samples", [500, CLIP - 1, CLIP, CLIP + 1, 3 * CLIP + 5])
def test_a_signal_of_any_length_is_restored(resolver, num_samples):
    wav = band(white(num_samples, channels=2), 0, 5_000)
    made = resolver.restore_signal(wav, Restoration(steps=1, cutoff=5_000))
    assert made.shape == wav.shape
    assert made.isfinite().all()
    assert decibels(band(inner(made - wav), 0, 4_000), wav) < -60
    assert decibels(band(inner(made), 6_000), wav) > -60 > decibels(band(inner(wav), 6_000), wav)


def test_what_a_signal_is_mixed_of_limits_its_band(resolver):
    """A source that is known to have nothing above 5 kHz."""
    low, settings = band(white(2 * CLIP), 0, 5_000), Restoration(cutoff=5_000)
    free, held = (resolver.restore_signal(low, settings, sources) for sources in ((), [(low, FULL + 1)]))
    above = [decibels(band(inner(wav), 6_000), low) for wav in (free, held)]
    assert above[1] < above[0] - 10


def test_the_run_of_all_notebooks_names_its_super_resolver(trained, tmp_path):
    (tmp_path / "superres").symlink_to(trained)
    assert SuperResolver(tmp_path).latent_scale == SuperResolver(trained).latent_scale


def test_a_clip_of_one_length_is_restored_like_a_clip(resolver):
    wav = band(white(CLIP), 0, 5_000)
    made = resolver.restore_signal(wav, QUICK)
    torch.testing.assert_close(made, resolver.restore(wav[None], band_edge(wav), QUICK)[0], atol=1e-6, rtol=1e-5)


def test_channels_take_the_same_random_numbers_and_clips_others(resolver):
    """A sound in the middle stays there."""
    wav = band(white(2 * CLIP), 0, 5_000)
    made = resolver.restore_signal(wav.expand(2, -1), QUICK)
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(made[:1], resolver.restore_signal(wav, QUICK), rtol=0, atol=5e-5)
    fake = NoiseResolver(CLIP)
    fake.restore_signal(wav.expand(2, -1), Restoration(cutoff=5_000))
    assert fake.seen == [((6, 1, CLIP), 5_000, [0, 0, 1, 1, 2, 2])]


def test_so_many_clips_at_once_make_the_same_sound(resolver, monkeypatch):
    """One by one, or as many as fit into the seconds that are taken together; each has its own random numbers."""
    wav = band(white(5 * CLIP), 0, 5_000)
    together = resolver.restore_signal(wav, QUICK)
    for seconds, batches in ((0.0, [1] * 8), (2 * CLIP / 48_000, [2] * 4)):
        monkeypatch.setattr(lib.superres.resolver, "BATCH_SECONDS", seconds)
        torch.testing.assert_close(resolver.restore_signal(wav, QUICK), together, rtol=0, atol=1e-4)
        fake = NoiseResolver(CLIP)
        fake.restore_signal(wav, Restoration(cutoff=5_000))
        assert [shape[0] for shape, _, _ in fake.seen] == batches
        assert [number for _, _, numbers in fake.seen for number in numbers] == list(range(8))


def test_a_band_is_looked_for_at_the_clips_own_rate():
    assert band_edge(band(white(24_000), 0, 5_000, 24_000), 24_000) == pytest.approx(5_000, abs=150)
    assert band_edge(white(24_000), 24_000) == 12_000


def test_silence_is_left_as_it_is(resolver):
    for wav in (torch.zeros(2, 10_000), torch.zeros(1, 0)):
        assert torch.equal(resolver.restore_signal(wav, QUICK), wav)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("diffusion", {"latent_scale": None}),
        ("diffusion", {"latent_scale": 0}),
        ("diffusion", {"latent_scale": "much"}),
        ("diffusion", {"train": {}}),
        ("diffusion", {"train": {"clip_seconds": 0.7}}),
        ("diffusion", {"train": {"clip_seconds": "long"}}),
        ("diffusion", {"sizes": {"encoder": {"colour": 1}}}),
        ("diffusion", {"sizes": {"norm_groups": 3}}),
        ("vae", {"sizes": {"channels": "wide"}}),
        ("vae", {"sizes": None}),
    ],
)
def test_a_damaged_config_is_named(trained, tmp_path, part, change):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder, symlinks=True)
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=rf"{part}/config.json: "):
        SuperResolver(folder)


# --- files and folders ------------------------------------------------------------------------------------------------


ONE_STEP = Restoration(steps=1)


@pytest.fixture
def low_file(tmp_path):
    """`low_file(name, seconds=, edge=, rate=, channels=)`: noise whose band ends at `edge` Hz."""

    def write(name: str = "in.wav", seconds: float = 0.5, edge: float = 5_000, rate: int = 48_000, channels: int = 1):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_audio(path, band(white(round(seconds * rate), channels=channels), 0, edge, rate), rate)
        return path

    return write


# --- sources ----------------------------------------------------------------------------------------------------------


def test_bands_are_no_louder_than_in_a_source_that_tilts_alike():
    """By a mel of constant bands, whose levels can be computed by hand; the cutoff is below band `known`."""
    cutoff, known, octave = 8_000, known_bands(8_000), known_bands(4_000)
    wave = torch.linspace(-0.5, 0.5, 32).expand(2, 1, 256, -1)  # over frames, which the limit keeps
    mel = wave.clone()
    quiet, loud, dark = torch.full((3, 2, 1, 256, 1), -9.0)
    quiet[:, :, octave:known], quiet[:, :, known:] = -2, -3  # 2 below the clip in the octave: as it is
    loud[:, :, octave:known], loud[:, :, known : known + 9] = 1.5, 0.5  # 1.5 above it: at the clip's own level, -1
    dark[:, :, octave:known] = 0
    sources = [wave + x for x in (quiet, loud, dark)]
    made = limited(mel, sources, cutoff)
    assert torch.equal(made[:, :, :known], mel[:, :, :known])
    torch.testing.assert_close(made[:, :, known : known + 9], wave[:, :, known : known + 9] - 1)
    torch.testing.assert_close(made[:, :, known + 9 :], wave[:, :, known + 9 :] - 3)
    faint = torch.cat([mel[:, :, :known], mel[:, :, known:] - 20], dim=2)
    torch.testing.assert_close(limited(faint, sources, cutoff), faint)  # nothing is raised


def test_what_a_source_lacks_goes_on_as_its_own_tilt_does_and_never_rises():
    end, bands = 12_000, torch.arange(256.0)[:, None]
    known, octave = known_bands(end), known_bands(end / 2)
    falling, rising = (tilt * bands - 3 for tilt in (-0.02, 0.01))
    bright = torch.where(bands < known, falling, torch.tensor(5.0))
    torch.testing.assert_close(continued(bright, end), falling)
    torch.testing.assert_close(
        continued(torch.where(bands < known, falling, falling - 1), end)[known:], falling[known:] - 1
    )
    flat = continued(torch.where(bands < known, rising, torch.tensor(5.0)), end)
    assert torch.equal(flat[:known], rising[:known])
    torch.testing.assert_close(flat[known:], rising[octave:known].mean().expand(256 - known, 1))


class Bright(torch.nn.Module):
    """Expects far too much, as much in every band as in the loudest that is known."""

    def complete(self, mel: Tensor, cutoff: float) -> Tensor:
        known = mel[:, :, : known_bands(cutoff)]
        most = known.amax(dim=2, keepdim=True)
        return torch.cat([known, most.expand(-1, -1, 256 - known.shape[2], -1)], dim=2)


@pytest.mark.parametrize(("steep", "channels"), [((), 1), ((1,), 2), ((0, 1), 1)])
def test_a_restored_band_is_no_louder_than_the_sources_and_their_tilt(tmp_path, resolver, steep, channels):
    """In third octaves, for sources that fall by 12 dB an octave, some of them with a steep edge at 13 kHz, above which
    they are compared as they would go on."""
    resolver, sources, wavs = copy.copy(resolver), [], []
    resolver.completion = Bright()
    for seed, level in ((0, 0.2), (1, 0.1)):
        spectrum = torch.fft.rfft(white(48_000, seed=seed, channels=channels, rms=level))
        frequency = torch.linspace(0, 24_000, spectrum.shape[-1])
        shape = (frequency / 1_000).clamp_min(1) ** -2
        wavs.append(torch.fft.irfft(spectrum * shape))
        edge = frequency < (13_000 if seed in steep else 24_000)
        save_audio(tmp_path / f"{seed}.wav", torch.fft.irfft(spectrum * shape * edge), 48_000)
        sources.append(check_audio(tmp_path / f"{seed}.wav", mix=False))
    save_audio(tmp_path / "mix.wav", band(sum(wavs) / 2, 0, 8_000), 48_000)
    excess = {}
    for name, given in (("free", ()), ("limited", sources)):
        restore_file(tmp_path / "mix.wav", tmp_path / "out.wav", resolver, Restoration(), sources=given)
        made = inner(load_audio(tmp_path / "out.wav", sample_rate=48_000, channels=None))
        thirds = [(low, low * 2 ** (1 / 3)) for low in (8_500, 10_700, 13_500, 17_000)]
        excess[name] = [min(decibels(band(made, *t), band(inner(wav), *t)) for wav in wavs) for t in thirds]
    assert min(excess["free"]) > 6
    assert max(excess["limited"]) < 1
    assert min(excess["limited"]) > -12  # not muted


# --- a file -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "edge", "channels"), [(8_000, 3_500, 1), (24_000, 6_000, 2), (44_100, 6_000, 1), (48_000, 6_000, 2)]
)
def test_a_file_of_any_rate_becomes_one_at_48_khz(resolver, low_file, tmp_path, rate, edge, channels):
    path, out = low_file("in.wav", 0.3101, edge, rate, channels), tmp_path / "out.wav"
    written, cutoff = restore_file(path, out, resolver, ONE_STEP)
    info, made = soundfile.info(out), load_audio(out, sample_rate=48_000, channels=None)
    expected = load_audio(path, sample_rate=48_000, channels=None)
    assert (info.samplerate, info.channels, info.frames) == (48_000, channels, expected.shape[1])
    assert (written.path, written.num_samples, written.channels) == (out, expected.shape[1], channels)
    assert cutoff == pytest.approx(edge, abs=600)
    assert cutoff <= rate / 2
    assert decibels(band(inner(made - expected), 0, edge - 400), expected) < -60
    assert decibels(band(inner(made), cutoff + 300), expected) > -60


@pytest.mark.parametrize("kind", ["sine", "noise"])
def test_a_long_file_has_no_seam(tmp_path, kind):
    clip, seconds = 12_000, 5
    time = torch.arange(seconds * 48_000).double() / 48_000
    sine = 0.3 * torch.sin(2 * torch.pi * 441 * time)[None].float()
    wav = sine if kind == "sine" else band(white(len(time)), 0, 4_000)
    save_audio(tmp_path / "in.wav", wav, 48_000)
    restore_file(tmp_path / "in.wav", tmp_path / "plain.wav", NoiseResolver(clip, rms=0.0), Restoration(cutoff=4_000))
    plain = load_audio(tmp_path / "plain.wav", sample_rate=48_000)
    assert decibels(plain - wav, wav) < -120  # where nothing is added nothing is heard at the seams
    restore_file(tmp_path / "in.wav", tmp_path / "out.wav", NoiseResolver(clip), Restoration(cutoff=4_000))
    made = load_audio(tmp_path / "out.wav", sample_rate=48_000)
    faded, between = high_levels(made, clip, 4_300)
    assert faded == pytest.approx(between, abs=0.6)
    flux = band(made, 4_300)[0].unfold(0, 250, 250).square().mean(dim=1).log10().diff().abs()  # every 5 ms
    seams = torch.zeros(len(flux), dtype=torch.bool)
    for start in range(7_500, len(time) - clip, 7_500):
        seams[start // 250 - 1 : (start + 1_500) // 250 + 1] = True
    assert flux[seams].mean() == pytest.approx(flux[~seams].mean().item(), rel=0.3)
    assert flux[seams].max() < 1.5 * flux[~seams].max()


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Two channels of ten minutes at 48 kHz are 230 MB in memory."""
    process, peaks = psutil.Process(), []

    class Watching(NoiseResolver):
        def restore(self, low: Tensor, *args, **options) -> Tensor:
            peaks.append(process.memory_info().rss)
            return super().restore(low, *args, **options)

    highest, resolver = {}, Watching(480_000, rms=0.0)
    minute = 0.1 * np.random.default_rng(0).standard_normal((60 * 8_000, 2))
    for minutes in (1, 10):
        path = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(path, "w", 8_000, 2, "PCM_16") as file:
            for _ in range(minutes):
                file.write(minute)
        peaks.clear()
        restored, _ = restore_file(path, tmp_path / "out.wav", resolver, Restoration(cutoff=4_000))
        assert restored.num_samples == minutes * 60 * 48_000
        highest[minutes] = max(peaks)
        assert soundfile.info(tmp_path / "out.wav").frames == restored.num_samples
    assert highest[10] - highest[1] < 150e6


def test_the_band_is_looked_for_minute_by_minute(low_file, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.superres.resolver.BLOCK_SECONDS", 1)
    quiet, loud = band(white(96_000), 0, 3_000), band(white(48_000, seed=1), 0, 9_000)
    for wav in (torch.cat([quiet, loud], dim=1), torch.cat([loud, quiet], dim=1)):
        save_audio(tmp_path / "in.wav", wav, 48_000)
        assert file_band(check_audio(tmp_path / "in.wav")) == pytest.approx(9_000, abs=200)
    # what the rounding to 16 bits leaves of a minute's silence has the whole band, and is no band of the music
    silence = torch.zeros(1, 48_000) + (torch.rand(1, 48_000) < 0.5) / 2**15
    for tail in (silence, quiet[:, :48], quiet[:, :1_000]):  # nor has a last minute that is soon over
        wav = torch.cat([quiet, tail], dim=1)
        save_audio(tmp_path / "in.wav", wav, 48_000)
        assert file_band(check_audio(tmp_path / "in.wav")) == pytest.approx(3_000, abs=300)
    assert file_band(check_audio(low_file(edge=4_000, rate=8_000))) == 4_000  # the rate holds no more


@pytest.mark.parametrize("level", ["lufs", "peak", "none", None])
def test_a_level_is_the_files_own_or_one_that_is_wanted(low_file, tmp_path, level):
    path, loud = low_file(seconds=1.5, channels=2), NoiseResolver(12_000, rms=0.3)
    own = loudness(load_audio(path, sample_rate=48_000, channels=None), 48_000)
    restore_file(path, tmp_path / "out.wav", loud, Restoration(cutoff=8_000, level=level))
    made = load_audio(tmp_path / "out.wav", sample_rate=48_000, channels=None)
    changes = {"lufs": made.abs().max() < 0.9, "peak": 0.8 < made.abs().max() < 0.9, None: made.abs().max() > 1}
    assert changes.get(level, made.abs().max() < 0.9)
    assert (abs(loudness(made, 48_000) - own) < 0.1) == (level == "lufs")
    if level == "lufs":
        restore_file(path, tmp_path / "out.wav", loud, Restoration(cutoff=8_000, level=level), loudness=-30.0)
        assert loudness(load_audio(tmp_path / "out.wav", sample_rate=48_000, channels=None), 48_000) == pytest.approx(
            -30, abs=0.1
        )


def test_a_cutoff_that_is_given_is_used(low_file, tmp_path):
    fake = NoiseResolver(12_000)
    path = low_file(seconds=0.5, edge=5_000)
    assert restore_file(path, tmp_path / "out.wav", fake, Restoration(cutoff=8_000))[1] == 8_000
    assert {cutoff for _, cutoff, _ in fake.seen} == {8_000}
    fake.seen.clear()
    _, found = restore_file(path, tmp_path / "out.wav", fake, Restoration())
    assert {cutoff for _, cutoff, _ in fake.seen} == {found}
    assert found == pytest.approx(5_000, abs=200)


def test_a_file_whose_band_is_full_is_refused_with_the_fix(low_file, tmp_path):
    fake = NoiseResolver(12_000)
    path = low_file("full.wav", edge=24_000)
    with pytest.raises(AudioError, match=r"full.wav: its band, or .* reaches 24.0 kHz already; leave it as it is"):
        restore_file(path, tmp_path / "out.wav", fake, Restoration())
    assert sorted(os.listdir(tmp_path)) == ["full.wav"]
    restore_file(path, tmp_path / "out.wav", fake, Restoration(cutoff=8_000))


def test_a_cutoff_that_the_file_cannot_have_is_refused(low_file, tmp_path):
    path = low_file("low.wav", edge=3_000, rate=8_000)
    with pytest.raises(AudioError, match=r"low.wav: cutoff=5000 is not allowed: at 8000 Hz it holds nothing"):
        restore_file(path, tmp_path / "out.wav", NoiseResolver(12_000), Restoration(cutoff=5_000))


@pytest.mark.parametrize("num_samples", [1, 100])
def test_a_file_of_some_samples_is_restored(tmp_path, num_samples):
    save_audio(tmp_path / "in.wav", white(num_samples, rms=0.2) + 0.1, 24_000)
    fake = NoiseResolver(12_000)
    restored, _ = restore_file(tmp_path / "in.wav", tmp_path / "out.wav", fake, Restoration(cutoff=4_000))
    assert restored.num_samples == 2 * num_samples


def test_no_band_edge_is_below_what_models_learn_from(tmp_path):
    time = torch.arange(24_000) / 24_000
    save_audio(tmp_path / "in.wav", 0.3 * torch.sin(2 * torch.pi * 440 * time)[None], 24_000)
    fake = NoiseResolver(12_000)
    assert restore_file(tmp_path / "in.wav", tmp_path / "out.wav", fake, Restoration())[1] == 2_000


def test_no_result_is_written_among_the_files(low_file, tmp_path):
    """`a/a/x.flac` would become `a/x.wav`, which is there."""
    for name in ("a/a/x.flac", "a/x.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_audio(tmp_path / name, band(white(24_000), 0, 4_000), 48_000)
    before = {path: path.read_bytes() for path in tmp_path.rglob("x.*")}
    with pytest.raises(UserError, match="results would lie among the files"):
        restore_folder(tmp_path / "a", tmp_path, NoiseResolver(12_000), Restoration(), print)
    assert {path: path.read_bytes() for path in tmp_path.rglob("x.*")} == before


def test_each_file_is_reported_as_soon_as_it_is_written(low_file, tmp_path):
    (tmp_path / "in").mkdir()
    for name in "ab":
        save_audio(tmp_path / "in" / f"{name}.wav", band(white(24_000), 0, 4_000), 48_000)
    seen = []

    def report(*written):
        seen.append((written, sorted(path.name for path in (tmp_path / "out").iterdir())))

    assert restore_folder(tmp_path / "in", tmp_path / "out", NoiseResolver(12_000), Restoration(), report) == []
    assert [(writer.path.name, files) for (writer, _), files in seen] == [
        ("a.wav", ["a.wav"]),
        ("b.wav", ["a.wav", "b.wav"]),
    ]


def test_the_input_is_never_written_over(low_file, tmp_path):
    path = low_file()
    before = path.read_bytes()
    (tmp_path / "link.wav").symlink_to(path)
    (tmp_path / "sub").mkdir()
    for out in (path, tmp_path / "link.wav", tmp_path / "sub" / ".." / "in.wav"):
        with pytest.raises(UserError, match="is the input itself; choose another output file"):
            restore_file(path, out, NoiseResolver(CLIP), ONE_STEP)
    assert path.read_bytes() == before


def test_an_error_leaves_nothing_behind(low_file, tmp_path):
    class Failing(NoiseResolver):
        def restore(self, low: Tensor, *args, numbers=(), **options) -> Tensor:
            if 2 in numbers:
                raise RuntimeError("as if killed")
            return low

    path = low_file(seconds=1)
    (tmp_path / "out.wav").write_text("of an earlier run")
    with pytest.raises(RuntimeError, match="as if killed"):
        restore_file(path, tmp_path / "out.wav", Failing(CLIP), ONE_STEP)
    assert (tmp_path / "out.wav").read_text() == "of an earlier run"
    for out, words in (("none/out.wav", "No such file"), ("out.xyz", "cannot write .xyz"), ("out", "without suffix")):
        with pytest.raises(AudioError, match=words):
            restore_file(path, tmp_path / out, NoiseResolver(CLIP), ONE_STEP)
    with pytest.raises(AudioError, match="no such file"):
        restore_file(tmp_path / "none.wav", tmp_path / "out.wav", NoiseResolver(CLIP), ONE_STEP)
    assert sorted(os.listdir(tmp_path)) == ["in.wav", "out.wav"]


# --- a folder ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(low_file, tmp_path):
    """Two good files of five that are not, and one that is no audio by its name."""
    low_file("in/a.wav")
    low_file("in/more/b.flac", rate=24_000, channels=2)
    low_file("in/a.flac", edge=3_000)
    write_music(tmp_path / "in" / "full.wav", 0.3)
    soundfile.write(tmp_path / "in" / "silent.wav", np.zeros(20_000), 48_000)
    (tmp_path / "in" / "broken.wav").write_bytes((tmp_path / "in" / "a.wav").read_bytes()[:5_000])
    (tmp_path / "in" / "text.mp3").write_text("no audio")
    (tmp_path / "in" / "notes.txt").write_text("no audio file by its name")
    return tmp_path / "in"


def test_a_folder_is_restored_file_by_file(folder, tmp_path):
    done = []
    skipped = restore_folder(
        folder, tmp_path / "out", NoiseResolver(CLIP), Restoration(), lambda *written: done.append(written)
    )
    assert [restored.path.relative_to(tmp_path / "out").as_posix() for restored, _ in done] == ["a.wav", "more/b.wav"]
    assert all(soundfile.info(restored.path).samplerate == 48_000 for restored, _ in done)
    assert [restored.channels for restored, _ in done] == [1, 2]
    assert done[0][1] == pytest.approx(3_000, abs=200)  # that of a.flac, the first by name
    reasons = {path.relative_to(folder).as_posix(): reason for path, reason in skipped}
    assert set(reasons) == {"a.wav", "full.wav", "silent.wav", "broken.wav", "text.mp3", "notes.txt"}
    assert reasons["a.wav"] == "a.flac goes by the same name; rename one of them"
    assert "its band, or what a resampler left" in reasons["full.wav"]
    assert "silent" in reasons["silent.wav"]
    assert "truncated" in reasons["broken.wav"]
    assert "not audio" in reasons["text.mp3"]
    assert "not WAV" in reasons["notes.txt"]
    assert {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()} == {"a.wav", "b.wav"}


def test_a_bad_file_does_not_take_the_name_of_a_good_one(folder, tmp_path):
    (folder / "a.flac").write_text("no audio")
    done = []
    skipped = restore_folder(
        folder, tmp_path / "out", NoiseResolver(CLIP), Restoration(), lambda *written: done.append(written)
    )
    assert done[0][1] == pytest.approx(5_000, abs=200)
    assert (folder / "a.flac", folder / "a.wav") != tuple(path for path, _ in skipped[:2])


def test_a_folder_without_a_good_file_is_refused(folder, tmp_path):
    for path in (folder / "a.wav", folder / "a.flac", folder / "more" / "b.flac", folder / "full.wav"):
        path.unlink()
    with pytest.raises(UserError, match=r"in: no usable audio file \(broken.wav: .*truncated.*; silent.wav: .*; text"):
        restore_folder(folder, tmp_path / "out", NoiseResolver(CLIP), Restoration(), print)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(UserError, match=r"in: no usable audio file \(none there\)"):
        restore_folder(folder, tmp_path / "out", NoiseResolver(CLIP), Restoration(), print)


def test_a_full_disk_ends_a_folder(folder, tmp_path, monkeypatch):
    """What the other files would take is not computed in vain."""
    write = AudioWriter.write

    def full(writer, wav):
        if writer.path.name == "b.wav":
            raise writer._cannot_write(OSError(28, "No space left on device"))
        write(writer, wav)

    monkeypatch.setattr(AudioWriter, "write", full)
    done = []
    with pytest.raises(AudioError, match=r"b\.wav: cannot be written \(No space left on device\)"):
        restore_folder(folder, tmp_path / "out", NoiseResolver(CLIP), Restoration(), lambda *w: done.append(w))
    assert [restored.path.name for restored, _ in done] == ["a.wav"]


def test_an_output_folder_inside_the_input_or_not_writable_is_refused(folder, tmp_path):
    before = sorted(folder.rglob("*"))
    for out in (folder, folder / "out", tmp_path / "x" / ".." / "in" / "out"):
        with pytest.raises(UserError, match=r"results would lie among the files of .*; choose another output folder"):
            restore_folder(folder, out, NoiseResolver(CLIP), Restoration(), print)
    assert sorted(folder.rglob("*")) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/.*: cannot be written \(.*\); choose another output folder"):
        restore_folder(folder, tmp_path / "file", NoiseResolver(CLIP), Restoration(), print)
