"""Learned masks, how they are applied, and the discriminator's norms."""

import re

import numpy as np
import pytest
import torch

from lib.codec.mdct import MdctCodec
from lib.model.masks import (
    MASKINGS,
    MaskGenerator,
    MaskingConfig,
    Masks,
    WideMaskGenerator,
    apply_mask,
    complementarity,
)
from lib.util.errors import UserError


def clips(B: int = 2, D: int = 8, T: int = 60, scale: float = 5.0, seed: int = 0):
    return scale * torch.randn(2, B, D, T, generator=torch.Generator().manual_seed(seed))


def true_rms(x: torch.Tensor) -> torch.Tensor:
    """`[B, D, T] → [B]`, in float64 and without the 1e-8."""
    return x.detach().double().pow(2).flatten(1).mean(1).sqrt()


# --- learned masks ----------------------------------------------------------------------------------------------------


def test_mask_generator_parameter_count_against_arithmetic():
    analyzer = (256 * 128 * 3 + 256) + (256 * 256 * 3 + 256)
    attention = (3 * 256 * 256 + 3 * 256) + (256 * 256 + 256)
    head = (128 * 256 * 3 + 128) + (128 * 128 + 128)
    assert 2 * analyzer + attention + 2 * head == 1_083_904
    assert sum(p.numel() for p in MaskGenerator().parameters()) == 1_083_904


def test_learned_masks_see_both_clips_over_all_frames():
    """A mask sees its own clip within reach of the convolutions, and by attention every frame of the other clip."""
    torch.manual_seed(0)
    input, target = (x.requires_grad_() for x in clips(1, 8, 40))
    masks = MaskGenerator(8, 16)(input, target)
    for mask, own, other in ((masks.input, input, target), (masks.target, target, input)):
        assert mask.shape == (1, 8, 40)
        assert ((mask > 0) & (mask < 1)).all()
        gradients = torch.autograd.grad(mask[0, :, 20].sum(), (own, other), retain_graph=True)
        of_own, of_other = (gradient[0].abs().sum(dim=0).nonzero().flatten().tolist() for gradient in gradients)
        assert of_other == list(range(40))
        assert of_own == list(range(17, 24))  # one frame to either side for each of three convolutions


@torch.no_grad()
def test_where_its_own_clip_is_silent_a_mask_is_the_same_in_every_frame():
    torch.manual_seed(0)
    generator = MaskGenerator(8, 16)
    clip, _ = clips(1, 8, 40)
    silence = torch.zeros_like(clip)

    def change_over_frames(mask: torch.Tensor) -> float:
        return mask[0, :, 3:-3].std(dim=1).max().item()  # away from the padding

    masks = generator(silence, clip)
    assert change_over_frames(masks.input) < 1e-6
    masks = generator(clip, silence)
    assert change_over_frames(masks.target) < 1e-6
    masks = generator(clip, clip.flip(2))
    assert min(change_over_frames(mask) for mask in masks) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_untrained_masks_are_near_a_half(seed):
    torch.manual_seed(seed)
    masks = MaskGenerator()(*clips(4, 128, 30))
    assert ((complementarity(masks) - 0.75).abs() < 0.01).all()
    for mask in masks:
        assert 1e-3 < mask.std() < 0.05


def wide(latent_dim: int = 8) -> WideMaskGenerator:
    """With a random head, which is zero before training."""
    torch.manual_seed(0)
    generator = WideMaskGenerator(latent_dim, 8)
    torch.nn.init.normal_(generator.head[-1].weight)
    return generator


def test_wide_masks_parameter_count_against_arithmetic():
    bands, positions, channels = 24 * 6 * 4 * 3 + 24, 24 * 32, 24 * 24 * 4 + 24
    block = 24 * 24 * 3 * 5 + 24 + 2 * 24
    head = 24 * 30 * 3 * 3 + 24 + 2 * 24 + 2
    own = bands + positions + 6 * block + channels + head + 2 + 2 * 128
    assert sum(p.numel() for p in WideMaskGenerator().parameters()) == own == 63_932


@torch.no_grad()
def test_wide_masks_start_as_hpss_with_a_crossover():
    """Of the input hits are taken, of the target held notes, and above 2.4 kHz the input alone: a click and two tones,
    in latents of mdct."""
    time = torch.arange(48_000) / 24_000
    tone = sum(0.3 * torch.sin(2 * torch.pi * hz * time) for hz in (1000, 3500))
    click = torch.zeros(48_000)
    click[24_000:24_200] = torch.randn(200, generator=torch.Generator().manual_seed(0))
    both = MdctCodec().encode((tone + click)[None, None])
    masks = WideMaskGenerator()(both, both)
    assert masks.input.shape == masks.target.shape == (1, 128, 150)
    hit, note = (slice(None), slice(40, 120), 75), (slice(None), 26, slice(20, 60))  # 1.5 to 4.5 kHz; 1 kHz
    high = (slice(None), 93, slice(20, 60))  # 3.5 kHz
    assert masks.input[hit].mean() > 0.9
    assert masks.target[hit].mean() < 0.1
    assert masks.input[note].mean() < 0.2
    assert masks.target[note].mean() > 0.8
    assert masks.input[high].mean() > 0.8
    assert masks.target[high].mean() < 0.2


@torch.no_grad()
def test_untrained_wide_masks_by_hand():
    """Odds are the ratio of two geometric means of amplitudes, over 13 channels and over 25 frames; times e⁶ in
    the upper half."""
    channels, frames = np.ogrid[:64, :90]
    for clip, mask, sign in zip(clips(1, 64, 90), WideMaskGenerator(64)(*clips(1, 64, 90)), (1, -1), strict=True):
        cubes = clip[0].double().numpy() ** 3
        around = np.pad(cubes, ((0, 0), (1, 1)), mode="edge")
        log = np.log(cubes**2 + (around[:, 2:] - around[:, :-2]) ** 2 + 1e-2) / 2  # of an amplitude
        odds = np.empty((64, 90))
        for c, t in np.ndindex(odds.shape):
            odds[c, t] = log[abs(channels[:, 0] - c) <= 6, t].mean() - log[c, abs(frames[0] - t) <= 12].mean()
        odds[32:] += 6
        torch.testing.assert_close(mask[0].logit().double(), sign * torch.from_numpy(odds), rtol=1e-3, atol=1e-3)


def test_wide_masks_see_more_than_half_a_second_to_either_side_and_nothing_beyond_1_1_s():
    """The slope, the difference, the first convolution and the head see a frame each, the blocks 2 · (1 + 2 + 4 + 8 + 1
    + 4): 44 frames; the level 37 more."""
    generator = wide(64)
    input, target = (x.requires_grad_() for x in clips(1, 64, 240))
    for mask in generator(input, target):
        gradients = torch.autograd.grad(mask[0, 20, 120], (input, target), retain_graph=True)
        for clip, gradient in zip((input, target), gradients, strict=True):
            influence = (gradient * clip)[0].abs().sum(dim=0)
            distance = (torch.arange(240) - 120).abs()
            assert influence[distance > 81].sum() == 0
            assert influence[distance > 44].sum() < 0.05 * influence.sum()
            for side in (slice(80, 100), slice(141, 161)):
                assert influence[side].mean() > 2 * influence[distance > 44].mean()


@torch.no_grad()
def test_what_plays_far_away_changes_no_wide_mask():
    """Half of a clip that ends in silence has the masks of that half of the whole clip."""
    generator = wide(64)
    input, target = clips(1, 64, 400)
    short = [clip * (torch.arange(400) < 200) for clip in (input, target)]
    for whole, half in zip(generator(input, target), generator(*short), strict=True):
        torch.testing.assert_close(half[..., :118], whole[..., :118])
        assert (half - whole)[..., 150:].abs().mean() > 1e-3


@torch.no_grad()
def test_wide_masks_follow_the_clips_and_not_their_common_level():
    generator = wide()
    input, target = clips(1, 8, 60, scale=5.0)
    pairs = (input, target), (3 * input, 3 * target), (target, input), (3 * input, target)
    mask, louder, swapped, one_louder = (generator(*pair).input[:, :4] for pair in pairs)  # below the crossover
    assert mask.std() > 0.05
    torch.testing.assert_close(louder, mask, rtol=0, atol=0.2)
    assert (swapped - mask).abs().mean() > 0.05
    assert (one_louder - mask).abs().mean() > 0.02  # which is the louder one, it sees


@pytest.mark.parametrize("T", [1, 2, 3])
def test_wide_masks_of_any_length_and_of_silence(T):
    generator = wide()
    for clip in (clips(2, 8, T)[0], torch.zeros(2, 8, T)):
        clip.requires_grad_()
        masks = generator(clip, clip)
        assert masks.input.shape == (2, 8, T)
        masks.input.sum().backward()
        assert masks.input.isfinite().all()
        assert clip.grad.isfinite().all()


def test_wide_masks_need_whole_bands():
    with pytest.raises(UserError, match=r"^latent_dim=10 is not allowed; use a multiple of 4 for wide masks"):
        WideMaskGenerator(10)


# --- masks applied ----------------------------------------------------------------------------------------------------


def test_masking_by_hand():
    """Of (3, 4) the mask leaves (3, 0), of RMS 3/√2; brought back to 5/√2 that is 5. A mask's level has no effect."""
    x = torch.tensor([[[3.0, 4.0]]])
    for level in (1.0, 0.5, 0.01):
        masked = apply_mask(x, level * torch.tensor([[[1.0, 0.0]]]))
        torch.testing.assert_close(masked, torch.tensor([[[5.0, 0.0]]]), rtol=1e-4, atol=0)


def test_without_restoration_the_mask_is_a_factor():
    x, noise = clips()
    assert torch.equal(apply_mask(x, noise.sigmoid(), restore_rms=False), x * noise.sigmoid())
    assert MaskingConfig().restore_rms  # as the original has it


def test_the_rms_of_every_sample_is_restored():
    x, noise = clips(4, 8, 50)
    x = x * torch.tensor([0.1, 1.0, 5.0, 40.0])[:, None, None]
    for mask in (noise.sigmoid(), (noise > 4).float(), 0.05 * torch.ones_like(x)):
        masked = apply_mask(x, mask)
        torch.testing.assert_close(true_rms(masked), true_rms(x), rtol=1e-4, atol=0)
        assert (masked[mask == 0] == 0).all()
        assert (masked * x >= 0).all()  # places keep their sign
    assert ((true_rms(x * noise.sigmoid()) / true_rms(x) - 1).abs() > 0.1).all()  # which masking alone would not do


def test_silence_stays_silent_and_finite():
    x, noise = clips()
    for latents, mask in ((torch.zeros_like(x), noise.sigmoid()), (x, torch.zeros_like(x)), (0 * x, 0 * x)):
        latents, mask = latents.clone().requires_grad_(), mask.clone().requires_grad_()
        masked = apply_mask(latents, mask)
        assert torch.equal(masked, torch.zeros_like(x))
        masked.square().sum().backward()
        assert latents.grad.isfinite().all()
        assert mask.grad.isfinite().all()


def test_a_mask_of_ones_changes_nothing():
    x, _ = clips()
    assert torch.equal(apply_mask(x, torch.ones_like(x)), x)


@pytest.mark.parametrize("shape", [(2, 8, 59), (2, 1, 60), (1, 8, 60), (8, 60), (2, 60, 8)])
def test_a_mask_of_another_shape_is_refused(shape):
    x, _ = clips()
    message = re.escape(f"mask is {list(shape)}, the latents are [2, 8, 60]")
    with pytest.raises(ValueError, match=message):
        apply_mask(x, torch.ones(shape))


# --- complementarity --------------------------------------------------------------------------------------------------


def test_complementarity_by_hand():
    half, ones = torch.full((2, 4, 6), 0.5), torch.ones(2, 4, 6)
    assert complementarity(Masks(half, half)).tolist() == [0.75, 0.75]
    assert complementarity(Masks(ones, ones)).tolist() == [0, 0]
    assert complementarity(Masks(ones, 0 * ones)).tolist() == [1, 1]
    quarter = ones.clone()
    quarter[1, :2, :3] = 0.2  # a quarter of the second sample's places
    torch.testing.assert_close(complementarity(Masks(quarter, ones)), torch.tensor([0.0, 0.2]))


# --- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "field", "use"),
    [({"masking": "soft"}, "masking='soft'", "one of none, learned, wide$"),
     ({"masking": None}, "masking=None", "one of"), ({"masking": ""}, "masking=''", "one of"),
     ({"root": 2}, "root=2", "an odd number"),
     ({"root": 0}, "root=0", "a whole number, 1 or more")],
)  # fmt: skip
def test_bad_masking_values_name_the_field(values, field, use):
    with pytest.raises(UserError, match=f"^{field} is not allowed; use {use}"):
        MaskingConfig(**values)


def test_every_masking_is_a_config():
    assert MASKINGS == ("none", "learned", "wide")
    assert MaskingConfig() == MaskingConfig("none")
    for masking in MASKINGS:
        assert MaskingConfig(masking).masking == masking


# --- the discriminator ------------------------------------------------------------------------------------------------


def test_a_mask_that_leaves_a_clip_out_does_not_blow_up_its_gradient():
    """Bringing silence back to the clip's level would multiply the gradient by √(1e8) times that level."""
    clip, _ = clips()
    for value in (0.0, 1e-6):
        mask = torch.full_like(clip, value).requires_grad_()
        apply_mask(clip, mask).sum().backward()
        assert mask.grad.abs().max() <= 1000 * clip.abs().max() * 1.001
    nearly = apply_mask(clip, torch.full_like(clip, 0.02))  # far smaller masks than any that was learned
    torch.testing.assert_close(nearly, clip, rtol=1e-4, atol=1e-5)
