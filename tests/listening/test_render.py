"""Renditions against the model by hand: a setting changes what it says and nothing else; recipes to the last bit."""

import copy
import dataclasses
import hashlib
import importlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from lib.audio.decode import AudioError
from lib.audio.files import load_audio
from lib.codec.mdct import MdctCodec
from lib.data.pairs import Clip, cut_to_shorter, load_pair
from lib.fuse import fuse_clips
from lib.listening.render import (
    HARDEST,
    Settings,
    adjusted,
    follow_recipe,
    render,
)
from lib.listening.render import save_with_recipe as save
from lib.model.cascade import CascadeConfig, StageTrace
from lib.model.fusion import FusionModel, load_model
from lib.model.masks import MASKINGS, MaskingConfig, Masks
from lib.training.batches import mix_noise
from lib.training.run import Run
from lib.util.errors import UserError
from lib.util.files import file_sha256

MODULE = importlib.import_module("lib.listening.render")  # as an attribute, the name is the function

CONFIGS = [MaskingConfig(name) for name in MASKINGS]


def label(masking: MaskingConfig) -> str:
    return masking.masking


@pytest.fixture(scope="module")
def codec(tiny_codec):
    return tiny_codec


@pytest.fixture
def build(tiny_cascade):
    """`build(masking, num_stages, **StageConfig fields)`: an untrained model whose masks are far from one half."""

    def model(masking: str | MaskingConfig = "learned", num_stages: int = 3, **changes) -> FusionModel:
        torch.manual_seed(0)
        masking = MaskingConfig(masking) if isinstance(masking, str) else masking
        model = FusionModel(tiny_cascade(num_stages, **changes), masking).eval()
        generator = model.mask_generator
        heads = ("head",) if masking.masking == "wide" else ("input_mask_generator", "target_mask_generator")
        for name in heads if generator is not None else ():
            torch.nn.init.normal_(getattr(generator, name)[-1].weight, std=1.0)
        return model

    return model


def clips(frames: int = 30, seed: int = 0, level: float = 0.1) -> tuple[Tensor, Tensor]:
    """Two waveforms `[1, N]` of noise."""
    wavs = level * torch.randn(2, 1, 320 * frames, generator=torch.Generator().manual_seed(seed))
    return wavs[0], 0.7 * wavs[1]


def same(first: StageTrace, second: StageTrace) -> bool:
    return all(torch.equal(getattr(first, f.name), getattr(second, f.name)) for f in dataclasses.fields(StageTrace))


def level(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def cosine(x: Tensor, y: Tensor) -> float:
    return (x.double() * y.double()).mean().item() / level(x) / level(y)


# --- the defaults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masking", CONFIGS, ids=label)
def test_the_defaults_are_fuse_clips_bit_for_bit(codec, build, masking):
    model, (input, target) = build(masking), clips()
    wanted = fuse_clips(input[None], target[None], model, codec)[0]
    for settings in (None, Settings(), Settings(seed=7), Settings(stages=3)):
        rendition = render(model, codec, input, target, settings)
        assert torch.equal(rendition.wav, wanted)
        assert len(rendition.traces) == 3
        assert (rendition.masks is None) == (masking.masking == "none")
    assert not torch.allclose(render(model, codec, target, input).wav, wanted, atol=1e-3)


@pytest.mark.parametrize("num_samples", [320, 1000, 12_345])
def test_a_clip_of_any_length_is_rendered_to_the_sample(num_samples):
    torch.manual_seed(0)
    codec = MdctCodec()
    model = FusionModel(CascadeConfig.reference(num_layers=1), MaskingConfig("learned")).eval()
    input, target = (0.1 * wav[:, :num_samples] for wav in clips(40, level=1.0))
    with torch.inference_mode():
        wanted = codec.decode(model(codec.encode(input[None]), codec.encode(target[None])).latents, length=num_samples)
    rendition = render(model, codec, input, target, Settings(whole_band=False))
    assert rendition.wav.shape == (1, num_samples)
    assert torch.equal(rendition.wav, wanted[0])
    whole = render(model, codec, input, target)
    assert whole.wav.shape == (1, num_samples)
    batch = fuse_clips(input[None], target[None], model, codec)[0]
    torch.testing.assert_close(whole.wav, batch, rtol=0, atol=3e-4)  # cube roots enlarge the last bits
    above = level((whole.wav - rendition.wav)[0]) / level(wanted)
    assert 0.1 < above < 3  # noise has three bands as wide as the codec's two


@pytest.mark.parametrize(("masking", "factor"), [(MaskingConfig("none"), 8), (MaskingConfig("wide", False), 1)])
def test_a_model_without_stages_is_rendered_and_has_none_to_change(mdct, masking, factor):
    """Masks of one half make a clip of itself; without masks it is doubled in latents, eightfold in sound."""
    model, (input, target) = FusionModel(CascadeConfig.reference(0), masking).eval(), clips()
    rendition = render(model, mdct, input, input)
    assert rendition.traces == ()
    torch.testing.assert_close(rendition.wav, factor * input, rtol=0, atol=1e-5)
    assert not torch.allclose(render(model, mdct, input, target).wav, rendition.wav, atol=1e-3)
    for field, value in (("stages", 1), ("residual_weight", 0.5)):
        with pytest.raises(UserError, match=rf"^{field}={value} is not allowed; use None: this model has no stages$"):
            render(model, mdct, input, target, Settings(**{field: value}))


def test_a_rendition_holds_what_it_was_made_of(codec, build):
    model, (input, target) = build(), clips()
    rendition = render(model, codec, input, target, Settings(noise=0.4, mask_blend=0.3, mask_hardness=2.0, seed=3))
    assert [x.shape for x in (*rendition.latents, *rendition.masks)] == 4 * [(1, 8, 30)]
    with torch.inference_mode():
        again = model(*rendition.latents, rendition.masks)
        assert torch.equal(codec.decode(again.latents)[0], rendition.wav)
        assert all(map(same, again.traces, rendition.traces))
        made = model.make_masks(*rendition.latents)  # the masks know the noise
        clean = model.make_masks(*(codec.encode(wav[None]) for wav in (input, target)))
    for mask, own, other in zip(rendition.masks, made, clean, strict=True):
        torch.testing.assert_close(mask.double(), by_hand(own, 2.0, 0.3), rtol=0, atol=1e-5)
        assert (mask.double() - by_hand(other, 2.0, 0.3)).abs().max() > 1e-2


def test_a_model_without_masks_has_none_to_move(codec, build):
    model, (input, target) = build("none"), clips()
    rendition = render(model, codec, input, target, Settings(mask_blend=0.8, mask_hardness=5.0))
    assert rendition.masks is None
    assert torch.equal(rendition.wav, render(model, codec, input, target).wav)


def test_clips_of_unlike_length_or_without_channels_are_refused(codec, build):
    input, target = clips()
    with pytest.raises(UserError, match=r"9600.*9590.*; give two \[C, N\]"):  # which are as many frames
        render(build("none"), codec, input, target[:, :-10])
    with pytest.raises(UserError, match=r"\[9600\] and \[9600\]; give two \[C, N\]"):
        render(build("none"), codec, input[0], target[0])


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_fewer_stages_end_at_the_output_of_the_last_one_applied(codec, build, stages):
    model, (input, target) = build(), clips()
    outputs = []
    for stage in model.cascade.stages:
        stage.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    whole = render(model, codec, input, target)
    assert len(outputs) == 3
    fewer = render(model, codec, input, target, Settings(stages=stages))
    assert len(outputs) == 3 + stages, "a stage ran whose output is not wanted"
    assert torch.equal(fewer.wav, codec.decode(outputs[stages - 1])[0])
    assert torch.equal(fewer.wav, whole.wav) == (stages == 3)
    assert len(fewer.traces) == stages
    assert all(map(same, fewer.traces, whole.traces[:stages]))
    assert [list(map(torch.equal, some.stages, outputs)) for some in (whole, fewer)] == [3 * [True], stages * [True]]


@pytest.mark.parametrize("num_stages", [1, 2])
def test_more_stages_than_the_model_has_are_refused(codec, build, num_stages):
    with pytest.raises(UserError, match=rf"^stages={num_stages + 1} is not allowed; use 1 to {num_stages}$"):
        render(build("none", num_stages), codec, *clips(), Settings(stages=num_stages + 1))


# --- residual weight --------------------------------------------------------------------------------------------------


def rms_before_scaling(trace: StageTrace, weight: float, mixing: str) -> float:
    """Of projection + w · residual, or √(1 − w²) · projection + w · residual, from the cosine between them."""
    p, r, cos = (getattr(trace, name).double().item() for name in ("projection_rms", "residual_rms", "alignment"))
    p *= math.sqrt(1 - weight**2) if mixing == "preserving" else 1
    return math.sqrt(p**2 + (weight * r) ** 2 + 2 * weight * p * r * cos)


@pytest.mark.parametrize("mixing", ["add", "preserving"])
@pytest.mark.parametrize("weight", [0, 0.1, 0.9, 1.0, 3.0])
@pytest.mark.parametrize("stages", [1, 2, None])
def test_a_residual_weight_is_that_of_the_last_stage_applied(codec, build, stages, weight, mixing):
    model, (input, target) = build(mixing=mixing, residual_weight=0.5), clips()
    settings = Settings(stages=stages, residual_weight=weight)
    if mixing == "preserving" and weight > 1:
        with pytest.raises(UserError, match=r"^residual_weight=3\.0 is not allowed; use 0 to 1 where mixing is"):
            render(model, codec, input, target, settings)
        return
    own = render(model, codec, input, target, Settings(stages=stages)).traces
    changed = render(model, codec, input, target, settings).traces
    assert all(map(same, changed[:-1], own[:-1]))
    for name in ("projection_rms", "residual_rms", "alignment"):  # what is mixed stays, only how much of it moves
        assert torch.equal(getattr(changed[-1], name), getattr(own[-1], name))
    assert own[-1].rms_before_scaling.item() == pytest.approx(rms_before_scaling(own[-1], 0.5, mixing), rel=1e-4)
    assert changed[-1].rms_before_scaling.item() == pytest.approx(rms_before_scaling(own[-1], weight, mixing), rel=1e-4)
    assert changed[-1].rms_before_scaling.item() != pytest.approx(own[-1].rms_before_scaling.item(), rel=1e-2)


def test_its_own_residual_weight_changes_nothing(codec, build):
    model, (input, target) = build(residual_weight=0.3), clips()
    own = render(model, codec, input, target)
    assert torch.equal(render(model, codec, input, target, Settings(residual_weight=0.3)).wav, own.wav)
    assert not torch.equal(render(model, codec, input, target, Settings(residual_weight=0.0)).wav, own.wav)


def test_the_model_keeps_its_config_and_its_output(codec, build):
    model, (input, target) = build(residual_weight=0.5), clips()
    configs, weights = [stage.config for stage in model.cascade.stages], copy.deepcopy(model.state_dict())
    own = render(model, codec, input, target).wav
    for settings in (Settings(residual_weight=0.1), Settings(stages=1, residual_weight=0.9, noise=0.5, mask_blend=1)):
        render(model, codec, input, target, settings)
        assert all(stage.config is config for stage, config in zip(model.cascade.stages, configs, strict=True))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
    assert torch.equal(render(model, codec, input, target).wav, own)


def test_the_model_keeps_its_config_after_an_exception(codec, build):
    model = build(residual_weight=0.5)
    configs, seen = [stage.config for stage in model.cascade.stages], []

    def fail(module, inputs):
        seen.append(module.config.residual_weight)
        raise KeyboardInterrupt

    hook = model.cascade.stages[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        render(model, codec, *clips(), Settings(stages=2, residual_weight=0.1))
    assert seen == [0.1]
    assert all(stage.config is config for stage, config in zip(model.cascade.stages, configs, strict=True))
    hook.remove()
    assert torch.equal(render(model, codec, *clips()).wav, render(build(residual_weight=0.5), codec, *clips()).wav)


# --- masks ------------------------------------------------------------------------------------------------------------

GRID = torch.cat([torch.tensor([0.0, 1e-9, 1e-4, 0.5, 1 - 1e-4, 1.0]), torch.linspace(0.01, 0.99, 99)])


def by_hand(mask: Tensor, hardness: float, blend: float) -> Tensor:
    """m → mʰ / (mʰ + (1 − m)ʰ), then its share of one half, in float64."""
    mask = mask.double()
    if hardness != 1:
        mask = mask.clamp(1e-6, 1 - 1e-6)
        mask = 1 / (1 + ((1 - mask) / mask) ** hardness)
    return (1 - blend) * mask + blend / 2


@pytest.mark.parametrize("hardness", [0, 0.25, 0.9, 1, 1.5, 8.0, HARDEST])
@pytest.mark.parametrize("blend", [0, 0.25, 0.5, 0.9, 1])
def test_hardness_multiplies_the_log_odds_and_blend_is_the_share_of_one_half(hardness, blend):
    """The order shows where both act: a hard mask blended half way is 1/4 or 3/4."""
    mask = adjusted(GRID, Settings(mask_hardness=hardness, mask_blend=blend))
    wanted, ends = by_hand(GRID, hardness, blend), (GRID < 1e-3) | (GRID > 0.999)
    torch.testing.assert_close(mask[~ends].double(), wanted[~ends], rtol=0, atol=2e-5 if hardness == HARDEST else 1e-6)
    torch.testing.assert_close(mask[ends].double(), wanted[ends], rtol=0, atol=1e-3)  # float32 has few log-odds near 1
    assert mask.dtype == torch.float32


def test_the_defaults_leave_every_mask_as_it_is():
    assert torch.equal(adjusted(GRID, Settings()), GRID)


def test_hardness_0_and_blend_1_are_one_half_exactly():
    for settings in (Settings(mask_hardness=0), Settings(mask_blend=1), Settings(mask_blend=1, mask_hardness=50)):
        assert adjusted(GRID, settings).eq(0.5).all()


def test_hardness_keeps_the_side_of_one_half_and_moves_away_from_it():
    distance = (GRID - 0.5).abs()
    for hardness in (0.25, 0.9, 1.0, 1.5, 8.0, 100.0, HARDEST):
        mask = adjusted(GRID, Settings(mask_hardness=hardness))
        assert mask.isfinite().all()
        assert torch.equal((mask - 0.5).sign(), (GRID - 0.5).sign())
        moved = (mask - 0.5).abs() - distance
        inside = (GRID > 1e-3) & (GRID < 1 - 1e-3) & (GRID != 0.5)
        if hardness != 1:
            assert (moved[inside] * (hardness - 1) > -1e-7).all(), "not away from one half"
            assert moved[inside].abs().max() > 1e-3


def test_the_largest_hardness_is_all_or_nothing():
    mask = adjusted(GRID, Settings(mask_hardness=HARDEST))
    clear = (GRID - 0.5).abs() > 0.03
    assert torch.equal(mask[clear], (GRID[clear] > 0.5).float())
    assert clear.sum() > 95


def test_masks_of_one_half_are_the_model_with_such_masks(codec, build):
    model, (input, target) = build(), clips()
    rendition = render(model, codec, input, target, Settings(mask_blend=1.0))
    half = Masks(*(torch.full_like(x, 0.5) for x in rendition.latents))
    assert all(torch.equal(mask, other) for mask, other in zip(rendition.masks, half, strict=True))
    with torch.inference_mode():
        wanted = codec.decode(model(*rendition.latents, half).latents)[0]
        plain = codec.decode(model.cascade(*rendition.latents)[0])[0]
    assert torch.equal(rendition.wav, wanted)
    torch.testing.assert_close(rendition.wav, plain, rtol=0, atol=1e-4)  # halves, brought back to the clips' level
    assert not torch.allclose(render(model, codec, input, target).wav, plain, atol=1e-2)
    soft = render(model, codec, input, target, Settings(mask_hardness=0.0))
    assert torch.equal(soft.wav, rendition.wav)


@pytest.mark.parametrize("masking", CONFIGS[1:], ids=label)
def test_both_masks_are_moved_whatever_made_them(codec, build, masking):
    model, (input, target) = build(masking), clips()
    own = render(model, codec, input, target)
    moved = render(model, codec, input, target, Settings(mask_blend=0.25, mask_hardness=3.0))
    for mask, before in zip(moved.masks, own.masks, strict=True):
        torch.testing.assert_close(mask.double(), by_hand(before, 3.0, 0.25), rtol=0, atol=1e-5)
    assert not torch.equal(moved.wav, own.wav)


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1])
def test_noise_keeps_the_level_and_takes_its_share(codec, build, share):
    """Of 24,000 values; cosines of independent ones are within ±0.03."""
    model, wavs = build("none", 1, num_layers=1), clips(1000)
    rendition = render(model, codec, *wavs, Settings(stages=1, noise=share, seed=5))
    noises = []
    for wav, latents in zip(wavs, rendition.latents, strict=True):
        clean = codec.encode(wav[None])
        assert level(latents) == pytest.approx(level(clean), rel=0.03)
        assert cosine(latents, clean) == pytest.approx(math.sqrt(1 - share**2), abs=0.03)
        noises.append((latents - math.sqrt(1 - share**2) * clean) / share)
        assert level(noises[-1]) == pytest.approx(level(clean), rel=0.03)
    assert abs(cosine(*noises)) < 0.03  # each clip has its own


def test_noise_is_the_curriculums_of_the_seed(codec, build):
    model, (input, target) = build(), clips()
    torch.manual_seed(11)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        wanted = [mix_noise(codec.encode(wav[None]), 0.3) for wav in (input, target)]
    found = render(model, codec, input, target, Settings(noise=0.3, seed=5)).latents
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_without_noise_the_latents_are_the_clips_own(codec, build):
    model, wavs = build(), clips()
    for seed in (0, 1):
        latents = render(model, codec, *wavs, Settings(seed=seed)).latents
        assert all(torch.equal(x, codec.encode(wav[None])) for x, wav in zip(latents, wavs, strict=True))


def test_a_seed_gives_the_same_bits_again_and_another_seed_others(codec, build):
    model, (input, target) = build(), clips()
    wavs = []
    for seed in (0, 1, 0, 2**64 - 1, 1):
        torch.manual_seed(seed + 100 if seed < 9 else 0)  # the state outside plays no part
        torch.rand(len(wavs))
        wavs.append(render(model, codec, input, target, Settings(noise=0.5, seed=seed)).wav)
    assert torch.equal(wavs[0], wavs[2])
    assert torch.equal(wavs[1], wavs[4])
    for a, b in ((0, 1), (0, 3), (1, 3)):
        assert not torch.allclose(wavs[a], wavs[b], atol=1e-3)


def test_the_global_random_state_plays_no_part_and_is_left_untouched(codec, build):
    """Panels render in a thread of their own, and what another one draws meanwhile may not change their noise."""

    class Drawing(type(codec)):
        def encode(self, wav: Tensor) -> Tensor:
            torch.rand(5)  # as another thread may at any time
            return codec.encode(wav)

    model, wavs, settings = build(), clips(), Settings(noise=0.5, seed=9)
    before = torch.get_rng_state()
    alone = render(model, codec, *wavs, settings).wav
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(render(model, Drawing(), *wavs, settings).wav, alone)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "values", "wanted"),
    [
        ("stages", (0, -1, 1.0, True, "2", math.nan), "a whole number, 1 or more"),
        ("residual_weight", (-0.1, math.nan, math.inf, "1", True), "a finite number, 0 or more"),
        ("noise", (-0.1, 1.01, math.nan, None, "0"), "a finite number, 0 or more, at most 1"),
        ("mask_blend", (-0.1, 1.01, math.inf, None, False), "a finite number, 0 or more, at most 1"),
        ("mask_hardness", (-1, 1e3 + 1, math.inf, None), "a finite number, 0 or more, at most 1000"),
        ("seed", (-1, 0.5, None, True, "0", 2**64), "a whole number, 0 or more"),
    ],
)
def test_a_bad_setting_names_its_field(field, values, wanted):
    for value in values:
        with pytest.raises(UserError) as error:
            Settings(**{field: value})
        assert str(error.value).startswith(f"{field}={value!r} is not allowed; use {wanted}")


def test_every_setting_changes_the_rendition(codec, build):
    """All at once, and each of them counts."""
    model, (input, target) = build(residual_weight=0.5), clips()
    moved = {"stages": 2, "residual_weight": 0.9, "noise": 0.3, "mask_blend": 0.2, "mask_hardness": 4.0, "seed": 3}
    assert set(moved) | {"whole_band"} == {field.name for field in dataclasses.fields(Settings)}  # for codecs of bands
    wav = render(model, codec, input, target, Settings(**moved)).wav
    for name in moved:
        other = render(model, codec, input, target, Settings(**{k: v for k, v in moved.items() if k != name})).wav
        assert not torch.allclose(wav, other, atol=1e-3), name


# --- recipes ----------------------------------------------------------------------------------------------------------

CHANGED = Settings(stages=1, residual_weight=0.8, noise=0.2, mask_blend=0.1, mask_hardness=3.0, seed=4)


@pytest.fixture(scope="module")
def mdct():
    return MdctCodec()


@pytest.fixture(scope="module")
def project(tmp_path_factory, mdct) -> Path:
    """A folder of songs, and beside it an output folder: a run of two checkpoints, a favourite in `favourites/`."""
    root = tmp_path_factory.mktemp("project")
    config, masking = CascadeConfig.reference(num_layers=1), MaskingConfig("learned")
    values = {"cascade": dataclasses.asdict(config), "masking": dataclasses.asdict(masking)}
    run = Run.create(root / "an output é", values | {"codec": {"name": mdct.name, "fingerprint": mdct.fingerprint}})
    for step in (1, 2):
        torch.manual_seed(step)
        run.save(step, FusionModel(config, masking), {}, is_best=step == 1)
    (root / "songs").mkdir()
    for name, rate, channels in (("a.wav", 24_000, 1), ("мелодия 'b'.flac", 44_100, 2)):
        wav = 0.1 * np.random.default_rng(rate).standard_normal((rate // 2, channels))
        soundfile.write(root / "songs" / name, wav, rate)
    (run.path / "favourites").mkdir()
    save(run.path / "favourites" / "1.wav", run, mdct, *pair(root), CHANGED)
    return root


def pair(root: Path, length: int = 6_000) -> tuple[Clip, Clip]:
    """Windows of both songs."""
    paths = root / "songs" / "a.wav", root / "songs" / "мелодия 'b'.flac"
    return tuple(Clip(str(p), offset, length, file_sha256(p)) for p, offset in zip(paths, (1_000, 5), strict=True))


@pytest.fixture
def moved(tmp_path, project) -> Path:
    """A copy of the project elsewhere, in which the songs are still where they were."""
    shutil.copytree(project / "an output é", tmp_path / "deep" / "er" / "new", symlinks=True)
    return tmp_path / "deep" / "er" / "new"


@pytest.fixture
def favourite(project) -> Path:
    return project / "an output é" / "favourites" / "1.json"


def rewritten(path: Path, **changes) -> Path:
    """A recipe beside this one, with other values."""
    other = path.with_name("other.json")
    other.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return other


def refused(path: Path, where: object, words: str, **options) -> None:
    with pytest.raises(UserError) as error:
        follow_recipe(path, **options)
    message = str(error.value)
    assert "\n" not in message
    assert message.count(str(path)) <= 1
    assert str(where) in message, message
    assert re.search(words, message), message


def test_a_recipe_says_what_the_file_was_made_from(project, favourite, mdct):
    recipe = json.loads(favourite.read_text())
    run = Run.open(project / "an output é")
    assert recipe["run"] == ".."
    assert recipe["checkpoint"] == "best"
    assert recipe["weights_sha256"] == file_sha256(run.path / "best" / "model.safetensors")
    assert recipe["config"] == run.config
    assert recipe["codec"] == {"name": "mdct", "fingerprint": mdct.fingerprint}
    assert Settings(**recipe["settings"]) == CHANGED
    for role, clip in zip(("input", "target"), pair(project), strict=True):
        assert Clip(**recipe[role]) == clip  # the songs lie outside of the output folder: an absolute path
    assert recipe["threads"] == torch.get_num_threads()
    assert recipe["versions"]["torch"] == torch.__version__
    assert recipe["versions"]["commit"]
    samples, _ = soundfile.read(favourite.with_name(recipe["output"]["file"]), dtype="<f4")
    assert recipe["output"]["samples_sha256"] == hashlib.sha256(samples.tobytes()).hexdigest()
    assert samples.shape == (6_000,)


@pytest.mark.parametrize(
    "settings", [Settings(), CHANGED, Settings(noise=0.5, seed=2**63)], ids=["own", "all", "noise"]
)
def test_a_recipe_gives_the_same_bits_again(tmp_path, project, mdct, settings):
    run, (input, target) = Run.open(project / "an output é"), pair(project)
    recipe = save(tmp_path / "2.wav", run, mdct, input, target, settings)
    assert recipe == tmp_path / "2.json"
    made, written = follow_recipe(recipe), load_audio(tmp_path / "2.wav")
    assert made.equal
    assert torch.equal(made.wav, written)
    assert torch.equal(written, render(load_model(run), mdct, *load_pair(input, target), settings).wav)
    assert made.versions == json.loads(recipe.read_text())["versions"]
    assert [path.resolve() for path in made.files] == [Path(clip.path) for clip in (input, target)]


def test_a_recipe_older_than_other_sample_rates_is_of_24_khz(favourite):
    recipe = json.loads(favourite.read_text())
    assert all(recipe[role].pop("sample_rate") == 24_000 for role in ("input", "target"))
    assert follow_recipe(rewritten(favourite, input=recipe["input"], target=recipe["target"])).equal


def test_a_recipe_older_than_the_whole_band_gives_the_codecs_band_again(tmp_path, project, mdct):
    run, clips = Run.open(project / "an output é"), pair(project)
    recipes = [save(tmp_path / f"{on}.wav", run, mdct, *clips, Settings(whole_band=on)) for on in (True, False)]
    old = [json.loads(path.read_text()) for path in recipes]
    for recipe, path in zip(old, recipes, strict=True):
        del recipe["settings"]["whole_band"]
        path.write_text(json.dumps(recipe))
    whole, narrow = map(follow_recipe, recipes)
    assert narrow.equal
    assert not whole.equal
    assert torch.equal(whole.wav, narrow.wav)


def test_a_recipe_may_name_the_last_checkpoint(project, favourite, mdct):
    run = Run.open(project / "an output é")
    recipe = rewritten(favourite, checkpoint="last", weights_sha256=run.weights_sha256("last"))
    wavs = load_pair(*pair(project))
    assert torch.equal(follow_recipe(recipe).wav, render(load_model(run, "last"), mdct, *wavs, CHANGED).wav)


@pytest.mark.parametrize(
    "changes",
    [
        *({"settings": {name: value}} for name, value in (("stages", 2), ("residual_weight", 0.2), ("noise", 0))),
        *({"settings": {name: value}} for name, value in (("mask_blend", 1), ("mask_hardness", 1), ("seed", 5))),
        *({role: {"offset": 1_001}} for role in ("input", "target")),
        {"output": {"samples_sha256": "0" * 64}},
    ],
    ids=str,
)
def test_samples_that_are_not_those_of_the_recipe_are_not_called_equal(favourite, changes):
    ((part, values),) = changes.items()
    recipe = json.loads(favourite.read_text())
    made = follow_recipe(rewritten(favourite, **{part: recipe[part] | values}))
    assert not made.equal
    assert torch.equal(made.wav, load_audio(favourite.with_name("1.wav"))) == (part == "output")


def test_one_bit_of_one_sample_changes_the_hash():
    wav = torch.zeros(1, 100)
    other = wav.clone()
    other[0, 50] = 1e-45
    assert MODULE.samples_sha256(wav) == hashlib.sha256(bytes(400)).hexdigest()
    assert MODULE.samples_sha256(other) != MODULE.samples_sha256(wav)


def test_an_output_folder_can_be_moved(project, moved):
    recipe = moved / "favourites" / "1.json"
    for inside in (recipe, Path(os.path.relpath(recipe))):
        made = follow_recipe(inside)
        assert made.equal
    (moved / "config.json").unlink()  # it was the run beside it that was used
    refused(recipe, recipe, r"its run .*/favourites/\.\. is not there; say where it is now, by --run")


def test_songs_and_runs_beside_the_recipe_move_with_it(tmp_path, project, mdct):
    old = tmp_path / "old"
    shutil.copytree(project / "songs", old / "songs")
    shutil.copytree(project / "an output é", old / "run", symlinks=True)
    (old / "kept").mkdir()
    recipe = save(old / "kept" / "1.wav", Run.open(old / "run"), mdct, *pair(old), Settings())
    old.rename(tmp_path / "new")
    assert follow_recipe(tmp_path / "new" / "kept" / "1.json").equal
    named = json.loads((tmp_path / "new" / "kept" / "1.json").read_text())
    assert (named["run"], named["input"]["path"]) == ("../run", "../songs/a.wav")
    assert not recipe.exists()


def test_a_relative_path_is_taken_from_where_one_stands(tmp_path, project, mdct, monkeypatch):
    monkeypatch.chdir(project)
    cuts = [dataclasses.replace(clip, path=os.path.relpath(clip.path)) for clip in pair(project)]
    (tmp_path / "kept").mkdir()
    recipe = save(tmp_path / "kept" / "1.wav", Run.open("an output é"), mdct, *cuts, Settings())
    monkeypatch.chdir(tmp_path / "kept")
    assert follow_recipe("1.json").equal
    assert json.loads(recipe.read_text())["run"] == str(project / "an output é")


def test_a_song_whose_name_is_no_text_comes_back(tmp_path, project, mdct):
    song = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \n.wav"))
    shutil.copy(project / "songs" / "a.wav", song)
    input, target = (
        dataclasses.replace(clip, path=str(song), sha256=file_sha256(song)) for clip in 2 * pair(project)[:1]
    )
    assert follow_recipe(
        save(tmp_path / "1.wav", Run.open(project / "an output é"), mdct, input, target, CHANGED)
    ).equal


def test_clips_of_unlike_length_are_cut_to_the_shorter(tmp_path, project, mdct):
    """The last clip of a file may be a tenth short."""
    run, whole = Run.open(project / "an output é"), pair(project)
    wavs = [wav[:, :5_432] for wav in load_pair(*whole)]
    wanted = render(load_model(run), mdct, *wavs).wav
    for short in (0, 1):
        clips = [dataclasses.replace(clip, length=5_432) if i == short else clip for i, clip in enumerate(whole)]
        assert cut_to_shorter(*clips) == pair(project, 5_432)
        assert all(torch.equal(a, b) for a, b in zip(load_pair(*clips), wavs, strict=True))
        recipe = save(tmp_path / f"{short}.wav", run, mdct, *clips, Settings())
        made = follow_recipe(recipe)
        assert made.equal
        assert torch.equal(made.wav, wanted)


def test_the_recipes_thread_count_is_used_and_put_back(favourite, monkeypatch):
    threads, seen = torch.get_num_threads(), []

    def fail(*args):
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(MODULE, "render", fail)
    with pytest.raises(KeyboardInterrupt):
        follow_recipe(rewritten(favourite, threads=threads + 2))
    assert seen == [threads + 2]
    assert torch.get_num_threads() == threads


def test_the_thread_count_of_the_rendering_is_written_down(tmp_path, project, mdct):
    run, threads = Run.open(project / "an output é"), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        recipe = save(tmp_path / "1.wav", run, mdct, *pair(project), Settings())
    finally:
        torch.set_num_threads(threads)
    assert json.loads(recipe.read_text())["threads"] == threads + 1
    assert follow_recipe(recipe).equal


def test_nothing_is_left_where_a_favourite_cannot_be_saved(tmp_path, project, mdct):
    run, (input, target) = Run.open(project / "an output é"), pair(project)
    for clip, words in (
        (dataclasses.replace(target, sha256="0" * 64), "not the file that the pair was made of; restore that file"),
        (
            dataclasses.replace(target, path=str(tmp_path / "no.wav")),
            "cannot be read (No such file or directory); rest",
        ),
        (dataclasses.replace(target, offset=11_000), "ends before sample 17000; restore the file"),
    ):
        with pytest.raises(UserError, match=rf"^{re.escape(clip.path)}: {re.escape(words)}"):
            save(tmp_path / "1.wav", run, mdct, input, clip, Settings())
    with pytest.raises(UserError, match="stages=3 is not allowed; use 1 to 2"):
        save(tmp_path / "1.wav", run, mdct, input, target, Settings(stages=3))
    with pytest.raises(AudioError, match=r"cannot write \.json; use"):
        save(tmp_path / "1.json", run, mdct, input, target, Settings())

    class Other(MdctCodec):
        fingerprint = "0" * 64

    with pytest.raises(UserError, match="trained on latents of codec 'mdct'"):
        save(tmp_path / "1.wav", run, Other(), input, target, Settings())
    assert list(tmp_path.iterdir()) == []


# --- recipes that cannot be followed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["input", "target"])
def test_a_song_that_is_gone_or_changed_is_named(tmp_path, project, favourite, role):
    recipe = json.loads(favourite.read_text())
    song = tmp_path / "song.wav"
    other = rewritten(favourite, **{role: recipe[role] | {"path": str(song)}})
    refused(other, other, rf"its {role} {song} is not there; put the file back, or correct {role}\.path$")
    song.mkdir()
    refused(other, other, rf"its {role} {song} is not there; put the file back, or correct {role}\.path$")
    song.rmdir()
    content = bytearray(Path(recipe[role]["path"]).read_bytes())
    song.write_bytes(content)
    assert follow_recipe(other).equal
    content[-1] ^= 1
    song.write_bytes(content)
    refused(other, song, rf"not the file that {other} was made of; restore that file$")


def test_a_song_that_cannot_be_read_is_named(favourite, project, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(MODULE, "file_sha256", denied)
    refused(favourite, project / "songs" / "a.wav", r"cannot be read \(Permission denied\); restore that file$")


def test_a_window_that_the_song_does_not_have_is_named(project, favourite):
    recipe = json.loads(favourite.read_text())
    for offset, end in ((6_001, 12_001), (10**30, 10**30 + 6_000)):
        other = rewritten(favourite, input=recipe["input"] | {"offset": offset})
        refused(other, project / "songs" / "a.wav", rf"ends before sample {end}; restore the file$")


def test_other_weights_are_refused(moved):
    recipe, where = moved / "favourites" / "1.json", moved / "favourites" / ".."
    weights = where / "best" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    refused(recipe, weights, "truncated or changed since it was written; restore it")
    (moved / "best").unlink()
    refused(recipe, where / "best", "no checkpoint here; train this run first")
    (moved / "best").symlink_to("checkpoints/step_00000002")  # a checkpoint like any other, whole and verified
    refused(recipe, where, rf"its weights are not those of {recipe}; name the run that has them, by --run$")


def test_a_run_can_be_named(project, moved):
    recipe = moved / "favourites" / "1.json"
    (moved / "best").unlink()
    assert follow_recipe(recipe, run=project / "an output é").equal
    refused(recipe, project / "songs", r"no run here \(no config\.json\)", run=project / "songs")


def test_a_run_of_another_config_is_not_called_equal(moved):
    config = json.loads((moved / "config.json").read_text())
    config["cascade"]["stages"][0]["clamp"] = [0.1, 0.1]
    (moved / "config.json").write_text(json.dumps(config))
    assert not follow_recipe(moved / "favourites" / "1.json").equal


def test_another_codec_is_refused(project, favourite, monkeypatch):
    recipe = json.loads(favourite.read_text())
    where = project / "an output é" / "favourites" / ".."
    trained = r"trained on latents of codec 'mdct'.*; use that codec, or train again"
    refused(rewritten(favourite, codec=recipe["codec"] | {"fingerprint": "0" * 64}), where, trained)
    refused(favourite, "'lpc'", "unknown; choose mdct or encodec", codec="lpc")
    renamed = rewritten(favourite, codec=recipe["codec"] | {"name": "lpc"})  # the run knows where it comes from
    assert follow_recipe(renamed).equal

    class Other(MdctCodec):
        fingerprint = "0" * 64

    asked = []
    monkeypatch.setattr(MODULE, "load_codec", lambda name: asked.append(name) or Other())
    refused(favourite, where, trained)
    refused(favourite, where, trained, codec="a folder")
    assert asked == ["mdct", "a folder"]


def test_a_setting_that_the_model_does_not_have_names_the_recipe(favourite):
    recipe = json.loads(favourite.read_text())
    other = rewritten(favourite, settings=recipe["settings"] | {"stages": 3})
    refused(other, other, "stages=3 is not allowed; use 1 to 2$")


@pytest.mark.parametrize("length", [None, 0, -1, 0.5, "9", True])
def test_a_length_that_is_none_is_refused_for_both_clips(favourite, length):
    recipe = json.loads(favourite.read_text())
    other = rewritten(favourite, **{role: recipe[role] | {"length": length} for role in ("input", "target")})
    refused(other, other, rf"length={length!r} is not allowed; use a whole number, 1 or more$")


def test_a_recipe_of_another_version_is_refused(favourite):
    for version in (0, 2, "1", None):
        other = rewritten(favourite, recipe=version)
        refused(other, other, rf"recipe version {version!r}, this code reads 1; use the code that wrote it$")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b'"text"', b"\xff\xfe", b"{}", b'{"recipe": 1}'])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content):
    (tmp_path / "1.json").write_bytes(content)
    refused(tmp_path / "1.json", tmp_path / "1.json", r"damaged \(.+\); name the \.json beside a saved")


def test_a_recipe_that_is_not_there_or_no_file_is_refused(tmp_path, favourite):
    refused(tmp_path / "no.json", tmp_path / "no.json", r"no such file; name the \.json beside a saved \.wav$")
    refused(tmp_path, tmp_path, r"cannot be read \(Is a directory\); check the path")
    refused(favourite.with_suffix(".wav"), favourite.with_suffix(".wav"), r"damaged .*; name the \.json")


FIELDS = (
    *("recipe", "run", "checkpoint", "weights_sha256", "threads", "versions", "output", "codec", "settings"),
    *("input", "target", "codec.name", "codec.fingerprint", "output.samples_sha256"),
    *(f"settings.{field.name}" for field in dataclasses.fields(Settings) if field.name != "whole_band"),
    *(f"{role}.{field}" for role in ("input", "target") for field in ("path", "offset", "length", "sha256")),
)


def damaged(path: Path, field: str, *value: object) -> Path:
    """A recipe beside this one, with another value in this field or without it."""
    recipe = json.loads(path.read_text())
    *parts, name = field.split(".")
    part = recipe
    for key in parts:
        part = part[key]
    if value:
        (part[name],) = value
    else:
        del part[name]
    (path.parent / "other.json").write_text(json.dumps(recipe))
    return path.parent / "other.json"


@pytest.mark.parametrize("field", FIELDS)
def test_a_recipe_without_a_field_is_refused(favourite, field):
    other = damaged(favourite, field)
    refused(other, other, rf"\b{field.split('.')[-1]}\b.*; (name|restore) the ")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        *((name, (None, 3, [], {})) for name in ("run", "weights_sha256", "codec.name", "codec.fingerprint")),
        *((name, (None, 3, [], "text")) for name in ("settings", "input", "target", "codec", "output")),
        ("output.samples_sha256", (None, 3, [])),
        ("checkpoint", (None, 3, "first", [])),
        ("threads", (None, 0, -1, 1.5, True, "1", 1025, 2**31, 10**30)),
        ("versions", (None, 3, "", [], [["torch", "2"]])),
        ("settings.stages", (0, "1", 1.5, [])),
        ("settings.noise", (None, 2, "0", math.nan, math.inf, {})),
        ("settings.seed", (None, -1, 2**64, 0.5)),
        ("settings.mask_hardness", (None, -1, 1e9)),
        ("settings.colour", (1,)),
        ("input.offset", (None, -1, 0.5, "0", True)),
        ("target.length", (None, 0, -1, 0.5, "9", 5_999)),
        ("input.path", (None, 3, [])),
        ("target.path", ("", "\0", ".", "1.json/a.wav")),
        ("target.sha256", (None, 3, "", "0" * 64)),
        ("input.colour", (1,)),
        ("run", ("", "\0", "no such folder", "1.json")),
    ],
)
def test_a_recipe_with_a_wrong_value_is_refused_in_one_line(project, favourite, field, values):
    """With the recipe's name in it, or at least that of the song."""
    for value in values:
        other = damaged(favourite, field, value)
        refused(other, other, "; .")
