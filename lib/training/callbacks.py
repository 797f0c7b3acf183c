"""A callback of training: clips to listen to."""

import matplotlib.pyplot as plt
import torch

from lib.audio import plots
from lib.audio.decode import resample
from lib.audio.files import SAMPLE_RATE, save_audio
from lib.codec.codec import Codec
from lib.data.pairs import Manifest, load_pair, whole_clip
from lib.model.whole_band import decode_fusion, left_out
from lib.training.batches import evenly_spread
from lib.training.learner import evaluating
from lib.training.trainer import Callback, Trainer


class DemoClips(Callback):
    """Fuses the same validation pairs every few epochs and at the end, in the whole band. Writes a figure and, at true
    levels, audio/pair_0_input.wav, pair_0_target.wav and the fusion, pair_0_epoch_0010.wav or pair_0_last.wav."""

    def __init__(self, codec: Codec, manifest: Manifest, every: int, count: int = 2):
        self.codec, self.manifest, self.every, self.count = codec, manifest, every, count

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
            (pair,) = (pair for pair in self.manifest.pairs if pair.id == pairs.pair_id(place))
            clips = (whole_clip(self.manifest, clip) for clip in (pair.input, pair.target))
            clips = torch.stack(load_pair(*clips, self.codec.channels))
            with torch.inference_mode(), evaluating(trainer.learner.eval_model) as model:
                fusion, rest = model(*latents.split(1)), left_out(self.codec, clips.to(device), latents)
                fusion = fusion._replace(latents=fusion.latents.float())
                output = decode_fusion(self.codec, fusion, latents, rest, rest.shape[-1])
                wavs = torch.cat([self.codec.decode(latents, length=rest.shape[-1]) + rest, output]).cpu()
            for name, wav in zip(("input", "target", when), wavs, strict=True):
                save_audio(audio / f"pair_{number}_{name}.wav", wav, self.codec.sample_rate)
            wavs = resample(wavs, self.codec.sample_rate, SAMPLE_RATE)
            figure = plots.waveforms_and_mels(dict(zip(("input", "target", "output"), wavs, strict=True)))
            figure.savefig(figures / f"pair_{number}_{when}.png")
            plt.close(figure)
