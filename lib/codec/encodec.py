"""Meta's EnCodec at 24 kHz, without the quantiser; weights from a directory or the hub. Legend as in `lib.codec`."""

import hashlib
import os
import socket
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import encodec.model
import encodec.modules.conv
import torch
from torch import Tensor, nn

from lib.audio.features import mirrored
from lib.codec.mdct import DIM, HOP, SAMPLE_RATE, checked, trimmed
from lib.util.errors import UserError
from lib.util.files import file_sha256, naming
from lib.util.tensors import check_tensors, safe_torch_load, torch_threads

OFFLINE_VARIABLE = "ENCODEC_OFFLINE"  # if set, and not to 0, the weights are never downloaded
WEIGHTS_FILE = "encodec_24khz-d7cc33bc.th"  # the public file; the digits begin its sha256


def pad1d(x: Tensor, paddings: tuple[int, int], mode: str = "constant", value: float = 0.0) -> Tensor:
    """The package's own, which its convolutions call, but for the gradient: see `mirrored`."""
    if mode != "reflect":
        return nn.functional.pad(x, paddings, mode, value)
    silence = max(0, max(paddings) - x.shape[-1] + 1)  # after a clip that is shorter than its padding
    padded = mirrored(nn.functional.pad(x, (0, silence)), *paddings)
    return padded[..., : padded.shape[-1] - silence]


encodec.modules.conv.pad1d = pad1d


class EncodecCodec(nn.Module):
    """EnCodec at 24 kHz (Défossez et al. 2022) along its continuous path, always in float32 on its own device."""

    sample_rate, channels, hop, dim, name = SAMPLE_RATE, 1, HOP, DIM, "encodec"

    def __init__(self, model: encodec.model.EncodecModel, weights_sha256: str):
        super().__init__()
        self.encoder, self.decoder = model.encoder, model.decoder
        for module in self.modules():  # folded: the old weight norm sets module.weight in each forward: a race
            if hasattr(module, "weight_g"):
                nn.utils.remove_weight_norm(module)
        self.requires_grad_(False).train()
        self.fingerprint = hashlib.sha256(f"encodec-24khz-continuous {weights_sha256}".encode()).hexdigest()

    @classmethod
    def from_directory(cls, directory: str | Path) -> "EncodecCodec":
        """Load the one `encodec_24khz-<8 hex digits>.th` there; the digits begin its sha256, or `UserError`."""
        files = sorted(Path(directory).glob(f"encodec_24khz-{8 * '[0-9a-f]'}.th"))
        if len(files) != 1:
            found = ", ".join(f.name for f in files) or "none"
            raise UserError(f"{directory}: needs exactly one encodec_24khz-<8 hex digits>.th, found {found}")
        codec = cls._from_file(files[0])
        codec.source = str(Path(directory).resolve())
        return codec

    @classmethod
    def from_hub(cls) -> "EncodecCodec":
        """The public weights from torch.hub's cache, downloaded into it first unless `ENCODEC_OFFLINE` is set."""
        file = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS_FILE)
        if not file.exists():
            timeout = socket.getdefaulttimeout()
            socket.setdefaulttimeout(30)  # torch.hub sets none: a silent firewall would hold the user for minutes
            try:
                if os.environ.get(OFFLINE_VARIABLE, "0") not in ("", "0"):
                    raise OSError(f"{OFFLINE_VARIABLE} is set")
                file.parent.mkdir(parents=True, exist_ok=True)
                url = encodec.model.ROOT_URL + WEIGHTS_FILE
                torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem[-8:])
            except (OSError, RuntimeError) as error:  # RuntimeError: a wrong hash, of a login page instead of the file
                raise UserError(
                    f"codec 'encodec': its weights are not on this machine and could not be downloaded ({error}); give "
                    f"the directory that holds {WEIGHTS_FILE} (--codec DIR), or run where the network reaches the hub"
                ) from error
            finally:
                socket.setdefaulttimeout(timeout)
        return cls._from_file(file)

    @classmethod
    def _from_file(cls, file: Path) -> "EncodecCodec":
        with naming(file, "download it again"):
            sha256 = file_sha256(file)
        if not sha256.startswith(file.stem[-8:]):
            raise UserError(f"{file}: its checksum begins with {sha256[:8]}, unlike its name; download it again")
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # the initial weights are replaced below
            warnings.filterwarnings("ignore", message=r".*weight_norm.* is deprecated", category=FutureWarning)
            model = encodec.model.EncodecModel.encodec_model_24khz(pretrained=False)
        weights = safe_torch_load(file)
        check_tensors(file, weights, model.state_dict(), fix="download it again")
        model.load_state_dict(weights)
        return cls(model, sha256)

    def train(self, mode: bool = True) -> "EncodecCodec":
        """Always in training mode, which changes no result: in eval mode cuDNN has no backward pass for LSTMs."""
        return super().train()

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """`[B, 1, N]` → `[B, 128, T]`, T = ceil(N / 320): the model pads."""
        latents = self._run(self.encoder, checked(wav, channels=1))
        if not torch.isfinite(latents).all():
            raise ValueError("wav holds NaN or infinite samples; check the audio on loading")
        return latents

    def decode(self, latents: Tensor, length: int | None = None) -> Tensor:
        """`[B, 128, T]` → `[B, 1, T·320]` or `[B, 1, length]`."""
        return trimmed(self._run(self.decoder, checked(latents, channels=DIM)), length)

    def _run(self, network: nn.Module, x: Tensor) -> Tensor:
        like = next(network.parameters())
        with torch.autocast(like.device.type, enabled=False):
            x = x.to(like)
            threads, inference = min(len(x), torch.get_num_threads()), torch.is_inference_mode_enabled()
            if like.device.type != "cpu" or threads < 2 or (torch.is_grad_enabled() and x.requires_grad):
                return network(x)

            def run(clip: Tensor) -> Tensor:  # a thread begins with gradients on
                with torch.inference_mode(inference), torch.no_grad():
                    return network(clip)

            # each clip on its own core: almost twice as fast on two cores, since convolutions scale badly
            with torch_threads(1), ThreadPoolExecutor(threads) as pool:
                return torch.cat(list(pool.map(run, x.split(1))))
