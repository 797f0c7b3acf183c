"""Checkpoints in AudioSR's layout, which these tests write from a small implementation of their own, of plain torch."""

import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu, pad, silu

import lib.superres.audiosr
from lib.audio.files import load_audio, save_audio
from lib.superres.audiosr import import_audiosr
from lib.superres.mel import SAMPLE_RATE
from lib.superres.resolver import Restoration, SuperResolver, restore_file
from lib.superres.training import PartConfig, load_part, train_part
from lib.superres.vae import VaeConfig
from lib.superres.vocoder import VocoderConfig
from lib.training.run import Run
from lib.util.errors import UserError
from superres.conftest import CLIP, COMPLETION, DENOISER, LOOP, band, changed, decibels, inner, white

VAE = VaeConfig((4, 8, 8, 6), num_res_blocks=2, latent_channels=3, norm_groups=2)
VOCODER = VocoderConfig(32, resblock_kernels=(3, 5), dilations=(1, 3))


# --- the original, small ----------------------------------------------------------------------------------------------


class OriginalResnet(nn.Module):
    def __init__(self, a, b, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, a, 1e-6), nn.Conv2d(a, b, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, b, 1e-6), nn.Conv2d(b, b, 3, padding=1)
        if a != b:
            self.nin_shortcut = nn.Conv2d(a, b, 1)

    def forward(self, x):
        h = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class OriginalAttention(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # [B, C, places]
        weights = torch.softmax(q.mT @ k / x.shape[1] ** 0.5, dim=2)
        return x + self.proj_out((v @ weights.mT).unflatten(2, x.shape[2:]))


class OriginalDown(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, 2)

    def forward(self, x):
        return self.conv(pad(x, (0, 1, 0, 1)))


class OriginalUp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(interpolate(x, scale_factor=2.0))


class OriginalMiddle(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.block_1, self.block_2 = OriginalResnet(c, c, groups), OriginalResnet(c, c, groups)
        self.attn_1 = OriginalAttention(c, groups)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class OriginalEncoder(nn.Module):
    def __init__(self, widths, z, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(1, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        before = widths[0]
        for i, width in enumerate(widths):
            level = nn.Module()
            level.block = nn.ModuleList(OriginalResnet(a, width, groups) for a in (before, width))
            if i < len(widths) - 1:
                level.downsample = OriginalDown(width)
            self.down.append(level)
            before = width
        self.mid = OriginalMiddle(before, groups)
        self.norm_out, self.conv_out = nn.GroupNorm(groups, before, 1e-6), nn.Conv2d(before, 2 * z, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                x = block(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(silu(self.norm_out(self.mid(x))))


class OriginalDecoder(nn.Module):
    def __init__(self, widths, z, groups):
        super().__init__()
        before = widths[-1]
        self.conv_in, self.mid = nn.Conv2d(z, before, 3, padding=1), OriginalMiddle(before, groups)
        levels = []
        for i, width in reversed(list(enumerate(widths))):
            level = nn.Module()
            level.block = nn.ModuleList(OriginalResnet(a, width, groups) for a in (before, width, width))
            if i > 0:
                level.upsample = OriginalUp(width)
            levels.insert(0, level)  # up.0 is the last to run
            before = width
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = nn.GroupNorm(groups, before, 1e-6), nn.Conv2d(before, 1, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(silu(self.norm_out(x)))


class OriginalResblock(nn.Module):
    def __init__(self, c, kernel, dilations):
        super().__init__()
        self.convs1 = nn.ModuleList(nn.Conv1d(c, c, kernel, dilation=d, padding=d * (kernel // 2)) for d in dilations)
        self.convs2 = nn.ModuleList(nn.Conv1d(c, c, kernel, padding=kernel // 2) for _ in dilations)

    def forward(self, x):
        for first, second in zip(self.convs1, self.convs2, strict=True):
            x = x + second(leaky_relu(first(leaky_relu(x, 0.1)), 0.1))
        return x


class OriginalVocoder(nn.Module):
    def __init__(self, c, kernels, dilations):
        super().__init__()
        self.conv_pre, self.kernels = nn.Conv1d(256, c, 7, padding=3), len(kernels)
        sizes = list(zip((6, 5, 4, 2, 2), (12, 10, 8, 4, 4), (c, c // 2, c // 4, c // 8, c // 16), strict=True))
        self.ups = nn.ModuleList(nn.ConvTranspose1d(c, c // 2, k, u, (k - u) // 2) for u, k, c in sizes)
        self.resblocks = nn.ModuleList(OriginalResblock(c // 2, k, dilations) for _, _, c in sizes for k in kernels)
        self.conv_post = nn.Conv1d(c // 32, 1, 7, padding=3)

    def forward(self, mel):
        """`[B, 256, T] → [B, 1, 480 · T + 16]`."""
        x = self.conv_pre(mel)
        for i, up in enumerate(self.ups):
            x = up(leaky_relu(x, 0.1))
            x = sum(block(x) for block in self.resblocks[i * self.kernels : (i + 1) * self.kernels]) / self.kernels
        return torch.tanh(self.conv_post(leaky_relu(x)))


class Original(nn.Module):
    """The first stage, with weights that keep a signal's size, and norms that are no identity. Its pictures lie on
    their side: `[B, 1, T, F]`."""

    def __init__(self, vae: VaeConfig = VAE, vocoder: VocoderConfig = VOCODER):
        super().__init__()
        self.z = z = vae.latent_channels
        self.encoder, self.decoder = (
            coder(vae.channels, z, vae.norm_groups) for coder in (OriginalEncoder, OriginalDecoder)
        )
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)
        self.vocoder = OriginalVocoder(vocoder.channels, vocoder.resblock_kernels, vocoder.dilations)
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d):
                nn.init.kaiming_normal_(module.weight, a=0.5)
                nn.init.normal_(module.bias, std=0.2)
            if isinstance(module, nn.GroupNorm):
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, std=0.3)
        with torch.no_grad():
            self.vocoder.conv_post.weight.mul_(0.3)  # away from the ends of the tanh
        self.eval().requires_grad_(False)

    def encode(self, picture):
        return self.quant_conv(self.encoder(picture))[:, : self.z]  # the posterior's mean

    def decode(self, latents):
        return self.decoder(self.post_quant_conv(latents))


@pytest.fixture(scope="module")
def original() -> Original:
    torch.manual_seed(0)
    return Original()


def content(original: Original, **changes: Tensor | None) -> dict:
    """A checkpoint as AudioSR's. `changes`: name without prefix, dots as '__' → another tensor, or None to drop it."""
    tensors = {f"first_stage_model.{name}": tensor for name, tensor in original.state_dict().items()}
    for name, tensor in changes.items():
        tensors["first_stage_model." + name.replace("__", ".")] = tensor
    others = {"model.diffusion_model.out.2.weight": torch.ones(3), "clap.model.logit_scale_a": torch.ones(())}
    others |= {"scale_factor": torch.tensor(0.3)}
    return {"epoch": 3, "state_dict": {k: v for k, v in tensors.items() if v is not None} | others}


def write(folder: Path, content: object) -> Path:
    torch.save(content, folder / "basic.pth")
    return folder / "basic.pth"


def small_import(path: Path, folder: Path):
    return import_audiosr(path, folder, VAE, VOCODER)


def error_of(folder: Path, content: object) -> str:
    path = write(folder, content)
    with pytest.raises(UserError) as refused:
        small_import(path, folder / "out")
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert not (folder / "out").exists()
    return message


def mels(F: int = 256, T: int = 24) -> Tensor:
    return 2 * torch.randn(2, 1, F, T, generator=torch.Generator().manual_seed(1)) - 4


# --- the same function ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("audiosr")
    return small_import(write(folder, content(original)), folder / "out")


def test_autoencoder_is_the_original_turned(original, imported):
    vae, mel = load_part(Run.open(imported[0].path), "vae"), mels(F=32)
    with torch.no_grad():
        latents = original.encode(mel.mT)
        assert latents.shape == (2, 3, 3, 4)  # [B, Z, T / 8, F / 8]
        torch.testing.assert_close(vae.encode(mel), latents.mT, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(vae.decode(latents.mT), original.decode(latents).mT, atol=1e-4, rtol=1e-4)
        # the comparison would see silence, and kernels that were left as they are
        assert latents.std() > 0.1
        assert original.decode(latents).std() > 0.1
        assert (original.encode(mel) - latents.mT).abs().mean() > 0.1
    assert vae.config == VAE
    assert not vae.training


def test_vocoder_is_the_original(original, imported):
    vocoder, mel = load_part(Run.open(imported[1].path), "hifigan"), mels(T=5)
    with torch.no_grad():
        wav = original.vocoder(mel[:, 0])
        assert wav.shape == (2, 1, 480 * 5 + 16)
        torch.testing.assert_close(vocoder(mel), wav[..., : 480 * 5], atol=1e-4, rtol=1e-4)
    assert 0.05 < wav.std() < 0.95
    assert vocoder.config == VOCODER


def test_report_and_runs_say_what_was_imported(original, imported):
    vae, vocoder, ignored = imported
    assert ignored == 3  # of the diffusion model, of CLAP, and the scale
    for run, name in ((vae, "vae"), (vocoder, "hifigan")):
        assert run.path.name == name
        assert run.config["imported"]["file"] == "basic.pth"
        assert len(run.config["imported"]["sha256"]) == 64
        assert run.saved_step == 0
    assert vae.config["imported"] == vocoder.config["imported"]


def test_half_precision_is_read(original, tmp_path):
    halves = content(original)
    halves["state_dict"] = {name: tensor.half() for name, tensor in halves["state_dict"].items()}
    report = small_import(write(tmp_path, halves), tmp_path / "out")
    weights = load_part(report[0], "vae").autoencoder.encoder.conv_in.weight
    assert weights.dtype == torch.float32
    assert torch.equal(weights, original.encoder.conv_in.weight.half().float().mT)


def test_with_a_denoiser_trained_in_its_folder_it_restores_a_file(library, tmp_path):
    """At the sizes of the public checkpoints, from the checkpoint to a wave."""
    torch.manual_seed(0)
    path = write(tmp_path, content(Original(VaeConfig(), VocoderConfig())))
    import_audiosr(path, tmp_path / "out")
    path.unlink()  # half a gigabyte
    train_part(tmp_path / "out", "completion", library, COMPLETION, PartConfig(**LOOP | {"max_steps": 1}))
    sizes = changed(DENOISER, latent_channels=16)
    train_part(tmp_path / "out", "diffusion", library, sizes, PartConfig(**LOOP | {"max_steps": 1}))
    resolver = SuperResolver(tmp_path / "out")
    low = inner(band(white(2 * CLIP), 0, 5_000))
    save_audio(tmp_path / "low.wav", low, SAMPLE_RATE)
    _, cutoff = restore_file(tmp_path / "low.wav", tmp_path / "full.wav", resolver, Restoration(steps=1))
    full = load_audio(tmp_path / "full.wav", sample_rate=SAMPLE_RATE)
    assert full.shape == low.shape
    assert cutoff == pytest.approx(5_000, abs=100)
    assert decibels(band(full - low, 0, 4_000), full - low) < -30  # its own band is left as it is
    assert decibels(band(full, 6_000), low) > -40  # and above it is what the vocoder made of the decoded latents
    with torch.no_grad():
        heard = resolver.vocoder(resolver.predict_mel(low[None, :, :CLIP], cutoff, Restoration(steps=1)))[0]
    part = slice(3_000)  # that no other clip is crossfaded with
    assert decibels(band(full[:, part] - heard[:, part], 7_000), band(heard[:, part], 7_000)) < -10


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"encoder__conv_in__weight": None}, "missing first_stage_model.encoder.conv_in.weight"),
        ({"vocoder__ups__2__bias": None}, "missing first_stage_model.vocoder.ups.2.bias"),
        ({"decoder__up__1__upsample__conv__bias": None}, "missing first_stage_model.decoder.up.1.upsample.conv.bias"),
        ({"decoder__up__4__x": torch.ones(1)}, "unknown first_stage_model.decoder.up.4.x"),
        ({"loss__logvar": torch.ones(())}, "unknown first_stage_model.loss.logvar"),
        ({"vocoder__mean": torch.ones(256)}, "unknown first_stage_model.vocoder.mean"),
        (
            {"encoder__mid__block_1__conv1__weight": torch.ones(6, 6, 3, 5)},
            "first_stage_model.encoder.mid.block_1.conv1.weight is [6, 6, 5, 3] instead of [6, 6, 3, 3]",
        ),
        (
            {"encoder__mid__attn_1__q__weight": torch.ones(6, 6, 3, 3)},
            "first_stage_model.encoder.mid.attn_1.q.weight is [6, 6, 3, 3] instead of [6, 6]",
        ),
        (
            {"vocoder__conv_pre__weight": torch.ones(32, 255, 7)},
            "first_stage_model.vocoder.conv_pre.weight is [32, 255, 7] instead of [32, 256, 7]",
        ),
        (
            {"vocoder__conv_pre__weight_v": torch.ones(32, 256, 7), "vocoder__conv_pre__weight": None},
            "missing first_stage_model.vocoder.conv_pre.weight; unknown first_stage_model.vocoder.conv_pre.weight_v",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(original, tmp_path, changes, problem):
    message = error_of(tmp_path, content(original, **changes))
    assert problem in message
    assert message.endswith("give a checkpoint that AudioSR released, such as basic.pth")


@pytest.mark.parametrize(
    "wrong", [{}, [1, 2], {"state_dict": 3}, {"state_dict": {"a": 1}}, {"state_dict": {1: torch.ones(1)}}]
)
def test_a_file_without_tensors_is_refused(tmp_path, wrong):
    assert "holds no 'state_dict' of tensors; give a checkpoint" in error_of(tmp_path, wrong)


class Command:
    def __reduce__(self):
        return (Path.touch, (Path(__file__).with_name("was_run"),))


def test_code_in_a_file_is_not_run(original, tmp_path):
    message = error_of(tmp_path, content(original) | {"callback": Command()})
    assert "refused, because loading it would run code from the file" in message
    assert not Path(__file__).with_name("was_run").exists()


def test_a_damaged_file_is_refused(original, tmp_path):
    path = write(tmp_path, content(original))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"basic\.pth: .*get the file again"):
        small_import(path, tmp_path / "out")


# --- command line -----------------------------------------------------------------------------------------------------


def test_command_line_tells_in_one_line_what_it_did(original, tmp_path, monkeypatch, capsys):
    path, out = write(tmp_path, content(original)), tmp_path / "out"
    small = functools.partial(import_audiosr, vae_sizes=VAE, vocoder_sizes=VOCODER)
    monkeypatch.setattr(lib.superres.audiosr, "import_audiosr", small)
    monkeypatch.setattr(sys, "argv", ["audiosr", str(path), "-o", str(out)])
    lib.superres.audiosr.main()
    said = capsys.readouterr()
    assert said.out == f"{out / 'vae'}, {out / 'hifigan'}: imported; 3 tensors of other parts left out\n"
    assert load_part(Run.open(out / "vae"), "vae").config == VAE


@pytest.mark.parametrize(("file", "problem"), [("nowhere.pth", "no such file"), ("basic.pth", "no 'state_dict'")])
def test_command_line_ends_with_2_and_one_line_on_an_error(tmp_path, monkeypatch, capsys, file, problem):
    write(tmp_path, {})
    monkeypatch.setattr(sys, "argv", ["audiosr", str(tmp_path / file), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        lib.superres.audiosr.main()
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(rf"error: {re.escape(str(tmp_path / file))}: [^\n]*{problem}[^\n]*\n", said.err)
