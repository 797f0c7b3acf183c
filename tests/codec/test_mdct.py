"""The embedded codec: exact frame counts, reconstruction in the band, the latents' statistics."""

import math

import pytest
import torch

import lib.codec.mdct
import lib.util.provenance
from lib.audio.files import load_audio
from lib.audio.synth import make_demo_dataset
from lib.codec.mdct import DIM, GAIN, HOP, SAMPLE_RATE, MdctCodec


def low_passed(wav, cutoff=4500.0):
    spectrum = torch.fft.rfft(wav.double())
    spectrum[..., torch.fft.rfftfreq(wav.shape[-1], 1 / SAMPLE_RATE) > cutoff] = 0
    return torch.fft.irfft(spectrum, n=wav.shape[-1])


def band_limited_noise(num_samples, seed=0, cutoff=4500.0):
    """`[1, 1, N]` float64 cut out of a longer noise, so that its edges are like those of a clip out of a song."""
    noise = torch.randn(1, 1, num_samples + 8000, generator=torch.Generator().manual_seed(seed))
    return 0.1 * low_passed(noise, cutoff)[..., 4000 : 4000 + num_samples]


def snr(wanted, got):
    return float(10 * torch.log10(wanted.double().square().sum() / (wanted - got).double().square().sum()))


def kurtosis(x):
    return float(((x - x.mean()) ** 4).mean() / x.var() ** 2)


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    songs = make_demo_dataset(tmp_path_factory.mktemp("songs"), num_songs=4, seconds=8.0, seed=0)
    return [load_audio(song)[None] for song in songs]  # [1, 1, N] each


@pytest.mark.parametrize("num_samples", [1, 319, 320, 321, 640, 9_601, 384_000])
def test_mdct_has_the_exact_number_of_frames_for_any_length(num_samples):
    codec = MdctCodec()
    latents = codec.encode(torch.randn(2, 1, num_samples))
    frames = math.ceil(num_samples / HOP)
    assert latents.shape == (2, DIM, frames)
    assert codec.decode(latents).shape == (2, 1, frames * HOP)
    assert codec.decode(latents, num_samples).shape == (2, 1, num_samples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_samples", [384_000, 48_001, 48_160, 48_300, 24_000, 3_200])
def test_mdct_reconstructs_cut_out_band_limited_noise(num_samples, dtype):
    codec, wav = MdctCodec(), band_limited_noise(num_samples).to(dtype)
    assert snr(wav, codec.decode(codec.encode(wav), num_samples)) > 65


@pytest.mark.parametrize("frequency", [0, 50, 440, 4000, 4400, 4500])
def test_mdct_reconstructs_tones(frequency):
    codec = MdctCodec()
    wav = 0.5 * torch.cos(2 * math.pi * frequency * torch.arange(48_123).double() / SAMPLE_RATE + 0.3)[None, None]
    assert snr(wav, codec.decode(codec.encode(wav.float()), 48_123)) > 65


def test_mdct_reconstructs_low_passed_music_and_loses_the_band_above(music):
    codec = MdctCodec()
    for wav in music:
        low = low_passed(wav).float()
        assert snr(low, codec.decode(codec.encode(low))) > 85
    high = band_limited_noise(48_000, cutoff=12_000.0)
    high -= low_passed(high, 5_200.0)  # nothing left below 5.2 kHz
    assert snr(high, codec.decode(codec.encode(high))) < 0.1


def test_mdct_latents_of_music_have_the_level_and_tails_it_was_designed_for(music):
    latents = torch.cat([MdctCodec().encode(wav).flatten() for wav in music])
    assert latents.square().mean().sqrt() == pytest.approx(5.7, abs=1.0)
    assert kurtosis(latents) < 10
    assert kurtosis(latents**3) > 10  # without the compander


def test_mdct_padding_stays_small_after_full_band_noise():
    noise = torch.randn(8, 1, 48_010)
    assert MdctCodec().decode(MdctCodec().encode(noise)).abs().max() < 4 * noise.abs().max()


def test_mdct_functions_are_orthonormal():
    """Rows of the whole linear transform over 1, 2 and 5 frames: W·Wᵀ = I, so decoding projects and never amplifies."""
    for frames in (1, 2, 5):
        latents = GAIN * torch.eye(frames * DIM, dtype=torch.float64).unflatten(1, (DIM, frames))  # cube root of 1 is 1
        rows = MdctCodec().decode(latents)[:, 0]
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), atol=1e-12)


def test_the_butterfly_is_a_rotation_and_the_window_overlaps_the_whole_boundary():
    blocks = torch.randn(3, 4, HOP, dtype=torch.float64)
    folded = lib.codec.mdct._butterfly(blocks)
    assert torch.allclose(folded.square().sum(), blocks.square().sum())
    assert torch.allclose(lib.codec.mdct._butterfly(folded, inverse=True), blocks, atol=1e-14)
    half = HOP // 2
    assert torch.equal(folded[:, 0, :half], blocks[:, 0, :half])  # the outer edges have no partner
    assert torch.equal(folded[:, -1, half:], blocks[:, -1, half:])
    assert ((folded - blocks).abs()[:, 1:-1] > 1e-9).float().mean() > 0.8


def test_mdct_channels_are_frequencies_in_order_also_at_the_edges():
    for frames in (1, 8):
        for channel in (4, 40, 100, 120):
            frequency = (channel + 0.5) * SAMPLE_RATE / 2 / HOP
            wav = torch.sin(2 * math.pi * frequency * torch.arange(frames * HOP) / SAMPLE_RATE)[None, None]
            energy = MdctCodec().encode(wav)[0].abs() ** 6  # squared coefficients
            centre = (energy * torch.arange(DIM)[:, None]).sum(0) / energy.sum(0)
            assert (centre - channel).abs().max() < 3


def test_mdct_computes_in_its_inputs_precision_even_under_autocast():
    codec, wav = MdctCodec(), band_limited_noise(6_400)
    assert codec.decode(codec.encode(wav)).dtype == torch.float64
    plain = codec.decode(codec.encode(wav.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codec.decode(codec.encode(wav.float())), plain)
    assert codec.decode(codec.encode(wav.float()).bfloat16()).dtype == torch.float32


def test_mdct_decode_is_finite_for_any_finite_latents_and_shows_nan():
    codec = MdctCodec()
    for dtype in (torch.float32, torch.float64):
        huge = torch.finfo(dtype).max * torch.randn(1, DIM, 5, dtype=dtype).sign()
        assert torch.isfinite(codec.decode(huge)).all()
    loud = codec.encode(torch.ones(1, 1, 3200) * 100)  # 40 dB over full scale is still below the clamp
    assert codec.decode(loud).abs().max() > 90
    assert torch.isnan(codec.decode(torch.full((1, DIM, 1), float("nan")))).all()


def test_mdct_decode_is_differentiable_everywhere():
    noise = torch.randn(1, DIM, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for scale in (0.0, 1e-3, 5.7):
        for frames in (1, 3):
            latents = (scale * noise[..., :frames]).requires_grad_()
            assert torch.autograd.gradcheck(MdctCodec().decode, latents, fast_mode=True)
    zero = torch.zeros(1, DIM, 2, dtype=torch.float64, requires_grad=True)
    MdctCodec().decode(zero).sum().backward()
    assert torch.equal(zero.grad, torch.zeros_like(zero))


def test_mdct_first_used_in_inference_mode_still_trains_later():
    lib.codec.mdct._tables.cache_clear()
    lib.codec.mdct._design.cache_clear()
    with torch.inference_mode():
        latents = MdctCodec().encode(torch.randn(1, 1, 3200)).clone()
    latents = latents.clone().requires_grad_()
    MdctCodec().decode(latents).square().sum().backward()
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_mdct_refuses_audio_that_is_not_finite(bad):
    wav = torch.zeros(1, 1, 1000)
    wav[..., 500] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        MdctCodec().encode(wav)


def test_mdct_refuses_wrong_shapes_and_lengths():
    codec = MdctCodec()
    for wav in (torch.zeros(1, 320), torch.zeros(1, 2, 320), torch.zeros(1, 1, 0)):
        with pytest.raises(ValueError, match="expected"):
            codec.encode(wav)
    with pytest.raises(ValueError, match="expected"):
        codec.decode(torch.zeros(1, 127, 3))
    for length in (0, 961):
        with pytest.raises(ValueError, match="length"):
            codec.decode(torch.zeros(1, DIM, 3), length)


def test_mdct_latents_match_their_recorded_values():
    """Golden: if this fails the algorithm changed, so old caches and checkpoints are void."""
    wav = 0.25 * torch.sin(torch.arange(1_000, dtype=torch.float64) ** 1.5 / 40)[None, None]
    latents = MdctCodec().encode(wav)
    recorded = torch.tensor(
        [
            [8.19745, 0.33854, -2.07282, 4.54543],
            [-10.51984, -0.59218, -3.26686, 4.16085],
            [5.17229, -10.21593, -3.99391, 2.22499],
            [-0.95164, 12.39002, 7.12389, -6.11664],
        ],
        dtype=torch.float64,
    )  # channels 0, 32, 64, 96
    assert torch.allclose(latents[0, ::32], recorded, rtol=1e-3)


def test_mdct_fingerprint_depends_on_its_code_alone(edit_code, monkeypatch):
    before = MdctCodec().fingerprint
    edit_code("lib.codec.encodec")
    monkeypatch.setattr(lib.util.provenance, "_version", lambda package: "0.1")  # of torch
    assert MdctCodec().fingerprint == before
    edit_code("lib.codec.mdct")
    assert MdctCodec().fingerprint not in (before, "")
