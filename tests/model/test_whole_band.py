"""What the codec leaves out goes where the masks say: exactly for a whole clip, without a click where masks change."""

import math

import pytest
import torch
from torch import Tensor

from lib.codec.mdct import DIM, HOP, SAMPLE_RATE, MdctCodec
from lib.model.fusion import Fusion
from lib.model.masks import Masks
from lib.model.whole_band import MAX_GAIN, TOP, decode_fusion, leaves_out, left_out

CODEC = MdctCodec()


def tone(frequency: float, num_samples: int = 40 * HOP) -> Tensor:
    return 0.3 * torch.sin(2 * math.pi * frequency * torch.arange(num_samples) / SAMPLE_RATE)[None, None]


def noise(num_samples: int = 40 * HOP, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(1, 1, num_samples, generator=torch.Generator().manual_seed(seed))


def fuse(input: Tensor, target: Tensor, masks: tuple | None, scale=1.0, whole=True, root: int = 1) -> Tensor:
    """By the masked clips' sum times `scale`; masks that broadcast to `[1, D, T]`."""
    clips = torch.cat([input, target])
    latents = CODEC.encode(clips)
    masks = masks and Masks(*(torch.as_tensor(mask).float().expand(1, *latents.shape[1:]) for mask in masks))
    parts = latents * (torch.cat(masks) if masks else 0.5)
    rest = left_out(CODEC, clips, latents) if whole else None
    return decode_fusion(
        CODEC, Fusion(scale * (parts[:1] + parts[1:]), (), masks, root), latents, rest, input.shape[-1]
    )


def added(*arguments, **options) -> Tensor:
    """What the whole band adds to a fusion."""
    return fuse(*arguments, **options) - fuse(*arguments, **options, whole=False)


def above(wav: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(wav)
    low = torch.fft.rfftfreq(wav.shape[-1], 1 / SAMPLE_RATE) < 4_800
    return torch.fft.irfft(spectrum.masked_fill(low, 0), wav.shape[-1])


def rms(wav: Tensor) -> float:
    return wav.double().square().mean().sqrt().item()


@pytest.mark.parametrize("num_samples", [HOP, 1_001, 12_345])
def test_a_clip_that_a_mask_takes_whole_comes_out_as_it_was(num_samples):
    input = tone(1_000, num_samples) + tone(8_000, num_samples) + noise(num_samples)
    target = tone(700, num_samples) + noise(num_samples, seed=1)
    for masks, wanted in (((1, 0), input), ((0, 1), target)):
        fused = fuse(input, target, masks)
        torch.testing.assert_close(fused, wanted, rtol=0, atol=1e-5)
        assert rms(fuse(input, target, masks, whole=False) - wanted) > 0.05


@pytest.mark.parametrize("root", [1, 3])
@pytest.mark.parametrize("loudness", [-20, -60, -80])
def test_quiet_highs_of_a_whole_clip_are_kept_too(root, loudness):
    """Their error stays 60 dB below them: 0.1 % of an amplitude."""
    highs = above(noise())
    input = tone(1_000) + highs * 10 ** (loudness / 20) / rms(highs)
    fused = fuse(input, tone(700), (1, 0), root=root)
    wanted = above(input)
    assert rms(above(fused) - wanted) < 1e-3 * rms(wanted)


def test_without_masks_a_clip_fused_with_itself_comes_out_as_it_was():
    wav = tone(1_000) + tone(8_000) + noise()
    torch.testing.assert_close(fuse(wav, wav, None), wav, rtol=0, atol=1e-5)
    torch.testing.assert_close(fuse(wav, wav, (0.3, 0.7)), wav, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask", [0.3, 0.5, 0.9])
def test_a_constant_mask_is_a_constant_gain_the_same_in_both_bands(mask):
    """Latents are cube roots, so a mask m beside silence is an amplitude gain of m³."""
    wav = tone(1_000) + tone(8_000) + noise()
    torch.testing.assert_close(fuse(wav, torch.zeros_like(wav), (mask, 0.5)), mask**3 * wav, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask", [0.5, 0.7])
def test_unlike_clips_keep_the_balance_of_both_bands(mask):
    """White noise: the mixed bins have the level of the codec's, channel for channel."""
    fused = fuse(noise(48_000), noise(48_000, seed=1), (mask, 1 - mask))
    density = [rms(part) / math.sqrt(width) for part, width in ((fused - above(fused), 4.8), (above(fused), 7.2))]
    assert density[0] < 0.07  # something was lost to mixing
    assert density[1] == pytest.approx(density[0], rel=0.05)


def test_masks_that_swap_fade_within_about_a_frame_and_without_a_click():
    first, second, frames, middle = tone(8_000), tone(10_000), torch.arange(40), 20 * HOP
    fused = fuse(first + tone(1_000), second + tone(1_000), (frames < 20, frames >= 20))
    for part, clip in ((slice(middle - HOP // 2), first), (slice(middle + HOP // 2, None), second)):
        torch.testing.assert_close(fused[..., part], (clip + tone(1_000))[..., part], rtol=0, atol=1e-4)
    click = torch.cat([first[..., :middle], second[..., middle:]], dim=-1)  # cut hard
    bins = torch.fft.rfftfreq(40 * HOP, 1 / SAMPLE_RATE)
    bins = (bins > 5_200) & (bins < 7_200)  # where neither clip has anything
    window = torch.hann_window(40 * HOP)
    spread = [torch.fft.rfft(window * wav)[..., bins].abs().square().sum() for wav in (fused, click)]
    assert spread[0] < 1e-3 * spread[1]
    assert fused.abs().max() < 0.63


def test_the_top_channels_decide_frame_by_frame_and_no_others():
    wav, silence, masks = tone(8_000) + tone(1_000), torch.zeros(1, 1, 40 * HOP), torch.ones(1, DIM, 40)
    masks[:, : DIM - TOP] = torch.rand(1, DIM - TOP, 40, generator=torch.Generator().manual_seed(0))
    rest = wav - fuse(wav, silence, (1, 0), whole=False)
    torch.testing.assert_close(added(wav, silence, (masks, 0)), rest, rtol=0, atol=1e-5)
    masks[:, DIM - TOP :] = 0
    assert added(wav, silence, (masks, 0)).abs().max() < 1e-6
    masks[:, -1] = 1  # one of eight
    torch.testing.assert_close(added(wav, silence, (masks, 0)), rest / TOP**3, rtol=0, atol=1e-6)
    masks[..., 20:] = 0
    assert added(wav, silence, (masks, 0))[..., 21 * HOP :].abs().max() < 1e-6


@pytest.mark.parametrize(("scale", "gain"), [(0.5, 0.5), (1.2, 1.2), (9.0, MAX_GAIN)])
def test_the_bins_above_follow_the_cascades_level(scale, gain):
    wav, target = tone(8_000) + tone(1_000), tone(500)
    wanted = gain**3 * added(wav, target, (1, 0))
    torch.testing.assert_close(added(wav, target, (1, 0), scale=scale), wanted, rtol=0, atol=1e-4 * scale**3)
    assert rms(wanted) > 0.2 * gain**3


def test_silence_stays_silent():
    silence = torch.zeros(1, 1, 1_000)
    assert fuse(silence, silence, (0.5, 0.5)).eq(0).all()
    assert fuse(silence, silence, None).eq(0).all()


def test_a_batch_is_its_clips():
    inputs, targets = torch.cat([tone(8_000), noise()]), torch.cat([noise(seed=2), tone(9_000)])
    clips, masks = (
        torch.cat([inputs, targets]),
        Masks(*torch.rand(2, 2, DIM, 40, generator=torch.Generator().manual_seed(0))),
    )
    latents = CODEC.encode(clips)
    sums = sum((latents * torch.cat(masks)).chunk(2)) * torch.tensor([0.5, 1.1])[:, None, None]
    batch = decode_fusion(CODEC, Fusion(sums, (), masks), latents, left_out(CODEC, clips, latents), 40 * HOP)
    for i, scale in enumerate((0.5, 1.1)):
        alone = fuse(inputs[i : i + 1], targets[i : i + 1], tuple(mask[i : i + 1] for mask in masks), scale)
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=0, atol=1e-5)


def test_another_codec_is_untouched_bit_for_bit(tiny_codec):
    clips = torch.cat([noise(), noise(seed=1)])
    latents = tiny_codec.encode(clips)
    fusion = Fusion(latents[:1] + latents[1:], (), None)
    rest = left_out(tiny_codec, clips, latents)
    assert torch.equal(decode_fusion(tiny_codec, fusion, latents, rest, 40 * HOP), tiny_codec.decode(fusion.latents))


def test_a_codec_of_two_channels_leaves_out_nothing_that_is_mixed():
    class Stereo(MdctCodec):
        channels = 2

    assert leaves_out(CODEC)
    assert not leaves_out(Stereo())
