"""Callbacks of training: clips to listen to, and TensorBoard."""

from typing import Any

import matplotlib.pyplot as plt
import torch
from torch.utils.tensorboard import SummaryWriter

from lib.audio import plots
from lib.audio.files import save_audio
from lib.codec.codec import Codec
from lib.training.batches import evenly_spread
from lib.training.learner import evaluating
from lib.training.trainer import Callback, Trainer


class DemoClips(Callback):
    """Fuses the same validation pairs every few epochs and at the end. Writes audio/pair_0_input.wav,
    audio/pair_0_target.wav and the fusion, audio/pair_0_epoch_0010.wav or audio/pair_0_last.wav, into the run's folder
    at the codec's levels, and a figure of the three into figures/."""

    def __init__(self, codec: Codec, every: int, count: int = 2):
        self.codec, self.every, self.count = codec, every, count

    def on_epoch(self, trainer: Trainer, epoch: int) -> None:
        if epoch % self.every == 0:
            self.write(trainer, f"epoch_{epoch:04d}")

    def on_end(self, trainer: Trainer) -> None:
        if trainer.finished:
            self.write(trainer, "last")

    def write(self, trainer: Trainer, when: str) -> None:
        pairs = trainer.pairs["val"]
        audio, figures = trainer.run.path / "audio", trainer.run.path / "figures"
        for folder in (audio, figures):
            folder.mkdir(exist_ok=True)
        for number, place in enumerate(evenly_spread(len(pairs), self.count).tolist()):
            latents = [clip[None].to(trainer.accelerator.device) for clip in pairs[place]]
            with torch.inference_mode(), evaluating(trainer.learner.eval_model) as model:
                outputs = (*latents, model(*latents).latents.float())
                wavs = [self.codec.decode(x)[0].cpu() for x in outputs]
            for name, wav in zip(("input", "target", when), wavs, strict=True):
                save_audio(audio / f"pair_{number}_{name}.wav", wav)
            figure = plots.waveforms_and_mels(dict(zip(("input", "target", "output"), wavs, strict=True)))
            figure.savefig(figures / f"pair_{number}_{when}.png")
            plt.close(figure)


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
