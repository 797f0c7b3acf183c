"""Import the autoencoder and the vocoder of a public AudioSR checkpoint (Liu et al. 2023, arXiv 2309.07314) as the runs
`vae` and `hifigan` of a folder, in which a diffusion model can then be trained; AudioSR's own has another architecture.
Its spectrograms are `[B, 1, T, F]`, so the kernels of the autoencoder are transposed.

    python -m lib.superres.audiosr basic.pth -o outputs/audiosr
"""

from lib.commands import parser_of

if __name__ == "__main__":  # at once: what is imported below takes seconds
    parser_of("superres.audiosr").parse_args()

import dataclasses
import re
import tomllib
from pathlib import Path

from torch import Tensor, nn

from lib.superres.vae import MelVae, VaeConfig
from lib.superres.vocoder import Vocoder, VocoderConfig
from lib.training.run import Run
from lib.util.errors import UserError, exit_on_user_error
from lib.util.files import file_sha256
from lib.util.tensors import check_tensors, safe_torch_load

PREFIX = "first_stage_model."
FIX = "give a checkpoint that AudioSR released, such as basic.pth"
ATTENTION = re.compile(r"\.attn_1\.(q|k|v|proj_out)\.weight$")
# endings of the names of magnitude and direction, in torch's older and newer form of weight normalisation
WEIGHT_NORM = ((".weight_g", ".weight_v"), (".parametrizations.weight.original0", ".parametrizations.weight.original1"))
UNUSED = ("mean", "scale")  # of a normalisation that transformers' class has
# patterns of diffusers' names → the file's
VAE_NAMES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())


def import_audiosr(
    path: str | Path, folder: str | Path, vae_sizes: VaeConfig | None = None, vocoder_sizes: VocoderConfig | None = None
) -> tuple[Run, Run, int]:
    """Read a checkpoint without executing code in it, and write the runs `folder/vae` and `folder/hifigan`; returns
    both, and the number of tensors ignored. `UserError` lists tensors that are missing, unknown or of another shape."""
    path, folder = Path(path), Path(folder)
    content = safe_torch_load(path)
    tensors = content.get("state_dict") if isinstance(content, dict) else None
    named = isinstance(tensors, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items())
    if not named:
        raise UserError(f"{path}: holds no 'state_dict' of tensors; {FIX}")
    own = {name.removeprefix(PREFIX): tensor.float() for name, tensor in tensors.items() if name.startswith(PREFIX)}
    ignored, own = len(tensors) - len(own), without_weight_norm(path, own)
    of_vocoder = {name: own.pop(name) for name in list(own) if name.startswith("vocoder.")}
    vae, vocoder = MelVae(vae_sizes), Vocoder(vocoder_sizes)
    names = {name: vae_name(name, len(vae.config.channels)) for name in vae.autoencoder.state_dict()}
    fill(path, vae.autoencoder, own, names)
    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.mT.contiguous()
    names = [name for name in vocoder.generator.state_dict() if name not in UNUSED]
    fill(path, vocoder.generator, of_vocoder, {name: "vocoder." + re.sub("^upsampler", "ups", name) for name in names})
    vocoder.generator.apply_weight_norm()  # the form in which runs keep it
    source, runs = {"imported": {"file": path.name, "sha256": file_sha256(path)}}, []
    for name, model in (("vae", vae), ("hifigan", vocoder)):
        runs.append(Run.create(folder / name, {"sizes": dataclasses.asdict(model.config)} | source))
        runs[-1].save(0, model, {}, is_best=True)
    return *runs, ignored


def fill(path: Path, model: nn.Module, tensors: dict[str, Tensor], names: dict[str, str]) -> None:
    """Load every tensor into its place in the model. `names`: the model's name → the file's, without the prefix."""
    own = model.state_dict()
    # attention is a matrix here, a convolution with a kernel of one in the file
    found = {k: x[..., 0, 0] if ATTENTION.search(k) and x.shape[2:] == (1, 1) else x for k, x in tensors.items()}
    expected = {PREFIX + theirs: own[ours] for ours, theirs in names.items()}
    check_tensors(path, {PREFIX + name: tensor for name, tensor in found.items()}, expected, fix=FIX)
    model.load_state_dict(own | {ours: found[theirs] for ours, theirs in names.items()})


def vae_name(name: str, levels: int) -> str:
    """The file's name for a tensor of diffusers' autoencoder. The file counts the decoder's levels from the last."""
    for ours, theirs in VAE_NAMES.items():
        name = re.sub(ours, theirs, name)
    return re.sub(r"\.up\.(\d+)\.", lambda found: f".up.{levels - 1 - int(found[1])}.", name)


def without_weight_norm(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with one weight g · v / ‖v‖ for each magnitude g and direction v (arXiv 1602.07868)."""
    plain = dict(tensors)
    for magnitude, direction in WEIGHT_NORM:
        stems = [name.removesuffix(magnitude) for name in tensors if name.endswith(magnitude)]
        for stem in (stem for stem in stems if stem + direction in tensors):
            g, v = plain.pop(stem + magnitude), plain.pop(stem + direction)
            if g.shape != (len(v),) + (1,) * (v.ndim - 1):
                fault = f"{PREFIX}{stem}{magnitude} is {list(g.shape)}, not one magnitude an output"
                raise UserError(f"{path}: {fault}; {FIX}")
            plain[f"{stem}.weight"] = g * v / v.flatten(1).norm(dim=1).view_as(g)
    return plain


def main() -> None:
    options = parser_of("superres.audiosr").parse_args()
    with exit_on_user_error():
        vae, vocoder, ignored = import_audiosr(options.checkpoint_file, options.out)
        print(f"{vae.path}, {vocoder.path}: imported; {ignored} tensors of other parts left out")


if __name__ == "__main__":
    main()
