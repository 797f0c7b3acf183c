"""The loss terms against second implementations and cases worked out by hand, and the sum of them.

Every term is a mean over clips: a batch's loss is the mean of its parts' losses.
"""

import dataclasses
import itertools
import math
import sys
import warnings

import encodec.model
import librosa
import numpy as np
import pytest
import torch
from torch import Tensor

import lib.audio.features
import lib.training.losses
from lib.audio.features import Sound, correlation, harmony_similarity
from lib.audio.synth import render_song
from lib.codec.encodec import EncodecCodec
from lib.codec.mdct import MdctCodec
from lib.model.cascade import CascadeConfig
from lib.model.masks import MaskingConfig, Masks
from lib.training.config import TrainConfig
from lib.training.fusion_learner import run_settings
from lib.training.losses import (
    MASK_TERMS,
    SOUND_TERMS,
    LossConfig,
    OwnTerm,
    balance,
    coverage,
    discriminator_hinge,
    envelope_signs,
    latent_mse,
    novelty,
    onsets_left,
    overlap,
    rms_error,
    temporal_diversity,
    tones,
    total_loss,
)
from lib.util.errors import UserError

FRAMES = 150  # of a song's latents: two seconds


def constant(value: float) -> torch.Tensor:
    return torch.full((2, 3, 4), value)


@pytest.fixture(scope="module")
def songs() -> Tensor:
    """`[12, 1, N]`: two seconds each, of levels that differ fivefold."""
    wavs = np.stack([render_song(1, i, 3 * 24_000)[24_000:] for i in range(12)])
    return torch.from_numpy(wavs).float()[:, None] * torch.linspace(0.2, 1, 12)[:, None, None]


@pytest.fixture(scope="module")
def batch(songs) -> list[Tensor]:
    """Output, input and target `[4, 128, 150]`; the output is a little of both sources and something of its own."""
    own, input, target = MdctCodec().encode(songs).split(4)
    return [own + 0.3 * input + 0.3 * target, input, target]


def test_latent_mse_is_the_mean_of_squares():
    assert latent_mse(constant(3.0), constant(1.0)).item() == 4.0
    output = torch.zeros(1, 2, 2)
    output[0, 1, 1] = 6.0
    assert latent_mse(output, torch.zeros(1, 2, 2)).item() == 9.0  # 36 over four elements, not their sum


def test_total_is_the_weighted_sum_of_both_terms():
    loss, terms = total_loss(constant(1.0), constant(3.0), constant(-2.0), LossConfig())
    assert {name: term.item() for name, term in terms.items()} == {"input_mse": 4.0, "target_mse": 9.0}
    assert loss.item() == pytest.approx(0.3 * 4 + 0.3 * 9)
    loss, _ = total_loss(constant(1.0), constant(3.0), constant(-2.0), LossConfig(0.5, 2.0))
    assert loss.item() == pytest.approx(0.5 * 4 + 2 * 9)  # input and target are not swapped


def test_weight_zero_leaves_a_term_out_of_the_gradient():
    output = constant(1.0).requires_grad_()
    total_loss(output, constant(3.0), constant(-2.0), LossConfig(0.0, 1.0))[0].backward()
    assert torch.allclose(output.grad, 2 * constant(3.0) / output.numel())


def test_equal_weights_are_least_at_the_mean_of_both():
    """What the default objective pulls to: the plain average of the two latents."""
    input, target = torch.randn(2, 1, 3, 4)
    output = ((input + target) / 2).requires_grad_()
    total_loss(output, input, target, LossConfig())[0].backward()
    assert output.grad.abs().max() < 1e-7
    output = (0.6 * input + 0.4 * target).requires_grad_()
    total_loss(output, input, target, LossConfig())[0].backward()
    assert output.grad.abs().max() > 1e-3


def on_sound(term):
    """The same term of waveforms `[B, 1, N]`."""
    return lambda *values: term(*(Sound(x) if isinstance(x, Tensor) else x for x in values))


stft_distance, mel_distance = on_sound(lib.training.losses.stft_distance), on_sound(lib.training.losses.mel_distance)
rhythm = on_sound(lambda output, input: lib.training.losses.ON_SOUND["rhythm"](output, input, None, None))
harmony = on_sound(lambda output, target: lib.training.losses.ON_SOUND["harmony"](output, None, target, None))
band_agreement = on_sound(lambda x, y: correlation(x.hits, y.hits))  # [B, bands]
note_distance = on_sound(lambda output, target: lib.training.losses.ON_SOUND["notes"](output, None, target, None))
notes_left = on_sound(lib.training.losses.notes_left)
anti_modulation, spectral_outliers = (
    on_sound(lib.training.losses.anti_modulation),
    on_sound(lib.training.losses.spectral_outliers),
)


# --- the config -------------------------------------------------------------------------------------------------------

WEIGHTS = [field.name for field in dataclasses.fields(LossConfig) if field.name.endswith("_weight")]
NONE = dict.fromkeys(WEIGHTS, 0.0)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "0.3", None, True])
def test_bad_weights_name_the_field(name, value):
    with pytest.raises(UserError, match=f"^{name}=.* is not allowed; use a finite number, 0 or more"):
        LossConfig(**{name: value})


def test_all_weights_zero_is_refused():
    assert len(WEIGHTS) == 21
    with pytest.raises(UserError, match=f"^{', '.join(WEIGHTS)} are all 0; give at least one term a weight"):
        LossConfig(0.0, 0.0)


@pytest.mark.parametrize("name", WEIGHTS)
def test_one_weight_is_enough(name):
    config = LossConfig(**(NONE | {name: 0.5}))
    assert config.weights == NONE | {name: 0.5}
    term = name.removesuffix("_weight")
    for terms in (SOUND_TERMS, MASK_TERMS):
        assert config.weighted(terms) == ((term,) if term in terms else ())


def test_an_unknown_form_lists_the_choices():
    with pytest.raises(UserError, match=r"^anti_modulation='cubic' is not allowed; use one of squared, log"):
        LossConfig(anti_modulation="cubic")


@pytest.mark.parametrize("seconds", [0, -1.0, 0.09, math.nan, math.inf, "2", True])
def test_windows_too_short_to_hear_are_refused(seconds):
    with pytest.raises(UserError, match=r"^window_seconds=.* is not allowed; use a finite number, 0\.1 or more"):
        LossConfig(window_seconds=seconds)


def test_the_shortest_window_is_long_enough_for_every_term(batch):
    config = LossConfig(**(NONE | dict.fromkeys((f"{t}_weight" for t in SOUND_TERMS), 1.0)), window_seconds=0.1)
    loss, terms = total_loss(*batch, config, MdctCodec())
    assert all(term.isfinite() for term in terms.values())
    assert len(terms) == 2 + len(SOUND_TERMS)
    assert loss > 0


# --- root of the squared error ----------------------------------------------------------------------------------------


def test_rms_error_is_the_mean_over_clips_of_each_ones_root():
    rng = np.random.default_rng(0)
    output, reference = rng.standard_normal((2, 3, 4, 5)) * np.array([1.0, 2.0, 9.0])[:, None, None]
    roots = np.sqrt(((output - reference) ** 2).mean(axis=(1, 2)))
    value = rms_error(torch.tensor(output), torch.tensor(reference)).item()
    assert value == pytest.approx(roots.mean(), rel=1e-7)
    assert abs(np.sqrt(((output - reference) ** 2).mean()) / value - 1) > 0.05  # one root over the batch is another


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_gradient_of_rms_error_does_not_grow_with_the_error(scale):
    reference = torch.zeros(1, 3, 4, dtype=torch.float64)
    lengths = []
    for loss in (rms_error, latent_mse):
        output = (scale * torch.ones(1, 3, 4, dtype=torch.float64)).requires_grad_()
        loss(output, reference).backward()
        lengths.append(output.grad.norm().item())
    assert lengths[0] == pytest.approx(1 / math.sqrt(12), rel=1e-4)
    assert lengths[1] == pytest.approx(2 * scale / math.sqrt(12), rel=1e-4)


def test_rms_error_of_a_perfect_copy_has_a_finite_gradient():
    output = constant(2.0).requires_grad_()
    rms_error(output, constant(2.0)).backward()
    assert torch.equal(output.grad, constant(0.0))


# --- novelty and the discriminator ------------------------------------------------------------------------------------


def at_cosines(*cosines: float) -> tuple[Tensor, Tensor]:
    """Two batches `[B, 3, 4]` of unlike levels whose clips have these cosines."""
    first, second = torch.linalg.qr(torch.randn(12, 2, generator=torch.Generator().manual_seed(0))).Q.T
    source = torch.stack([5 * first for _ in cosines])
    output = torch.stack([(2 + i) * (c * first + (1 - c**2) ** 0.5 * second) for i, c in enumerate(cosines)])
    return output.view(-1, 3, 4), source.view(-1, 3, 4)


@pytest.mark.parametrize(("cosine", "expected"), [(0.7, 0), (0.9, 0.2), (-1.0, 0), (1.0, 0.3), (0.75, 0.05), (0.0, 0)])
def test_novelty_is_what_the_cosine_is_above_the_threshold(cosine, expected):
    assert novelty(*at_cosines(cosine)).item() == pytest.approx(expected, abs=1e-6)


def test_novelty_is_the_mean_over_clips_of_each_ones():
    assert novelty(*at_cosines(0.9, -1.0, 0.6, 0.8)).item() == pytest.approx((0.2 + 0.1) / 4, abs=1e-6)


def test_novelty_counts_towards_both_sources():
    """A cosine of 0.9 with the one, 0.75 with the other, which is the first turned on in the same plane."""
    output, input = at_cosines(0.9)
    angle = math.acos(0.9) + math.acos(0.75)
    first, across = input / input.norm(), output / output.norm() - 0.9 * input / input.norm()
    target = math.cos(angle) * first + math.sin(angle) * across / across.norm()
    for sources in ((input, target), (target, input)):
        _, terms = total_loss(output, *sources, LossConfig(novelty_weight=1.0))
        assert terms["novelty"].item() == pytest.approx(0.2 + 0.05, abs=1e-6)


def test_novelty_pushes_copies_away_and_leaves_the_others_alone():
    output, source = at_cosines(0.9, 0.6)
    novelty(output.requires_grad_(), source).backward()
    assert output.grad[1].abs().max() == 0
    moved = (output - output.grad).detach()
    assert novelty(moved[:1], source[:1]).item() < 0.2 - 1e-3


def test_both_sides_of_the_hinge():
    made, real = torch.tensor([-2.0, -0.5, 1.0]), torch.tensor([2.0, 0.5, -1.0])
    # of the real ones 0, 0.5 and 2; of the fake ones 0, 0.5 and 2
    assert discriminator_hinge(real, made).item() == pytest.approx(2.5 / 3 + 2.5 / 3)
    assert discriminator_hinge(real + 5, made - 5).item() == 0
    assert discriminator_hinge(real, made - 5).item() == pytest.approx(2.5 / 3)  # the two sides are not swapped
    assert discriminator_hinge(made, real).item() == pytest.approx((3 + 1.5 + 0) / 3 * 2)


# --- spectra ----------------------------------------------------------------------------------------------------------


def test_stft_distance_is_a_second_implementation(songs):
    """Clip by clip, in float64."""
    output, source = songs[:4], songs[4:8]

    def magnitudes(wav: Tensor, n_fft: int) -> np.ndarray:
        spectrum = torch.stft(
            wav.double(), n_fft, n_fft // 4, window=torch.hann_window(n_fft).double(), return_complex=True
        )
        return spectrum.abs().clamp_min(1e-4).numpy()

    found, norms = [], []
    for x, y in zip(output[:, 0], source[:, 0], strict=True):
        distance = 0.0
        for n_fft in (512, 1024, 2048):
            X, Y = magnitudes(x, n_fft), magnitudes(y, n_fft)
            distance += np.sqrt(((Y - X) ** 2).sum() / (Y**2).sum()) + np.abs(np.log(X) - np.log(Y)).mean()
            norms.append((np.square(Y - X).sum(), np.square(Y).sum()))
        found.append(distance / 3)
    assert stft_distance(output, source).item() == pytest.approx(np.mean(found), rel=5e-6)
    assert stft_distance(source, output).item() != pytest.approx(np.mean(found), rel=0.02)  # over the source's norm
    convergence = [np.sqrt(a / b) for a, b in norms]
    a, b = np.sum(norms, axis=0)
    assert abs(np.sqrt(a / b) / np.mean(convergence) - 1) > 0.02  # one norm over the batch is another


def test_mel_distance_is_librosas_mel(songs):
    def mel(wav: Tensor) -> np.ndarray:
        power = librosa.feature.melspectrogram(
            y=wav[0].numpy(), sr=24_000, n_fft=1024, hop_length=320, n_mels=64, pad_mode="constant"
        )
        return np.log(power + 1e-8)

    expected = np.mean([np.abs(mel(x) - mel(y)).mean() for x, y in zip(songs[:3], songs[3:6], strict=True)])
    assert mel_distance(songs[:3], songs[3:6]).item() == pytest.approx(expected, rel=1e-4)


def test_spectral_distances_of_a_copy_are_0_with_a_finite_gradient(songs):
    for distance in (stft_distance, mel_distance):
        output = songs[:2].clone().requires_grad_()
        loss = distance(output, songs[:2])
        loss.backward()
        assert loss.item() == 0
        assert output.grad.isfinite().all()
        assert distance(torch.zeros_like(output), songs[:2]) > 1
        assert distance(songs[:2], torch.zeros_like(output)).isfinite()


def test_first_used_in_inference_mode_the_distance_still_trains_later(songs):
    lib.audio.features.hann.cache_clear()
    with torch.inference_mode():
        stft_distance(songs[:1].clone(), songs[1:2].clone())
    output = songs[:1].clone().requires_grad_()
    stft_distance(output, songs[1:2]).backward()
    assert output.grad.abs().max() > 0


# --- rhythm and harmony -----------------------------------------------------------------------------------------------


def test_rhythm_and_harmony_are_what_lacks_of_similarity(songs):
    output, source = songs[:4], songs[4:8]
    by_rhythm = 1 - correlation(Sound(output).onsets, Sound(source).onsets).mean().item()
    by_harmony = 1 - on_sound(harmony_similarity)(output, source).mean().item()
    assert rhythm(output, source).item() == pytest.approx(by_rhythm, abs=1e-6)
    assert harmony(output, source).item() == pytest.approx(by_harmony, abs=1e-6)
    assert abs(rhythm(output, source).item() - harmony(output, source).item()) > 0.05
    for term in (rhythm, harmony):
        assert term(source, source).item() == pytest.approx(0, abs=1e-5)
        assert term(output, source) > 0.3


# --- outliers ---------------------------------------------------------------------------------------------------------


def test_what_is_left_counts_only_what_the_wanted_clip_lacks(songs):
    """An output that is the target leaves no notes of the input's own; one that is the input leaves them all."""
    input, target = songs[:4], songs[4:8]
    left = [notes_left(x, input, target).item() for x in (target, (input + target) / 2, input)]
    assert left == sorted(left)
    assert left[0] < 0.15
    assert left[2] > 0.4
    assert notes_left(target, target, target).item() == 0
    sounds = Sound(input), Sound(target)
    assert onsets_left(sounds[1], *sounds).item() == pytest.approx(1, abs=1e-4)
    assert onsets_left(sounds[0], *sounds).item() < 1e-6
    assert onsets_left(sounds[1], sounds[1], sounds[1]).item() < 1e-3  # of one song with itself nothing can be told
    assert note_distance(target, target).item() == pytest.approx(0, abs=1e-5)
    assert note_distance(input, target).item() > 0.3


def test_outliers_are_what_rises_above_three_deviations(songs):
    """The formula a second time, in float64. Music with some tones far louder than either source has them."""
    input, target = songs[:3], songs[3:6]
    output = songs[6:9] + 2 * torch.sin(torch.arange(songs.shape[-1]) * 1.3)
    logs = [Sound(x).log_mel.double().numpy() for x in (output, input, target)]
    total = 0.0
    for clip in range(3):
        for band in range(64):
            frames = np.concatenate([logs[1][clip, band], logs[2][clip, band]])
            deviation = max(frames.std(ddof=1), 0.5)
            above = (logs[0][clip, band] - frames.mean()) / deviation - 3
            total += np.square(np.maximum(above, 0)).sum() / logs[0][clip].size
    value = spectral_outliers(output, input, target).item()
    assert value == pytest.approx(total / 3, rel=1e-3)
    assert value > 10 * spectral_outliers(songs[6:9], input, target).item()


def test_outliers_of_known_levels():
    """Silent sources lie at the floor in every band, with a deviation of 0.5: a band at the floor + h costs
    (h / 0.5 − 3)²."""
    silence = torch.zeros(1, 1, 9600)
    noise = 1e-4 * torch.randn(1, 1, 9600, generator=torch.Generator().manual_seed(0))
    height = Sound(noise).log_mel - math.log(1e-8)
    assert height.min() < 1.5 < height.max()
    expected = (height / 0.5 - 3).clamp_min(0).square().mean().item()
    assert spectral_outliers(noise, silence, silence).item() == pytest.approx(expected, rel=1e-4)
    assert spectral_outliers(silence, noise, noise).item() == 0  # too quiet is no outlier


# --- anti-modulation --------------------------------------------------------------------------------------------------


def sounds(*angles: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two batches `[B, 1, 250]` of positive samples, each its own envelope; envelopes correlate as cos(angle)."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(250, 2, generator=generator, dtype=torch.float64)
    first, second = torch.linalg.qr(parts - parts.mean(dim=0)).Q.T  # orthonormal, each of mean 0
    source = (2 + first).expand(len(angles), 1, 250)
    output = torch.stack([2 + math.cos(angle) * first + math.sin(angle) * second for angle in angles])[:, None]
    return output.clone(), source.clone()


def test_both_forms_of_anti_modulation_are_their_formulas():
    angles = (0.3, 1.2, 2.5)
    cosines = np.cos(angles)
    assert cosines[2] < -0.5  # a curve turned upside down is punished too
    output, source = sounds(*angles)
    assert anti_modulation(output, source, "squared").item() == pytest.approx((cosines**2).mean(), rel=1e-6)
    logs = -np.log(1 - np.abs(cosines))
    assert anti_modulation(output, source, "log").item() == pytest.approx(logs.mean(), rel=1e-6)


def test_signs_grow_towards_a_copy_and_towards_a_constant_envelope():
    """1 / (1 − |corr|) with both sources, and mean over deviation of three envelopes, as means over clips."""
    angles = (0.3, 1.2)
    output, source = (Sound(x) for x in sounds(*angles))
    for sound in (output, source):
        sound.envelope = sound.wav[:, 0]
    found = envelope_signs(output, source, source)
    assert found["sign/copying"].item() == pytest.approx(np.mean(1 / (1 - np.cos(angles))), rel=1e-6)
    deviation = 1 / math.sqrt(250)
    assert found["sign/flatness"].item() == pytest.approx(2 / deviation, rel=1e-6)
    silence = Sound(torch.zeros(2, 1, 250))
    silence.envelope = torch.zeros(2, 250)
    assert envelope_signs(silence, source)["sign/flatness"].item() > 1e7
    assert envelope_signs(silence, source)["sign/copying"].item() == 1
    assert envelope_signs(source, source)["sign/copying"].item() > 1e6


def test_signs_are_measured_in_training_only(batch):
    config = LossConfig(anti_modulation_weight=1.0, window_seconds=None)
    signs = {"sign/copying", "sign/flatness"}
    losses = [total_loss(*batch, config, MdctCodec(), training=training) for training in (False, True)]
    assert losses[0][0] == losses[1][0]
    assert set(losses[1][1]) - set(losses[0][1]) == signs


def test_anti_modulation_of_an_unrelated_output_is_0():
    output, source = sounds(math.pi / 2)
    for form in ("squared", "log"):
        assert anti_modulation(output, source, form).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("angle", [0.5, 0.05, 0.005])
def test_the_gradient_of_the_logarithm_has_no_bound_and_that_of_the_square_has(angle):
    """Along the sphere of envelopes d(corr)/d(angle) = −sin: cot(angle / 2) against |sin(2 · angle)|, both over 1."""
    lengths = []
    for form in ("log", "squared"):
        output, source = sounds(angle)
        anti_modulation(output.requires_grad_(), source, form).backward()
        lengths.append(output.grad.norm().item())
    assert lengths[0] == pytest.approx(1 / math.tan(angle / 2), rel=1e-4)
    assert lengths[1] == pytest.approx(math.sin(2 * angle), rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("factor", [1.0, -0.5])
def test_the_logarithm_of_the_same_envelope_is_huge_or_infinite_and_never_nan(seed, factor):
    """Rounding leaves 1 − |corr| within a few 1e-7 of 0; below 0 the logarithm would be no number."""
    wav = torch.randn(1, 1, 12_000, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 1, 12_000)
    assert anti_modulation(factor * wav, wav, "squared").item() == pytest.approx(1, abs=1e-5)
    assert anti_modulation(factor * wav, wav, "log").item() > 13


def test_the_logarithm_is_infinite_at_a_correlation_of_1():
    wav = torch.full((1, 1, 250), 2.0)
    wav[..., :2], wav[..., 2:4] = 1.0, 3.0  # deviations of length 2: every step of the computation is exact
    assert anti_modulation(wav, wav, "log").item() == math.inf


# --- masks ------------------------------------------------------------------------------------------------------------


def masks_of(input: Tensor | float, target: Tensor | float, B: int = 2) -> Masks:
    """`[B, 3, 8]`"""
    return Masks(*(torch.as_tensor(x, dtype=torch.float32).expand(B, 3, 8) for x in (input, target)))


HALF_ON = torch.tensor([1.0, 0.0]).repeat_interleave(4)  # over time


@pytest.mark.parametrize(
    ("input", "target", "expected"),
    [  # overlap, coverage, balance, temporal diversity
        (0.5, 0.5, (0.25, 0.0, 0.0, 1.0)),
        (1.0, 0.0, (0.0, 0.0, 0.5, 1.0)),
        (0.0, 0.0, (0.0, 1.0, 0.5, 1.0)),
        (1.0, 1.0, (1.0, 0.0, 0.5, 1.0)),
        (0.2, 0.5, (0.1, 0.09, 0.09, 1.0)),
        (HALF_ON, 1 - HALF_ON, (0.0, 0.0, 0.0, 0.0)),
        (HALF_ON, HALF_ON, (0.5, 0.5, 0.0, 0.0)),
        (HALF_ON, 0.5, (0.25, 0.125, 0.0, 0.5)),
        (0.5 * HALF_ON, 0.0, (0.0, 0.625, 0.25**2 + 0.25, 0.75)),
    ],
)
def test_mask_terms_of_known_masks(input, target, expected):
    masks = masks_of(input, target)
    found = [term(masks).item() for term in (overlap, coverage, balance, temporal_diversity)]
    assert found == pytest.approx(expected, abs=3e-4)  # 1e-4 a mask is what keeps the deviation's gradient finite


def test_balance_is_of_each_clip():
    """Two clips that lean to opposite sides are not balanced, although their batch is."""
    leaning = torch.tensor([0.9, 0.1])[:, None, None]
    assert balance(masks_of(leaning, 1 - leaning)).item() == pytest.approx(2 * 0.4**2)


def test_temporal_diversity_is_of_each_channel():
    """Channels by turns: each changes, their mean stands still."""
    masks = torch.stack([HALF_ON, 1 - HALF_ON]).expand(2, 2, 8)
    assert temporal_diversity(Masks(masks, masks)).item() == pytest.approx(0, abs=1e-4)


def test_mask_terms_against_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(size=(2, 3, 4, 9))
    masks = Masks(torch.tensor(a), torch.tensor(b))
    assert overlap(masks).item() == pytest.approx((a * b).mean())
    assert coverage(masks).item() == pytest.approx((np.clip(1 - a - b, 0, None) ** 2).mean())
    assert balance(masks).item() == pytest.approx(sum(((m.mean(axis=(1, 2)) - 0.5) ** 2).mean() for m in (a, b)))
    assert temporal_diversity(masks).item() == pytest.approx(1 - a.std(axis=2).mean() - b.std(axis=2).mean(), abs=1e-6)


def test_masks_that_stand_still_have_finite_gradients():
    masks = Masks(*(torch.full((2, 3, 8), 0.5, requires_grad=True) for _ in range(2)))
    sum(term(masks) for term in (overlap, coverage, balance, temporal_diversity)).backward()
    assert all(mask.grad.isfinite().all() for mask in masks)


# --- the sum ----------------------------------------------------------------------------------------------------------

EVERY = LossConfig(**{name: (i + 1) / 10 for i, name in enumerate(WEIGHTS)}, window_seconds=1.0)


def critic(latents: Tensor) -> Tensor:
    return latents.abs().mean(dim=(1, 2)) - 2


def some_masks(B: int = 4) -> Masks:
    return Masks(*torch.rand(2, B, 128, FRAMES, generator=torch.Generator().manual_seed(3)))


class Recording(MdctCodec):
    """A codec that keeps what it was given to decode; `decoding` instead of its own."""

    def __init__(self, decoding=None):
        super().__init__()
        self.decoding, self.heard = decoding or super().decode, []

    def decode(self, latents: Tensor) -> Tensor:
        self.heard.append(latents.detach())
        return self.decoding(latents)


@pytest.mark.parametrize("form", ["squared", "log"])
def test_total_is_the_weighted_sum_of_all_terms(batch, form):
    output, input, target = batch
    masks, codec = some_masks(), MdctCodec()
    config = dataclasses.replace(EVERY, anti_modulation=form)
    loss, terms = total_loss(*batch, config, codec, masks=masks, critic=critic)
    sounds = [codec.decode(x[..., 37:112]) for x in batch]  # a second in the middle
    expected = {
        "input_mse": latent_mse(output, input),
        "target_mse": latent_mse(output, target),
        "input_rms": rms_error(output, input),
        "target_rms": rms_error(output, target),
        "novelty": novelty(output, input) + novelty(output, target),
        "adversarial": -critic(output).mean(),
        "stft": (stft_distance(*sounds[:2]) + stft_distance(sounds[0], sounds[2])) / 2,
        "mel": (mel_distance(*sounds[:2]) + mel_distance(sounds[0], sounds[2])) / 2,
        "rhythm": rhythm(*sounds[:2]),
        "harmony": harmony(sounds[0], sounds[2]),
        "onsets": 1 - band_agreement(*sounds[:2]).mean(),
        "notes": note_distance(sounds[0], sounds[2]),
        "onsets_left": onsets_left(*map(Sound, sounds)),
        "notes_left": notes_left(*sounds),
        "tones": tones(*map(Sound, sounds)),
        "anti_modulation": anti_modulation(*sounds[:2], form) + anti_modulation(sounds[0], sounds[2], form),
        "outlier": spectral_outliers(*sounds),
        "overlap": overlap(masks),
        "coverage": coverage(masks),
        "balance": balance(masks),
        "temporal_diversity": temporal_diversity(masks),
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {name: term.item() for name, term in expected.items()}, rel=1e-5
    )
    without = sorted(term.item() for name, term in terms.items() if name != "novelty")
    assert min(b - a for a, b in itertools.pairwise(without)) > 1e-4  # or two could be swapped unseen
    by_weight = zip(WEIGHTS, expected.values(), strict=True)  # the terms above are in the order of their weights
    assert loss.item() == pytest.approx(sum(getattr(config, name) * term.item() for name, term in by_weight), rel=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_every_term_is_a_mean_over_clips(batch, size):
    """Or a batch split over processes, or into accumulated parts, would have another loss."""
    output, input, target = (2 * batch[0], *batch[1:])  # loud enough to have outliers
    output = torch.cat([output[:2], input[2:3] + 0.3 * output[2:3], target[3:] + 0.3 * output[3:]])  # and copies
    masks = some_masks()
    masks = Masks(masks.input * torch.linspace(0.1, 1, 4)[:, None, None], masks.target)
    everything = (output, input, target, *masks)
    parts = [everything, *zip(*(x.split(size) for x in everything), strict=True)]
    config = dataclasses.replace(EVERY, window_seconds=None)
    losses, rows = [], []
    for x, i, t, *m in parts:
        loss, terms = total_loss(x, i, t, config, MdctCodec(), masks=Masks(*m), critic=critic)
        losses.append(loss.item())
        rows.append({name: term.item() for name, term in terms.items()})
    assert losses[0] == pytest.approx(np.mean(losses[1:]), rel=1e-4)
    assert len(rows[0]) == len(WEIGHTS)
    for name, whole in rows[0].items():
        values = [row[name] for row in rows[1:]]
        assert whole == pytest.approx(np.mean(values), rel=1e-4), name
        assert np.ptp(values) > 1e-3 * abs(whole), name  # clips that are all alike would show nothing


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_term_alone(batch, name):
    config = LossConfig(**(NONE | {name: 2.0}), window_seconds=0.5)
    output = (batch[0] + batch[1]).requires_grad_()
    masks = Masks(*(mask.requires_grad_() for mask in some_masks()))
    loss, terms = total_loss(output, *batch[1:], config, MdctCodec(), masks=masks, critic=critic)
    term = name.removesuffix("_weight")
    on_masks = term in MASK_TERMS
    term = f"{term}_mse" if term in ("input", "target") else term
    assert set(terms) == {"input_mse", "target_mse", term}  # runs of different objectives compare by the two errors
    assert loss.item() == pytest.approx(2 * terms[term].item())
    loss.backward()
    assert (masks.input.grad is not None and masks.input.grad.abs().max().item() > 0) is on_masks
    assert on_masks or output.grad.abs().max() > 0
    assert output.grad is None or output.grad.isfinite().all()


def test_without_a_critic_there_is_no_adversarial_term(batch):
    config = LossConfig(adversarial_weight=1.0)
    loss, terms = total_loss(*batch, config)
    assert set(terms) == {"input_mse", "target_mse"}
    assert loss.item() == pytest.approx(0.3 * (terms["input_mse"] + terms["target_mse"]).item())
    heard, terms = total_loss(*batch, config, critic=critic)
    assert (heard - loss).item() == pytest.approx(-critic(batch[0]).mean().item(), rel=1e-4)
    _, terms = total_loss(*batch, LossConfig(), critic=critic)  # and none without a weight
    assert set(terms) == {"input_mse", "target_mse"}


@pytest.mark.parametrize("name", SOUND_TERMS)
def test_sound_is_decoded_only_for_terms_that_need_it(batch, name):
    """Each of the three latents once, and no more than the window: 75 frames for a second."""
    codec = Recording()
    silent = dataclasses.replace(EVERY, **{f"{term}_weight": 0.0 for term in SOUND_TERMS})
    total_loss(*batch, silent, codec, masks=some_masks())
    assert codec.heard == []
    total_loss(*batch, dataclasses.replace(silent, **{f"{name}_weight": 1.0}), codec, masks=some_masks())
    assert [tuple(latents.shape) for latents in codec.heard] == [(4, 128, 75)] * 3


def test_all_terms_on_sound_share_three_decodings(batch):
    codec = Recording()
    total_loss(*batch, EVERY, codec, masks=some_masks())
    assert len(codec.heard) == 3


@pytest.mark.parametrize("name", SOUND_TERMS)
def test_a_term_on_sound_without_a_codec_is_refused(batch, name):
    config = LossConfig(**{f"{name}_weight": 1.0})
    with pytest.raises(ValueError, match=f"{name}_weight needs sound: give total_loss the codec"):
        total_loss(*batch, config)


@pytest.mark.parametrize("name", MASK_TERMS)
def test_a_term_on_masks_without_masks_is_refused(batch, name):
    config = LossConfig(**{f"{name}_weight": 1.0})
    with pytest.raises(ValueError, match=f"{name}_weight needs masks: give the model a masking"):
        total_loss(*batch, config)


# --- the window -------------------------------------------------------------------------------------------------------


def windows(frames: int, seconds: float | None, random: bool, times: int = 1) -> list[tuple[int, int]]:
    """First and last frame of what is decoded, the same of all three latents: each frame holds its own number."""
    latents = torch.arange(1.0, frames + 1).expand(1, 8, frames)
    config = LossConfig(mel_weight=1.0, window_seconds=seconds)
    found = []
    for _ in range(times):
        codec = Recording(lambda x: x.repeat_interleave(40, 2).flatten(1)[:, None])
        total_loss(latents, latents, latents, config, codec, training=random)
        assert all(torch.equal(x, codec.heard[0]) for x in codec.heard)
        first, *_, last = (codec.heard[0][0, 0] - 1).int().tolist()
        assert last - first + 1 == codec.heard[0].shape[2]
        found.append((first, last))
    return found


def test_the_window_counts_the_codecs_frames():
    codec = Recording()
    codec.hop = 192  # 125 frames a second
    latents = torch.ones(1, 128, 200)
    total_loss(latents, latents, latents, LossConfig(mel_weight=1.0, window_seconds=1.0), codec)
    assert [x.shape[2] for x in codec.heard] == 3 * [125]


def test_the_window_is_the_middle_and_draws_nothing():
    state = torch.get_rng_state()
    assert windows(225, 1.0, random=False, times=3) == [(75, 149)] * 3
    assert windows(100, 1.0, random=False) == [(12, 86)]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_random_window_may_start_anywhere_and_follows_the_seed():
    torch.manual_seed(0)
    found = windows(78, 1.0, random=True, times=60)
    assert {first for first, _ in found} == {0, 1, 2, 3}  # the first and the last place too
    assert {last - first for first, last in found} == {74}
    torch.manual_seed(0)
    assert windows(78, 1.0, random=True, times=60) == found
    torch.manual_seed(1)
    assert windows(78, 1.0, random=True, times=60) != found


@pytest.mark.parametrize(("frames", "seconds"), [(100, None), (100, 5.0), (75, 1.0)])
def test_a_window_as_long_as_the_clip_is_the_whole_clip_and_draws_nothing(frames, seconds):
    state = torch.get_rng_state()
    assert windows(frames, seconds, random=True) == [(0, frames - 1)]
    assert torch.equal(torch.get_rng_state(), state)


# --- through codecs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["squared", "log"])
def test_the_gradient_flows_through_a_codec_to_the_latents(form):
    """Against the difference quotient along the gradient, in float64."""
    generator = torch.Generator().manual_seed(4)
    output, input, target = 5 * torch.randn(3, 1, 128, 8, generator=generator, dtype=torch.float64)
    config = LossConfig(0.0, 0.0, anti_modulation_weight=1.0, anti_modulation=form)
    codec = MdctCodec()
    output.requires_grad_()
    total_loss(output, input, target, config, codec)[0].backward()
    direction = output.grad / output.grad.norm()
    with torch.no_grad():
        ends = [total_loss(output + h * direction, input, target, config, codec)[0].item() for h in (1e-5, -1e-5)]
    assert output.grad.norm() > 1e-4
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(output.grad.norm().item(), rel=1e-3)


@pytest.fixture(scope="module")
def encodec_codec() -> EncodecCodec:
    """The real architecture with random weights."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the package's weight norm
        torch.manual_seed(0)
        return EncodecCodec(encodec.model.EncodecModel.encodec_model_24khz(pretrained=False), "none")


@pytest.mark.parametrize("name", SOUND_TERMS)
@pytest.mark.parametrize("codec", ["mdct", "encodec"])
def test_every_term_on_sound_reaches_the_latents_through_each_codec(batch, encodec_codec, name, codec):
    """A step against the gradient lowers the term; outside the window nothing moves."""
    codec = MdctCodec() if codec == "mdct" else encodec_codec
    output, input, target = (x[:2, :, 40:60] for x in batch)
    outputs = {"outlier": 4 * output, "onsets_left": output + target}  # where the term is not 0
    output = outputs.get(name, output).clone().requires_grad_()
    config = LossConfig(**(NONE | {f"{name}_weight": 1.0}), window_seconds=0.2)  # frames 2 to 16
    loss, _ = total_loss(output, input, target, config, codec)
    loss.backward()
    gradient = output.grad
    assert gradient.isfinite().all()
    assert (gradient[..., 2:17].abs().amax(dim=(1, 2)) > 0).all()
    assert gradient[..., :2].abs().max() == gradient[..., 17:].abs().max() == 0
    with torch.no_grad():
        steps = [1e-3 * loss / gradient.square().sum() * k for k in (1, 10)]  # first-order: 0.1 % and 1 % lower
        lower = [total_loss(output - s * gradient, input, target, config, codec)[0] for s in steps]
    assert min(lower) < loss


def test_the_sources_get_no_gradient_from_their_sound(batch):
    output, input, target = (x.clone().requires_grad_() for x in batch)
    config = LossConfig(**(NONE | dict.fromkeys((f"{t}_weight" for t in SOUND_TERMS), 1.0)), window_seconds=0.2)
    total_loss(output, input, target, config, MdctCodec())[0].backward()
    for source in (input, target):
        assert source.grad is None or source.grad.abs().max() == 0
    assert output.grad.abs().max() > 0


def test_tones_are_the_targets_with_its_level_and_without_hits():
    """Chords with clicks on them: another click changes little, another chord or a lower level much."""
    time = torch.arange(48_000) / 24_000
    chord, other = (
        sum((2 * math.pi * hz * time).sin() for hz in notes) for notes in ((220, 277, 330), (247, 311, 370))
    )
    clicks = torch.zeros(48_000)
    clicks[6_000::12_000] = 20.0
    sound = lambda wav: Sound(0.1 * wav[None, None])  # noqa: E731
    target = sound(chord + clicks)
    assert tones(target, target, target).item() < 1e-3  # `rms` has an epsilon
    without, quiet, wrong, silent = (
        tones(sound(x), target, target).item() for x in (chord, chord / 4, other, 0 * chord)
    )
    assert without < 0.1 < 0.4 < quiet < 0.6  # an eighth of the power is half of a magnitude's root
    assert wrong > 0.6
    assert silent == pytest.approx(1, abs=0.1)
    nothing = sound(0 * chord)
    assert tones(target, target, nothing).item() == pytest.approx(4, abs=0.01)  # where the target is silent
    assert tones(nothing, target, nothing).item() < 1e-3


# --- terms of one's own -----------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch):
    """`own(body)` writes the module `own_terms` with the function `term`."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(body: str) -> dict[str, OwnTerm]:
        (tmp_path / "own_terms.py").write_text(f"def term(output, input, target, masks):\n    {body}\n")
        return {"mine": OwnTerm("own_terms:term", 0.5)}

    yield write
    sys.modules.pop("own_terms", None)


def test_a_term_of_ones_own_is_weighted_and_reported(batch, own):
    terms = own("return (output - 2 * input + 3 * target).mean() + masks.input.mean()")
    masks, output = some_masks(), batch[0].clone().requires_grad_()
    plain, _ = total_loss(output, *batch[1:], LossConfig())
    loss, found = total_loss(output, *batch[1:], LossConfig(own=terms), masks=masks)
    mine = (batch[0] - 2 * batch[1] + 3 * batch[2]).mean() + masks.input.mean()
    assert set(found) == {"input_mse", "target_mse", "mine"}
    assert found["mine"].item() == pytest.approx(mine.item())
    assert (loss - plain).item() == pytest.approx(0.5 * mine.item(), rel=1e-3)
    (loss - plain).backward()
    assert output.grad.mean().item() == pytest.approx(0.5 / output.numel(), rel=1e-2)


def test_a_term_of_ones_own_may_be_the_only_one_and_sees_no_masks(batch, own):
    config = LossConfig(0.0, 0.0, own=own("return output.abs().mean() * (masks is None)"))
    assert total_loss(*batch, config)[0].item() == pytest.approx(0.5 * batch[0].abs().mean().item())


@pytest.mark.parametrize("body", ["return output.mean(dim=(1, 2))", "return 1.0", "pass"])
def test_what_is_no_scalar_is_refused_by_the_functions_name(batch, own, body):
    config = LossConfig(own=own(body))
    with pytest.raises(UserError, match=r"value of own_terms:term=.*use a scalar, a mean over clips"):
        total_loss(*batch, config)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("term = 3", "cannot be imported .*neither a function nor a class"),
        ("1 / 0", "cannot be imported .*ZeroDivisionError"),
        ("def term(output):\n    pass", "too many positional arguments; a term takes output, input, target and masks"),
    ],
)
def test_what_is_no_term_is_refused_before_it_is_needed(own, tmp_path, code, words):
    config = LossConfig(own=own("pass"))
    config.find_own()
    sys.modules.pop("own_terms")
    (tmp_path / "own_terms.py").write_text(code)
    models = CascadeConfig.reference(), TrainConfig(loss=config), MaskingConfig()
    for refused in (config.find_own, lambda: run_settings("index", MdctCodec(), *models)):
        with pytest.raises(UserError, match=f"^'own_terms:term': {words}"):
            refused()


@pytest.mark.parametrize("name", ["mel", "input_mse", "target_rms", "a/b", "two words", ""])
def test_a_name_that_another_term_has_is_refused(name):
    with pytest.raises(UserError, match=r"own=.* that no other term has"):
        LossConfig(own={name: OwnTerm("own_terms:term", 1.0)})
