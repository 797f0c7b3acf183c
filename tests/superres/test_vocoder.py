"""The vocoder's lengths, folded weights and phases; what each discriminator's logit sees, and the losses by hand."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lib.superres.mel import bin_of, inverse_spectrum, log_mel, magnitudes_of, spectrum
from lib.superres.training import load_part
from lib.superres.vocoder import (
    Discriminator,
    Discriminators,
    Vocoder,
    VocoderConfig,
    discriminator_loss,
    generator_losses,
    griffin_lim,
    outputs_of_both,
    period_discriminator,
)
from lib.training.run import Run

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


def mels(T: int, B: int = 2) -> Tensor:
    return torch.randn(B, 1, 256, T, generator=torch.Generator().manual_seed(1))


# --- HiFi-GAN ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 7, 8])
def test_480_samples_a_frame(T):
    """Kernel 10 at rate 5 makes one sample too many, which the later stages multiply by 16."""
    vocoder = loud()
    with torch.no_grad():
        wav, untrimmed = vocoder(mels(T)), vocoder.generator(mels(T)[:, 0].mT)
    assert wav.shape == (2, 1, 480 * T)
    assert untrimmed.shape == (2, 480 * T + 16)
    assert torch.equal(wav[:, 0], untrimmed[:, : 480 * T])
    assert wav.abs().max() < 1


def test_samples_come_from_the_frames_around_them():
    vocoder, mel = loud(), mels(20).requires_grad_()
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


def test_a_vocoder_is_loaded_without_weight_norm_and_is_the_same_function(tmp_path):
    vocoder, mel = loud(weight_norm=True), mels(4)
    assert vocoder.state_dict().keys() == Vocoder(TINY, weight_norm=True).state_dict().keys()
    lengths = [parameter for name, parameter in vocoder.named_parameters() if name.endswith("original0")]
    assert len(lengths) == 2 + 5 + 5 * 2 * 4
    with torch.no_grad():
        for length in lengths:  # as training leaves them, not those of the directions
            length.mul_(torch.rand_like(length) + 0.5)
        before = vocoder(mel)
        run = Run.create(tmp_path / "hifigan", {"sizes": dataclasses.asdict(TINY)})
        run.save(0, vocoder, {}, is_best=True)
        loaded = load_part(run, "hifigan")
        torch.testing.assert_close(loaded(mel), before, atol=1e-5, rtol=0)
    assert before.std() > 0.1
    assert not any(parametrize.is_parametrized(module) for module in loaded.modules())
    assert loaded.state_dict().keys() == Vocoder(TINY).state_dict().keys()


@pytest.mark.parametrize("weight_norm", [False, True])
def test_every_parameter_gets_a_gradient(weight_norm):
    vocoder = loud(weight_norm=weight_norm)
    vocoder(mels(4)).square().sum().backward()
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


# --- discriminators ---------------------------------------------------------------------------------------------------


PERIODS = (2, 3, 5, 7, 11)


def waveforms(N: int, B: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(B, 1, N, generator=torch.Generator().manual_seed(seed))


def tiny() -> Discriminators:
    torch.manual_seed(0)
    return Discriminators(period_channels=2, scale_channels=16)


# --- maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [960, 997, 1001])
def test_shapes_for_lengths_that_no_period_divides(N):
    outputs = tiny()(waveforms(N))
    assert len(outputs) == 8
    for period, (logits, features) in zip(PERIODS, outputs, strict=False):
        length, lengths = -(-N // period), []
        for stride in (3, 3, 3, 3, 1):
            length = (length + 4 - 5) // stride + 1
            lengths.append(length)
        widths = (2, 8, 32, 64, 64)
        assert [f.shape for f in features] == [(2, w, n, period) for w, n in zip(widths, lengths, strict=True)]
        assert logits.shape == (2, lengths[-1] * period)
    for i, (logits, features) in enumerate(outputs[5:]):
        length, lengths = N if i == 0 else N // 2 + 1 if i == 1 else (N // 2 + 1) // 2 + 1, []
        for stride in (1, 2, 2, 4, 4, 1, 1):
            length = (length - 1) // stride + 1
            lengths.append(length)
        widths = (16, 16, 32, 64, 128, 128, 128)
        assert [f.shape for f in features] == [(2, w, n) for w, n in zip(widths, lengths, strict=True)]
        assert logits.shape == (2, lengths[-1])


def test_parameters_of_the_papers_sizes():
    def weights(modules):
        """Of the convolutions themselves, without the lengths of weight normalisation."""
        return sum(m.weight.numel() + m.bias.numel() for d in modules for m in (*d.layers, d.last))

    with torch.device("meta"):
        discriminators = Discriminators()
        periods, scales = weights(discriminators.periods), weights(discriminators.scales)
    widths = (1, 32, 128, 512, 1024, 1024)
    a_period = sum(5 * a * b + b for a, b in itertools.pairwise(widths)) + 3 * 1024 + 1
    a_scale = (15 * 128 + 128) + (41 * 32 * 128 + 128) + (41 * 8 * 256 + 256) + (41 * 16 * 512 + 512)
    a_scale += (41 * 32 * 1024 + 1024) + (41 * 64 * 1024 + 1024) + (5 * 1024 * 1024 + 1024) + (3 * 1024 + 1)
    assert (periods, scales) == (5 * a_period, 3 * a_scale)
    assert round((periods + scales) / 1e6, 1) == 70.7


def test_feature_maps_are_those_after_the_leaky_rectifier():
    layers, last = [nn.Identity(), nn.Flatten(1)], nn.Linear(3, 1, bias=False)
    nn.init.ones_(last.weight)
    logits, features = Discriminator(layers, last)(torch.tensor([[[1.0, -1.0, -2.0]]]))
    torch.testing.assert_close(features[0], torch.tensor([[[1.0, -0.1, -0.2]]]))
    torch.testing.assert_close(features[1], torch.tensor([[1.0, -0.01, -0.02]]))
    torch.testing.assert_close(logits, torch.tensor([[0.97]]))


# --- what a logit sees ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", PERIODS)
def test_a_column_sees_every_period_th_sample_and_no_other(period):
    torch.manual_seed(0)
    discriminator, wav = period_discriminator(period, 2), waveforms(period * 100, B=1).requires_grad_()
    columns = discriminator(wav)[0].unflatten(1, (-1, period))[0].square().sum(0)
    for c, column in enumerate(columns):
        (gradient,) = torch.autograd.grad(column, wav, retain_graph=True)
        of_classes = gradient[0, 0].abs().unflatten(0, (100, period))
        assert of_classes[:, c].min() > 0
        of_classes[:, c] = 0
        assert of_classes.max() == 0


@pytest.mark.parametrize("period", PERIODS)
def test_an_incomplete_last_row_is_filled_by_reflection(period):
    torch.manual_seed(0)
    discriminator, wav = period_discriminator(period, 2), waveforms(100 * period + 1)
    missing = period - 1
    filled = torch.cat([wav, wav[..., -1 - missing : -1].flip(2)], dim=2)
    torch.testing.assert_close(discriminator(wav)[0], discriminator(filled)[0], rtol=0, atol=0)


def test_scales_see_the_mean_of_pairs_and_of_pairs_of_those():
    discriminators, wav = tiny().eval(), waveforms(640)
    smooth = nn.functional.pad(wav, (2, 2)).unfold(2, 4, 2).mean(3)
    smoother = nn.functional.pad(smooth, (2, 2)).unfold(2, 4, 2).mean(3)
    outputs = discriminators(wav)[5:]
    for (logits, features), scale, x in zip(outputs, discriminators.scales, (wav, smooth, smoother), strict=True):
        expected, of_x = scale(x)
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(features[0], of_x[0])  # where the edges still show


def test_first_scale_has_spectral_norm_and_the_others_lengths():
    discriminators = tiny()
    for _ in range(20):
        discriminators(waveforms(160))  # a step of the power method each
    first = discriminators.eval().scales[0]
    for layer in (*first.layers, first.last):
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)
    others = [*discriminators.periods, *discriminators.scales[1:]]
    lengths = [layer.parametrizations.weight.original0 for d in others for layer in (*d.layers, d.last)]
    assert all(length.shape[1:].numel() == 1 for length in lengths)


@pytest.mark.parametrize("N", [640, 653])
def test_gradients_reach_every_sample_and_every_parameter(N):
    discriminators, wav = tiny(), waveforms(N).requires_grad_()
    outputs = discriminators(wav)
    for logits, _ in outputs:
        (gradient,) = torch.autograd.grad(logits[0].square().sum(), wav, retain_graph=True)
        assert gradient[0].abs().min() > 0
        assert gradient[1].abs().max() == 0  # each waveform has outputs of its own
    sum(logits.square().sum() for logits, _ in outputs).backward()
    assert all(p.grad.abs().max() > 0 for p in discriminators.parameters())


# --- losses -----------------------------------------------------------------------------------------------------------


def both(*numbers: tuple[list, list[list]]):
    """Feature maps and then logits, of real and of fake each."""
    return [[[torch.tensor(x) for x in pair] for pair in discriminator] for discriminator in numbers]


def test_losses_by_hand():
    first = (([1.0, 2.0], [3.0, 1.0]), ([0.0], [-1.0]), ([1.0, 3.0], [0.0, 2.0]))
    found = both(first, (([4.0], [4.5]), ([0.0], [-1.0])))
    # (0 + 4)/2 + (0 + 4)/2, and 1 + 1
    assert discriminator_loss(found).item() == 6
    # (1 + 1)/2, and 4; (2 + 1)/2 + 1, and 1/2
    assert [loss.item() for loss in generator_losses(found)] == [5, 3]
    assert discriminator_loss(both((([1.0], [0.0]),))) == 0
    assert generator_losses(both((([0.0], [1.0]),))) == (0, 0)


def test_both_in_one_pass_are_each_alone_in_this_order():
    discriminators = tiny().eval()
    real, made = waveforms(320), waveforms(320, seed=2)
    found = outputs_of_both(discriminators, real, made)
    for which, wav in enumerate((real, made)):
        for (logits, features), pairs in zip(discriminators(wav), found, strict=True):
            for pair, own in zip(pairs, (*features, logits), strict=True):
                torch.testing.assert_close(pair[which], own, atol=1e-5, rtol=1e-4)
    of_real, of_fake = found[0][-1]
    assert (of_real - of_fake).abs().max() > 1e-3
