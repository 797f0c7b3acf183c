"""The vocoder's lengths and its folded weights; the phases that need no parameters."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lib.superres.mel import bin_of, inverse_spectrum, log_mel, magnitudes_of, spectrum
from lib.superres.vocoder import Vocoder, VocoderConfig, griffin_lim

TINY = VocoderConfig(channels=32, resblock_kernels=(3, 5), dilations=(1, 2))
CUTOFF = bin_of(6000)
FRAMES = 24


def loud(*, weight_norm: bool = False) -> Vocoder:
    """With weights that keep a signal's size, where the paper's start (0.01) makes silence of it."""
    torch.manual_seed(0)
    vocoder = Vocoder(TINY).eval()
    for module in vocoder.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            nn.init.kaiming_normal_(module.weight, a=0.1)
    if weight_norm:
        vocoder.generator.apply_weight_norm()
    return vocoder


def pictures(T: int, B: int = 2) -> Tensor:
    return torch.randn(B, 1, 256, T, generator=torch.Generator().manual_seed(1))


# --- HiFi-GAN ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 7, 8])
def test_480_samples_a_frame(T):
    """Kernel 10 at rate 5 makes one sample too many, which the later stages multiply by 16."""
    vocoder = loud()
    with torch.no_grad():
        wav, untrimmed = vocoder(pictures(T)), vocoder.generator(pictures(T)[:, 0].mT)
    assert wav.shape == (2, 1, 480 * T)
    assert untrimmed.shape == (2, 480 * T + 16)
    assert torch.equal(wav[:, 0], untrimmed[:, : 480 * T])
    assert wav.abs().max() < 1


def test_samples_come_from_the_frames_around_them():
    vocoder, mel = loud(), pictures(20).requires_grad_()
    vocoder(mel)[0, 0, 10 * 480 : 11 * 480].square().sum().backward()
    strength = mel.grad[0].abs().sum(dim=(0, 1))
    assert strength[[0, 1, -2, -1]].max() == 0
    centre = (strength * torch.arange(20)).sum() / strength.sum()
    assert centre.item() == pytest.approx(10, abs=0.3)
    assert mel.grad[1].abs().max() == 0


def test_full_configuration_against_arithmetic():
    def convolution(a, b, kernel):
        return a * b * kernel + b

    wanted = convolution(256, 1536, 7) + convolution(48, 1, 7)
    for i, kernel in enumerate((12, 10, 8, 4, 4)):
        width = 1536 // 2 ** (i + 1)
        wanted += convolution(2 * width, width, kernel)
        wanted += sum(6 * convolution(width, width, k) for k in (3, 7, 11, 15))  # three dilations, each with a second
    with torch.device("meta"):
        vocoder = Vocoder()
        assert vocoder(torch.zeros(1, 1, 256, 33)).shape == (1, 1, 480 * 33)
    assert sum(p.numel() for p in vocoder.parameters()) == wanted == 190_281_889


def test_folding_weight_norm_keeps_the_function():
    vocoder, mel = loud(weight_norm=True), pictures(4)
    with torch.no_grad():
        for name, parameter in vocoder.named_parameters():
            if name.endswith("original0"):  # lengths as training leaves them, not those of the directions
                parameter.mul_(torch.rand_like(parameter) + 0.5)
        before = vocoder(mel)
        lengths = sum("original0" in name for name, _ in vocoder.named_parameters())
        vocoder.fold_weight_norm()
        torch.testing.assert_close(vocoder(mel), before, atol=1e-5, rtol=0)
    assert lengths == 2 + 5 + 5 * 2 * 4
    assert before.std() > 0.1
    assert loud(weight_norm=True).state_dict().keys() == Vocoder(TINY, weight_norm=True).state_dict().keys()
    assert not any(parametrize.is_parametrized(module) for module in vocoder.modules())
    assert vocoder.state_dict().keys() == Vocoder(TINY).state_dict().keys()
    vocoder.fold_weight_norm()  # a second time changes nothing
    torch.testing.assert_close(vocoder(mel), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("weight_norm", [False, True])
def test_every_parameter_gets_a_gradient(weight_norm):
    vocoder = loud(weight_norm=weight_norm)
    vocoder(pictures(4)).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-4 for p in vocoder.parameters())


# --- Griffin and Lim --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip() -> Tensor:
    """Harmonics with a beat and some noise, `[1, 1, 480 · 24]`."""
    time = torch.arange(480 * FRAMES) / 48_000
    tones = sum(torch.sin(2 * torch.pi * 550 * k * time + k * k) / k for k in range(1, 40))
    hiss = torch.randn(time.shape, generator=torch.Generator().manual_seed(0))
    return (0.2 * tones * (1 + 0.5 * torch.sin(2 * torch.pi * 9 * time)) + 0.03 * hiss)[None, None]


@pytest.fixture(scope="module")
def known(clip) -> Tensor:
    """The clip without what lies above the cutoff."""
    bins = torch.fft.rfft(clip)
    bins[..., round(CUTOFF / 1024 * (bins.shape[-1] - 1)) :] = 0
    return torch.fft.irfft(bins)


def start(seed: int = 0) -> Tensor:
    return torch.rand(1, 1025, FRAMES, generator=torch.Generator().manual_seed(seed))


def test_without_iterations_the_start_gives_the_phases(clip, known):
    low, magnitudes = spectrum(known)[:, :CUTOFF], magnitudes_of(log_mel(clip))[:, CUTOFF:]
    angles = 2 * torch.pi * start()[:, CUTOFF:]
    made = torch.complex(magnitudes * angles.cos(), magnitudes * angles.sin())
    expected = inverse_spectrum(torch.cat([low, made], dim=1))
    found = griffin_lim(log_mel(clip), known, CUTOFF, noise=start(), iterations=0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_an_iteration_takes_the_phases_of_the_waveform_before_it(clip, known):
    mel = log_mel(clip)
    before, found = (griffin_lim(mel, known, CUTOFF, noise=start(), iterations=n) for n in (2, 3))
    made = torch.polar(magnitudes_of(mel)[:, CUTOFF:], spectrum(before)[:, CUTOFF:].angle())
    expected = inverse_spectrum(torch.cat([spectrum(known)[:, :CUTOFF], made], dim=1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_known_bins_stay_and_the_mel_above_them_comes_back(clip, known):
    mel = log_mel(clip)
    made = griffin_lim(mel, known, CUTOFF, noise=start())
    assert made.shape == clip.shape
    low, found = (spectrum(wav)[:, :CUTOFF] for wav in (known, made))
    assert (found - low).norm() < 0.01 * low.norm()
    assert (found - low)[:, :-1].norm() < 0.002 * low.norm()  # the last one is beside a bin that changes
    errors = (log_mel(made) - mel)[:, :, 180:]  # the bands from 6.6 kHz
    assert errors.abs().mean() < 0.2
    assert errors.mean().abs() < 0.05
    assert (log_mel(known) - mel)[:, :, 180:].mean() < -5  # what there was to restore


def test_same_noise_gives_the_same_waveform_and_other_noise_another(clip, known):
    mel = log_mel(clip)
    first, again, other = (griffin_lim(mel, known, CUTOFF, noise=start(seed), iterations=4) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).std() > 0.1 * (first - known).std()


def test_more_iterations_give_a_more_consistent_spectrum(clip, known):
    mel = log_mel(clip)
    wanted = magnitudes_of(mel)[:, CUTOFF:]

    def inconsistency(iterations):
        wav = griffin_lim(mel, known, CUTOFF, noise=start(), iterations=iterations)
        return ((spectrum(wav)[:, CUTOFF:].abs() - wanted).norm() / wanted.norm()).item()

    errors = [inconsistency(iterations) for iterations in (0, 2, 8, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.25 < 0.5 < errors[0]
