"""Checkpoints of the original implementation, which these tests rebuild from PyTorch's own parts and none of lib."""

import argparse
import logging
import math
import os

import pytest
import torch
from torch import nn

import lib.model.import_original
from lib.model.fusion import FusionModel
from lib.model.import_original import import_original_checkpoint
from lib.model.projection import realign_projections
from lib.util.errors import UserError


class OriginalPositions(nn.Module):
    def __init__(self, d):
        super().__init__()
        pe = torch.zeros(1, 2000, d)
        angles = torch.arange(2000).unsqueeze(1) * torch.exp(torch.arange(0, d, 2) * (-math.log(10000.0) / d))
        pe[0, :, 0::2], pe[0, :, 1::2] = torch.sin(angles), torch.cos(angles)
        self.register_buffer("pe", pe)

    def forward(self, x):
        return x + self.pe[:, : x.shape[1]]


class OriginalStage(nn.Module):
    def __init__(self, d, layers):
        super().__init__()
        self.pos_encoding = OriginalPositions(d)
        self.input_norm = nn.LayerNorm(d)
        layer = nn.TransformerEncoderLayer(d, 8, 4 * d, 0.1, activation="gelu", batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, layers)
        self.post_norm = nn.LayerNorm(d)
        self.output_proj = nn.utils.spectral_norm(nn.Linear(d, 128))  # the legacy one: weight_orig, weight_u, weight_v

    def forward(self, x):
        x = self.post_norm(self.transformer(self.input_norm(self.pos_encoding(x.transpose(1, 2)))))
        return self.output_proj(x).transpose(1, 2)


class OriginalMaskGenerator(nn.Module):
    def __init__(self, heads=4):
        super().__init__()
        self.input_analyzer, self.target_analyzer = (
            nn.Sequential(nn.Conv1d(128, 256, 3, padding=1), nn.ReLU(), nn.Conv1d(256, 256, 3, padding=1), nn.ReLU())
            for _ in range(2)
        )
        self.cross_attention = nn.MultiheadAttention(256, heads)
        self.input_mask_generator, self.target_mask_generator = (
            nn.Sequential(nn.Conv1d(256, 128, 3, padding=1), nn.ReLU(), nn.Conv1d(128, 128, 1), nn.Sigmoid())
            for _ in range(2)
        )

    def forward(self, input, target):
        a = self.input_analyzer(input).permute(2, 0, 1)  # [T, B, 256]
        b = self.target_analyzer(target).permute(2, 0, 1)
        a_from_b, b_from_a = self.cross_attention(a, b, b)[0], self.cross_attention(b, a, a)[0]
        return (
            self.input_mask_generator(a_from_b.permute(1, 2, 0)),
            self.target_mask_generator(b_from_a.permute(1, 2, 0)),
        )


class OriginalStyleDiscriminator(nn.Module):
    """In the files but never trained; 197,826 parameters."""

    def __init__(self):
        super().__init__()
        convs = [nn.Conv1d(128, 64, 4), nn.Conv1d(64, 128, 4), nn.Conv1d(128, 256, 4)]
        self.encoder = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(256, 1))
        self.style_matcher = nn.Linear(512, 1)


class OriginalAgent(nn.Module):
    def __init__(self, heads=4):
        super().__init__()
        self.mask_generator = OriginalMaskGenerator(heads)
        self.discriminator = OriginalStyleDiscriminator()


class Original(nn.Module):
    """The model that wrote the files, from its format and documents 000 to 002. `broken`: one mistake on purpose."""

    def __init__(self, layers=(6, 6), last_residual_weight=0.1, agent=False, broken=None):
        super().__init__()
        self.cascade_stages = nn.ModuleList(OriginalStage(256 if s == 0 else 384, n) for s, n in enumerate(layers))
        self.last_residual_weight = last_residual_weight
        self.broken = broken
        if agent:
            self.creative_agent = OriginalAgent(heads=8 if broken == "heads" else 4)

    def masks(self, input, target):
        masks = self.creative_agent.mask_generator(input, target)
        return masks[::-1] if self.broken == "swapped" else masks

    def masked(self, x, mask):
        kept = x * mask
        if self.broken == "quieter":
            return kept
        dims = (0, 1, 2) if self.broken == "batch RMS" else (1, 2)
        before, after = (torch.sqrt(y.pow(2).mean(dim=dims, keepdim=True) + 1e-8) for y in (x, kept))
        return kept * before / after

    def forward(self, input, target):
        clean = input, target
        if hasattr(self, "creative_agent"):
            masks = self.masks(input, target)
            input, target = self.masked(input, masks[0]), self.masked(target, masks[1])
        output = None
        for s, stage in enumerate(self.cascade_stages):
            ends = clean if self.broken == "clean residual" else (input, target)
            sources = [input, target] if s == 0 else [input, output, target]
            residual = sum([*ends] if s == 0 else [*ends, output]) / len(sources)
            if s >= 2 and s == len(self.cascade_stages) - 1:
                residual = self.last_residual_weight * output
            out = stage(torch.cat(sources, dim=1)) + residual
            ms = [x.pow(2).mean(dim=(1, 2), keepdim=True) + 1e-8 for x in (input, target, out)]
            factor = torch.sqrt((ms[0] + ms[1]) / 2) / (torch.sqrt(ms[2]) + 1e-8)
            output = out * torch.clamp(factor, 0.7, 1.5)
        return output


class OriginalDiscriminator(nn.Module):
    def __init__(self, slope=0.2):
        super().__init__()
        widths, kernels, strides = (128, 256, 512, 512, 256), (3, 5, 7, 9), (2, 2, 2, 1)
        layers = []
        for i in range(4):
            conv = nn.Conv1d(widths[i], widths[i + 1], kernels[i], stride=strides[i], padding=kernels[i] // 2)
            layers += [conv, nn.LeakyReLU(slope), nn.Dropout(0.3)]
        self.conv_layers = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(256, 128), nn.LeakyReLU(slope), nn.Dropout(0.3), nn.Linear(128, 1))

    def forward(self, x):
        return self.classifier(torch.mean(self.conv_layers(x), dim=-1))[:, 0]


def latents(T=9, seed=3):
    return 5 * torch.randn(2, 2, 128, T, generator=torch.Generator().manual_seed(seed))


def trained_original(layers, steps=3, **options) -> Original:
    """After a few steps at a high rate, so that u and v lag behind the weight as they do in real files."""
    torch.manual_seed(0)
    model = Original(layers, **options)
    input, target = latents()
    for _ in range(steps):
        loss = (model(input, target) - input + 0.3 * target).square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                if gradient is not None:  # the style discriminator has none
                    parameter.sub_(0.05 * gradient)
    return model.eval()


def original_file(path, model, args="absent", prefix="", interrupted=False, discriminator=None):
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    content = {"epoch": 12, "model_state_dict": weights, "optimizer_state_dict": {"state": {}}, "best_val_loss": 0.25}
    if interrupted:
        content |= {"patience_counter": 3}
    else:
        content |= {"train_loss": 0.5, "val_loss": 0.25}
    if discriminator is not None:
        weights = {prefix + name: value for name, value in discriminator.state_dict().items()}
        content |= {"discriminator_state_dict": weights, "disc_optimizer_state_dict": {"state": {}}}
    values = {"num_layers": 6, "lr": 1e-4, "name": "x", "flag": None}
    if args != "absent":
        content["args"] = values if args == "dict" else argparse.Namespace(**values)
    torch.save(content, path)
    return path


def changed_file(path, change):
    """The file once more, after `change` has been let loose on what it holds."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def small_original():
    return trained_original((1, 2))


@pytest.fixture(scope="module")
def masking_original():
    """With an agent whose masks have left 0.5, where all of them start."""
    model = trained_original((1, 2), agent=True)
    with torch.no_grad():
        for head in ("input_mask_generator", "target_mask_generator"):
            getattr(model.creative_agent.mask_generator, head)[2].weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def original_discriminator():
    torch.manual_seed(7)
    return OriginalDiscriminator().eval()


def relative_error(ours, original) -> float:
    return ((ours - original).abs().max() / original.abs().max()).item()


@torch.no_grad()
def parity(model: FusionModel, original: Original) -> float:
    input, target = latents(T=40, seed=4)
    return relative_error(model(input, target).latents, original(input, target))


# --- the cascade ------------------------------------------------------------------------------------------------------


def test_import_of_the_full_model_has_eval_parity(tmp_path, caplog):
    original = trained_original((6, 6), steps=2)
    path = original_file(tmp_path / "best_model.pt", original, args="namespace")
    with caplog.at_level(logging.WARNING):
        imported = import_original_checkpoint(path)
    assert sum(p.numel() for p in imported.model.parameters()) == 4_772_480 + 10_697_600
    assert not any(module.training for module in imported.model.modules())
    assert (imported.epoch, imported.best_val_loss) == (12, 0.25)
    assert imported.discriminator is None
    assert imported.model.masking.masking == "none"
    assert not caplog.records
    assert parity(imported.model, original) < 1e-5
    realign_projections(imported.model)  # σ of our projection instead of the file's u and v: not the original
    assert parity(imported.model, original) > 1e-4


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("args", ["absent", "dict", "namespace"])
@pytest.mark.parametrize("interrupted", [False, True])
def test_import_of_every_kind_of_file(tmp_path, small_original, prefix, args, interrupted):
    path = original_file(tmp_path / "x.pt", small_original, args, prefix, interrupted)
    imported = import_original_checkpoint(path)
    assert [stage.num_layers for stage in imported.model.cascade.config.stages] == [1, 2]
    assert parity(imported.model, small_original) < 1e-5


def test_import_of_eight_layers(tmp_path):
    original = trained_original((8, 8), steps=0)
    imported = import_original_checkpoint(original_file(tmp_path / "x.pt", original))
    assert [stage.num_layers for stage in imported.model.cascade.config.stages] == [8, 8]
    assert parity(imported.model, original) < 1e-5


def test_import_of_one_stage(tmp_path):
    original = trained_original((1,))
    assert parity(import_original_checkpoint(original_file(tmp_path / "x.pt", original)).model, original) < 1e-5


def test_three_stages_need_the_last_residual_weight(tmp_path):
    original = trained_original((1, 1, 1), last_residual_weight=0.3, agent=True)
    path = original_file(tmp_path / "x.pt", original)
    with pytest.raises(UserError, match=r"3 stages.*last_residual_weight=0\.1"):
        import_original_checkpoint(path)
    assert parity(import_original_checkpoint(path, last_residual_weight=0.3).model, original) < 1e-5
    assert parity(import_original_checkpoint(path, last_residual_weight=0.1).model, original) > 1e-3


# --- the creative agent and the discriminator -------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_masks_are_the_originals(tmp_path, masking_original, prefix):
    imported = import_original_checkpoint(original_file(tmp_path / "x.pt", masking_original, prefix=prefix))
    assert imported.model.masking.masking == "learned"
    assert not any(module.training for module in imported.model.modules())
    input, target = latents(T=40, seed=4)
    fused, wanted = imported.model(input, target), masking_original.masks(input, target)
    for ours, original in zip(fused.masks, wanted, strict=True):
        assert original.std() > 0.1  # masks that say something
        assert relative_error(ours, original) < 1e-5
    assert relative_error(fused.latents, masking_original(input, target)) < 1e-5
    assert relative_error(imported.model.cascade(input, target)[0], fused.latents) > 1e-2  # which the masks decide


@pytest.mark.parametrize("broken", ["heads", "swapped", "quieter", "batch RMS", "clean residual"])
def test_the_parity_tolerance_fails_on_a_broken_agent(tmp_path, masking_original, broken):
    other = Original((1, 2), agent=True, broken=broken)
    other.load_state_dict(masking_original.state_dict())
    imported = import_original_checkpoint(original_file(tmp_path / "x.pt", masking_original))
    assert parity(imported.model, other.eval()) > 1e-4


def test_the_style_discriminator_is_in_the_file_only(tmp_path, masking_original, caplog):
    assert count(masking_original.creative_agent) == 1_281_730
    path = original_file(tmp_path / "x.pt", masking_original)
    with caplog.at_level(logging.WARNING):
        imported = import_original_checkpoint(path)
    assert count(imported.model.mask_generator) == 1_083_904
    assert count(imported.model) == count(imported.model.cascade) + 1_083_904
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}: not imported: creative_agent.discriminator.*")

    def keep_its_style_discriminator_only(content):
        for name in [n for n in content["model_state_dict"] if n.startswith("creative_agent.mask_generator.")]:
            del content["model_state_dict"][name]

    imported = import_original_checkpoint(changed_file(path, keep_its_style_discriminator_only))
    assert imported.model.masking.masking == "none"


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_discriminator_is_the_originals(tmp_path, small_original, original_discriminator, prefix):
    path = original_file(tmp_path / "x.pt", small_original, prefix=prefix, discriminator=original_discriminator)
    imported = import_original_checkpoint(path)
    assert count(imported.discriminator) == count(original_discriminator) == 3_802_881
    assert not any(module.training for module in imported.discriminator.modules())
    other = OriginalDiscriminator(slope=0.21).eval()
    other.load_state_dict(original_discriminator.state_dict())
    for T in (1, 9, 80):
        x = latents(T)[0]
        assert relative_error(imported.discriminator(x), original_discriminator(x)) < 1e-5
        assert relative_error(imported.discriminator(x), other(x)) > 1e-4
    assert parity(imported.model, small_original) < 1e-5


# --- files that do not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
def test_missing_unknown_and_misshaped_keys_are_listed_as_the_file_has_them(tmp_path, masking_original, prefix):
    def change(content):
        weights = content["model_state_dict"]
        del weights[prefix + "cascade_stages.0.post_norm.bias"]
        del weights[prefix + "cascade_stages.1.output_proj.weight_u"]
        del weights[prefix + "cascade_stages.1.transformer.layers.1.self_attn.in_proj_weight"]
        del weights[prefix + "creative_agent.mask_generator.cross_attention.out_proj.bias"]
        weights[prefix + "cascade_stages.1.transformer.layers.0.linear3.weight"] = torch.zeros(1)
        weights[prefix + "creative_agent.mask_generator.temperature"] = torch.zeros(1)
        weights[prefix + "cascade_stages.1.input_norm.bias"] = torch.zeros(7)
        weights[prefix + "creative_agent.mask_generator.target_analyzer.2.weight"] = torch.zeros(256, 256, 5)

    path = changed_file(original_file(tmp_path / "x.pt", masking_original, prefix=prefix), change)
    with pytest.raises(UserError) as error:
        import_original_checkpoint(path)
    stated, _, listed = str(error.value).partition("does not fit this model: ")
    assert stated == f"{path}: "
    assert set(listed.rpartition("; ")[0].split("; ")) == {
        "missing cascade_stages.0.post_norm.bias",
        "missing cascade_stages.1.output_proj.weight_u",
        "missing cascade_stages.1.transformer.layers.1.self_attn.in_proj_weight",
        "missing creative_agent.mask_generator.cross_attention.out_proj.bias",
        "unknown cascade_stages.1.transformer.layers.0.linear3.weight",
        "unknown creative_agent.mask_generator.temperature",
        "cascade_stages.1.input_norm.bias is [7] instead of [384]",
        "creative_agent.mask_generator.target_analyzer.2.weight is [256, 256, 5] instead of [256, 256, 3]",
    }


@pytest.mark.parametrize("name", ["surprise", "creative_agent.x.weight", "cascade_stages.2.pos_encoding.pe",
                                  "cascade_stages.0.output_projection.bias"])  # fmt: skip
def test_every_unknown_key_is_refused(tmp_path, small_original, name):
    path = original_file(tmp_path / "x.pt", small_original)
    changed_file(path, lambda content: content["model_state_dict"].update({name: torch.zeros(1)}))
    with pytest.raises(UserError, match=f"does not fit this model: unknown {name};"):
        import_original_checkpoint(path)


def test_every_missing_key_is_refused(tmp_path, original_discriminator, monkeypatch):
    """One after the other, each by its name."""
    path = original_file(tmp_path / "x.pt", Original((1,), agent=True), discriminator=original_discriminator)
    content = torch.load(path, weights_only=True)
    for part, keys in (("model_state_dict", 41), ("discriminator_state_dict", 12)):
        used = [name for name in content[part] if "creative_agent.discriminator." not in name]
        assert len(used) == keys
        for name in used:
            others = {other: value for other, value in content[part].items() if other != name}
            monkeypatch.setattr(
                lib.model.import_original, "safe_torch_load", lambda *_, c=content | {part: others}, **__: c
            )
            with pytest.raises(UserError, match=f"does not fit this model: missing {name};"):
                import_original_checkpoint(path)


def test_a_discriminator_that_does_not_fit_is_named(tmp_path, small_original, original_discriminator):
    def change(content):
        weights = content["discriminator_state_dict"]
        del weights["conv_layers.6.bias"]
        weights["conv_layers.0.weight_orig"] = torch.zeros(1)
        weights["classifier.3.weight"] = torch.zeros(2, 128)

    path = original_file(tmp_path / "x.pt", small_original, discriminator=original_discriminator)
    with pytest.raises(UserError) as error:
        import_original_checkpoint(changed_file(path, change))
    problems = (
        "missing conv_layers.6.bias; unknown conv_layers.0.weight_orig; "
        "classifier.3.weight is [2, 128] instead of [1, 128]; "
    )
    assert str(error.value).startswith(f"{path}: discriminator_state_dict: does not fit this model: {problems}")


@pytest.mark.parametrize("layer", ["cascade_stages.0.", "cascade_stages.1.transformer.layers.0."])
def test_a_missing_stage_or_layer_is_not_passed_over(tmp_path, small_original, layer):
    def change(content):
        weights = content["model_state_dict"]
        content["model_state_dict"] = {k: v for k, v in weights.items() if not k.startswith(layer)}

    path = changed_file(original_file(tmp_path / "x.pt", small_original), change)
    wanted = r"missing cascade_stages\.1\.transformer\.layers\.0.* and 4 more|has no keys cascade_stages\.0"
    with pytest.raises(UserError, match=wanted):
        import_original_checkpoint(path)


@pytest.mark.parametrize("pe", [torch.zeros(1, 2000, 256), torch.zeros(3), torch.zeros(1, 2000, 128), "text"])
def test_positions_that_are_not_sinusoidal_are_refused(tmp_path, small_original, pe):
    path = original_file(tmp_path / "x.pt", small_original)
    changed_file(path, lambda content: content["model_state_dict"].update({"cascade_stages.0.pos_encoding.pe": pe}))
    with pytest.raises(UserError, match=r"cascade_stages\.0\.pos_encoding\.pe"):
        import_original_checkpoint(path)


def test_a_shorter_table_of_positions_is_as_good(tmp_path, small_original):
    def change(content):
        weights = content["model_state_dict"]
        weights["cascade_stages.1.pos_encoding.pe"] = weights["cascade_stages.1.pos_encoding.pe"][:, :100].clone()

    path = changed_file(original_file(tmp_path / "x.pt", small_original), change)
    assert parity(import_original_checkpoint(path).model, small_original) < 1e-5


@pytest.mark.parametrize(
    ("content", "why"),
    [({"epoch": 1}, "holds no 'model_state_dict'"), ([1, 2], "holds no 'model_state_dict'"),
     ({"model_state_dict": [1]}, "holds no 'model_state_dict'"),
     ({"model_state_dict": {"a.weight": torch.zeros(1)}}, "has no keys cascade_stages"),
     ({"model_state_dict": {"a.weight": 1}}, "model_state_dict holds what is not a tensor: a.weight")],
)  # fmt: skip
def test_other_files_are_named(tmp_path, content, why):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=rf"x\.pt: {why}"):
        import_original_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("value", "why"), [([1], "is not a dict of tensors"), ({"a": 1}, "holds what is not a tensor: a")]
)
def test_a_discriminator_that_is_none_is_named(tmp_path, small_original, value, why):
    path = original_file(tmp_path / "x.pt", small_original)
    changed_file(path, lambda content: content.update(discriminator_state_dict=value))
    with pytest.raises(UserError, match=rf"x\.pt: discriminator_state_dict {why}"):
        import_original_checkpoint(path)
    changed_file(path, lambda content: content.update(discriminator_state_dict=None))
    assert import_original_checkpoint(path).discriminator is None


def test_a_file_that_would_run_code_is_refused(tmp_path, small_original):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    torch.save({"model_state_dict": small_original.state_dict(), "args": Evil()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: refused, because loading it would run code"):
        import_original_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "marker").exists()


def test_a_truncated_file_is_named(tmp_path, small_original):
    path = original_file(tmp_path / "x.pt", small_original)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"x\.pt: truncated or not a torch checkpoint"):
        import_original_checkpoint(path)
    with pytest.raises(UserError, match="no such file"):
        import_original_checkpoint(tmp_path / "none.pt")
