"""Import the autoencoder and the vocoder of a public AudioSR checkpoint (Liu et al. 2023, arXiv 2309.07314) as the runs
`vae` and `hifigan` of a folder, in which a diffusion model can then be trained; AudioSR's own has another architecture.
Its spectrograms are `[B, 1, T, F]`, so the kernels of the autoencoder are transposed."""

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
UNUSED = ("vocoder.mean", "vocoder.scale")  # of a normalisation that transformers' class has
# patterns of the names of diffusers' autoencoder and transformers' vocoder → the file's
NAMES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())


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
    found = {name: tensor.float() for name, tensor in tensors.items() if name.startswith(PREFIX)}
    for name, tensor in found.items():
        if ".attn_1." in name and tensor.shape[2:] == (1, 1):  # a matrix here, there a convolution with a kernel of one
            found[name] = tensor[..., 0, 0]
        elif tensor.ndim == 4:
            found[name] = tensor.mT.contiguous()  # of the autoencoder
    vae, vocoder = MelVae(vae_sizes), Vocoder(vocoder_sizes)
    parts = nn.ModuleDict({"vae": vae.autoencoder, "vocoder": vocoder.generator})
    own = parts.state_dict()
    names = {name: original_name(name, len(vae.config.channels)) for name in own if name not in UNUSED}
    check_tensors(path, found, {theirs: own[ours] for ours, theirs in names.items()}, fix=FIX)
    parts.load_state_dict(own | {ours: found[theirs] for ours, theirs in names.items()})
    vocoder.generator.apply_weight_norm()  # the form in which runs keep it; the file has plain weights
    source, runs = {"imported": {"file": path.name, "sha256": file_sha256(path)}}, []
    for name, model in (("vae", vae), ("hifigan", vocoder)):
        runs.append(Run.create(folder / name, {"sizes": dataclasses.asdict(model.config)} | source))
        runs[-1].save(0, model, {}, is_best=True)
    return *runs, len(tensors) - len(found)


def original_name(name: str, levels: int) -> str:
    """The file's name for a tensor of ours. The file counts the decoder's levels from the last."""
    for ours, theirs in NAMES.items():
        name = re.sub(ours, theirs, name)
    return re.sub(r"\.up\.(\d+)\.", lambda found: f".up.{levels - 1 - int(found[1])}.", name)


def main() -> None:
    options = parser_of("superres.audiosr").parse_args()
    with exit_on_user_error():
        vae, vocoder, ignored = import_audiosr(options.checkpoint_file, options.out)
        print(f"{vae.path}, {vocoder.path}: imported; {ignored} tensors of other parts left out")


if __name__ == "__main__":
    main()
