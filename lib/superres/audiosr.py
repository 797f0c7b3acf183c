"""Import of the autoencoder and the vocoder of the publicly released AudioSR checkpoints (Liu et al. 2023, arXiv
2309.07314; their `basic.pth` and `speech.pth`).

    python -m lib.superres.audiosr basic.pth -o outputs/audiosr

They become the runs `vae` and `vocoder` of a folder, on which a diffusion model can then be trained. Their own
diffusion model is another one, without a global encoder, and is left out. Their pictures lie on their side,
`[B, 1, T, F]` instead of `[B, 1, F, T]`, so every kernel of the autoencoder is turned.
"""

import argparse
import dataclasses
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.superres.vae import MelVae, VaeConfig
from lib.superres.vocoder import Vocoder, VocoderConfig
from lib.training.run import Run
from lib.util.errors import UserError, exit_on_user_error
from lib.util.files import file_sha256
from lib.util.tensors import check_tensors, safe_torch_load

PREFIX = "first_stage_model."
FIX = "give a checkpoint that AudioSR released, such as basic.pth"


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """What was imported, and how many tensors of the file belong to other parts."""

    vae: Run
    vocoder: Run
    ignored: int


def import_audiosr(
    path: str | Path,
    folder: str | Path,
    vae_config: VaeConfig | None = None,
    vocoder_config: VocoderConfig | None = None,
) -> ImportReport:
    """Read a checkpoint and write the runs `folder/vae` and `folder/vocoder`.

    Nothing of the file is run. `UserError` lists tensors that are missing, unknown or of another shape; weight
    normalisation, in torch's older or newer form or none, becomes plain weights.
    """
    path, folder = Path(path), Path(folder)
    content = safe_torch_load(path)
    tensors = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise UserError(f"{path}: holds no 'state_dict' of tensors; {FIX}")
    own = {name.removeprefix(PREFIX): tensor.float() for name, tensor in tensors.items() if name.startswith(PREFIX)}
    own = without_weight_norm(path, own)
    of_vocoder = {name: own.pop(name) for name in list(own) if name.startswith("vocoder.")}
    vae, vocoder = MelVae(vae_config), Vocoder(vocoder_config)
    levels = len(vae.config.channels)
    fill(path, vae.autoencoder, own, {name: vae_name(name, levels) for name in vae.autoencoder.state_dict()})
    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.mT.contiguous()
    generator = vocoder.generator
    fill(path, generator, of_vocoder, {name: vocoder_name(name) for name in generator.state_dict() if name not in OURS})
    generator.apply_weight_norm()  # in which form training goes on
    source = {"imported": {"file": path.name, "sha256": file_sha256(path)}}
    runs = []
    for name, model in (("vae", vae), ("vocoder", vocoder)):
        runs.append(Run.create(folder / name, {"sizes": dataclasses.asdict(model.config)} | source))
        runs[-1].save(0, model, {}, is_best=True)
    return ImportReport(*runs, sum(not name.startswith(PREFIX) for name in tensors))


def fill(path: Path, model: nn.Module, tensors: dict[str, Tensor], names: dict[str, str]) -> None:
    """Load every tensor into its place in the model. `names`: the model's name → the file's, without the prefix."""
    own = model.state_dict()
    # attention is a matrix here, a convolution with a kernel of one in the file
    found = {name: x[..., 0, 0] if is_matrix(name, x) else x for name, x in tensors.items()}
    wanted = {PREFIX + theirs: own[ours] for ours, theirs in names.items()}
    check_tensors(path, {PREFIX + name: tensor for name, tensor in found.items()}, wanted, fix=FIX)
    model.load_state_dict({name: own[name] for name in own} | {ours: found[theirs] for ours, theirs in names.items()})


def is_matrix(name: str, tensor: Tensor) -> bool:
    return ATTENTION.search(name) is not None and tensor.shape[2:] == (1, 1)


# --- names ------------------------------------------------------------------------------------------------------------

ATTENTION = re.compile(r"\.attn_1\.(q|k|v|proj_out)\.weight$")
# the ends of the names of length and direction
WEIGHT_NORM = ((".weight_g", ".weight_v"), (".parametrizations.weight.original0", ".parametrizations.weight.original1"))
OURS = ("mean", "scale")  # of a normalisation that the vocoder's class has and does not use
# patterns of names here → what they are in the file
VAE_NAMES = {
    r"\.conv_norm_out\.": ".norm_out.",
    r"\.mid_block\.resnets\.0\.": ".mid.block_1.",
    r"\.mid_block\.resnets\.1\.": ".mid.block_2.",
    r"\.mid_block\.attentions\.0\.group_norm\.": ".mid.attn_1.norm.",
    r"\.mid_block\.attentions\.0\.to_([qkv])\.": r".mid.attn_1.\1.",
    r"\.mid_block\.attentions\.0\.to_out\.0\.": ".mid.attn_1.proj_out.",
    r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.": r".down.\1.block.\2.",
    r"\.down_blocks\.(\d+)\.downsamplers\.0\.": r".down.\1.downsample.",
    r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.": r".up.\1.block.\2.",
    r"\.up_blocks\.(\d+)\.upsamplers\.0\.": r".up.\1.upsample.",
    r"\.conv_shortcut\.": ".nin_shortcut.",
}


def vae_name(name: str, levels: int) -> str:
    """The file's name of a tensor of diffusers' autoencoder. The file counts the decoder's levels from the last one."""
    for ours, theirs in VAE_NAMES.items():
        name = re.sub(ours, theirs, name)
    return re.sub(r"\.up\.(\d+)\.", lambda found: f".up.{levels - 1 - int(found[1])}.", name)


def vocoder_name(name: str) -> str:
    return "vocoder." + re.sub(r"^upsampler\.", "ups.", name)


def without_weight_norm(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with one weight g · v / ‖v‖ in place of each length g and direction v (Salimans and Kingma
    2016, arXiv 1602.07868), in the older or the newer form of torch."""
    plain = {}
    for name, tensor in tensors.items():
        stem, form = name, None
        for length, direction in WEIGHT_NORM:
            for ending in (length, direction):
                if name.endswith(ending):
                    stem, form = name.removesuffix(ending), (length, direction)
        if form is None:
            plain[name] = tensor
        elif missing := [stem + ending for ending in form if stem + ending not in tensors]:
            raise UserError(f"{path}: {PREFIX}{name} is there without {PREFIX}{missing[0]}; {FIX}")
        elif name.endswith(form[1]):
            g = tensors[stem + form[0]]
            if g.shape != (len(tensor),) + (1,) * (tensor.ndim - 1):
                raise UserError(f"{path}: {PREFIX}{stem}{form[0]} is {list(g.shape)}, no length for each output; {FIX}")
            plain[f"{stem}.weight"] = torch._weight_norm(tensor, g, 0)
    return plain


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lib.superres.audiosr", description="Import autoencoder and vocoder of an AudioSR checkpoint."
    )
    parser.add_argument("checkpoint", help="basic.pth or speech.pth")
    parser.add_argument("-o", "--out", required=True, help="folder for the runs vae and vocoder")
    options = parser.parse_args()
    with exit_on_user_error():
        report = import_audiosr(options.checkpoint, options.out)
        print(f"{report.vae.path}, {report.vocoder.path}: imported; {report.ignored} tensors of other parts left out")


if __name__ == "__main__":
    main()
