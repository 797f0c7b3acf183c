"""Callbacks of training: clips to listen to, and TensorBoard."""

from typing import Any

import matplotlib.pyplot as plt
import torch
from torch.utils.tensorboard import SummaryWriter

from lib.audio import plots
from lib.audio.files import load_audio, save_audio
from lib.codec.codec import Codec
from lib.data.pairs import Manifest
from lib.model.whole_band import decode_fusion, left_out
from lib.training.batches import evenly_spread
from lib.training.learner import evaluating
from lib.training.trainer import Callback, Trainer


class DemoClips(Callback):
    """Fuses the same validation pairs every few epochs and at the end. Writes audio/pair_0_input.wav, pair_0_target.wav
    and the fusion, pair_0_epoch_0010.wav or pair_0_last.wav, at the codec's levels, and a figure of the three. With the
    pairs' `manifest`, by which their clips are read, all have the whole band; without, the codec's."""

    def __init__(self, codec: Codec, every: int, count: int = 2, manifest: Manifest | None = None):
        self.codec, self.every, self.count, self.manifest = codec, every, count, manifest

    def on_epoch(self, trainer: Trainer, epoch: int) -> None:
        if epoch % self.every == 0:
            self.write(trainer, f"epoch_{epoch:04d}")

    def on_end(self, trainer: Trainer) -> None:
        if trainer.finished:
            self.write(trainer, "last")

    def write(self, trainer: Trainer, when: str) -> None:
        pairs, device = trainer.pairs["val"], trainer.accelerator.device
        audio, figures = trainer.run.path / "audio", trainer.run.path / "figures"
        for folder in (audio, figures):
            folder.mkdir(exist_ok=True)
        for number, place in enumerate(evenly_spread(len(pairs), self.count).tolist()):
            latents = torch.stack(pairs[place]).to(device)
            with torch.inference_mode(), evaluating(trainer.learner.eval_model) as model:
                fusion, wavs, rest = model(*latents.split(1)), self.codec.decode(latents), None
                if self.manifest:
                    rest = left_out(self.codec, self.load(pairs.pair_id(place)).to(device), latents)
                    wavs = wavs[..., : rest.shape[-1]] + rest
                fusion = fusion._replace(latents=fusion.latents.float())
                wavs = [*wavs.cpu(), decode_fusion(self.codec, fusion, latents, rest, wavs.shape[-1])[0].cpu()]
            for name, wav in zip(("input", "target", when), wavs, strict=True):
                save_audio(audio / f"pair_{number}_{name}.wav", wav)
            figure = plots.waveforms_and_mels(dict(zip(("input", "target", "output"), wavs, strict=True)))
            figure.savefig(figures / f"pair_{number}_{when}.png")
            plt.close(figure)

    def load(self, pair_id: str) -> torch.Tensor:
        """Both clips of a pair of the manifest, `[2, 1, N]`, as long as the shorter one."""
        (pair,) = (pair for pair in self.manifest.pairs if pair.id == pair_id)
        clips = pair.input, pair.target
        length = min(clip.length for clip in clips)
        return torch.stack([load_audio(self.manifest.path(clip), clip.offset, length) for clip in clips])


class TensorBoard(Callback):
    """Every number of metrics.jsonl as a curve: `tensorboard --logdir outputs`."""

    def on_start(self, trainer: Trainer) -> None:
        self.writer = SummaryWriter(str(trainer.run.path / "tensorboard"), purge_step=trainer.step + 1)

    def on_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, float):
                self.writer.add_scalar(f"{row['split']}/{name}", value, row["step"])

    on_validation = on_step

    def on_end(self, trainer: Trainer) -> None:
        self.writer.close()
