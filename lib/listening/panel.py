"""The listening panel: a pair of clips and its fusion by one or several runs; headless, the masks of one pair."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ipywidgets import Checkbox, Dropdown, FloatSlider, Image, Label, VBox
from matplotlib.figure import Figure
from torch import Tensor

from lib.audio.decode import NAMES, resample
from lib.audio.files import SAMPLE_RATE
from lib.audio.plots import mel_power, mixing_maps
from lib.codec.codec import Codec
from lib.data.pairs import Clip, Manifest, load_pair, whole_clip
from lib.evaluation.baselines import recipes
from lib.listening.player import Players, PlayerWidget
from lib.listening.render import Rendition, Settings, render
from lib.listening.widgets import CONTROL, PICTURE, SLIDER, Message, Several, Upload, describe_clip, figure_png, observe
from lib.model.fusion import FusionModel, load_model
from lib.model.masks import apply_mask
from lib.model.whole_band import left_out
from lib.superres import mel
from lib.superres.resolver import Restoration, SuperResolver, band_edge
from lib.training.run import Run

UPLOADED = "uploaded files"  # the choice beside the validation pairs
BLENDS = {"the masks": 0.0, "blended by half with 0.5": 0.5, "0.5 everywhere": 1.0}  # what a headless run shows


class Listening:
    """Validation pairs and uploaded files, fused by runs that share a codec."""

    def __init__(self, codec: Codec, manifest: Manifest, runs: Mapping[str, Run], uploads: Path, superres: Path):
        """`runs`: name → run; the first is selected at the start. `uploads`: folder that keeps uploaded files, which
        recipes name. `superres`: folder of the super-resolver, which notebook 06 may not have trained yet."""
        self.codec, self.runs, self.uploads, self.superres = codec, dict(runs), uploads, superres
        self.clip_length = manifest.clip_length
        pairs = [(pair.input, pair.target) for pair in manifest.split("val")]
        self.pairs = {describe_pair(*pair): tuple(whole_clip(manifest, clip) for clip in pair) for pair in pairs}
        self.clips = {describe_clip(clip): whole_clip(manifest, clip) for pair in pairs for clip in pair}
        self.models: dict[str, tuple[int, FusionModel]] = {}

    def model(self, run: str) -> FusionModel:
        """The best model of a run: loaded at the first call, and again once another training has replaced it."""
        path = self.runs[run].path
        meta = path / "best" / "meta.json"
        written = meta.stat().st_mtime_ns if meta.exists() else 0  # without one, loading says what is wrong
        if self.models.get(run, (None,))[0] != written:
            self.models[run] = written, load_model(Run.open(path), codec_fingerprint=self.codec.fingerprint)
        return self.models[run][1]

    def compare(
        self, input: Clip, target: Clip, runs: Sequence[str], settings: Settings | None = None, restored: bool = False
    ) -> tuple[Players, dict[str, tuple[Tensor, Tensor]]]:
        """A pair beside its fusion by each run and by hand: the plain average and HPSS, through the codec. And for each
        run with masks, mel powers `[80, F]` of what it took from both. `restored`: at 48 kHz, with an upper band."""
        pair = load_pair(input, target)
        wavs, parts = dict(zip(("input", "target"), pair, strict=True)), {}
        for run in runs:
            rendition = render(self.model(run), self.codec, *pair, settings)
            wavs["output" if len(runs) == 1 else f"output: {run}"] = rendition.wav
            if rendition.masks is not None:
                parts[run] = taken(self.model(run), self.codec, rendition)
        with torch.inference_mode():
            for name, wav in by_hand(input, target).items():
                latents = self.codec.encode(wav[None])
                rest = left_out(self.codec, wav[None], latents) if (settings or Settings()).whole_band else 0
                wavs[name] = (self.codec.decode(latents, length=wav.shape[-1]) + rest)[0]
        return (Players(self.restore(wavs), mel.SAMPLE_RATE) if restored else Players(wavs)), parts

    def restore(self, wavs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The clips at 48 kHz, the outputs with a restored upper band."""
        resolver = SuperResolver(self.superres)
        found = {name: resample(wav, SAMPLE_RATE, mel.SAMPLE_RATE) for name, wav in wavs.items()}
        for name in found:
            if name.startswith("output") and (edge := band_edge(wavs[name], SAMPLE_RATE)):
                found[name] = resolver.restore_signal(found[name], Restoration(cutoff=edge))
        return found

    def blends(self) -> Figure | None:
        """What the first run takes from which clip of the first pair, masks blended with 0.5; None without masks."""
        pair = load_pair(*next(iter(self.pairs.values())))
        model = self.model(next(iter(self.runs)))
        if model.masking.masking == "none":
            return None
        blended = {title: Settings(mask_blend=blend) for title, blend in BLENDS.items()}
        shown = {title: taken(model, self.codec, render(model, self.codec, *pair, s)) for title, s in blended.items()}
        return mixing_maps(shown, pair[0].shape[-1] / SAMPLE_RATE)

    def panel(self) -> VBox:
        """The live panel."""
        return _Panel(self).box


@functools.lru_cache(maxsize=8)  # a slider plays the same pair again and again
def by_hand(input: Clip, target: Clip) -> dict[str, Tensor]:
    """What needs no model, `[1, N]`."""
    pair = load_pair(input, target)
    return {"plain average": (pair[0] + pair[1]) / 2} | recipes(*pair, {})


@torch.inference_mode()
def taken(model: FusionModel, codec: Codec, rendition: Rendition) -> tuple[Tensor, Tensor]:
    """Mel powers `[80, F]` of the masked input and of the masked target, each decoded separately."""
    restored = itertools.repeat(model.masking.restore_rms)
    masked = map(apply_mask, rendition.latents, rendition.masks, restored)
    return tuple(mel_power(codec.decode(latents)[0]) for latents in masked)


def describe_pair(input: Clip, target: Clip) -> str:
    return f"{describe_clip(input)} + {describe_clip(target)}"


class _Panel:
    """The widgets of a panel and what they do."""

    def __init__(self, listening: Listening):
        self.listening = listening
        names = list(listening.runs)
        self.pair = Dropdown(options=[*listening.pairs, UPLOADED], description="pair", **CONTROL)
        self.files = {role: Upload(role, listening.uploads, listening.clip_length) for role in ("input", "target")}
        self.runs = Several("runs", names, names[0], rows=min(5, max(2, len(names))))
        self.blend = FloatSlider(0, min=0, max=1, step=0.05, description="blend masks with 0.5", **SLIDER)
        self.whole = Checkbox(True, description="whole band, beyond the codec's", **CONTROL)
        can_restore = (listening.superres / "diffusion" / "best").exists()
        upper_band = "restore the outputs' upper band (48 kHz)"
        upper_band += "" if can_restore else ": needs notebook 06, which trains the super-resolver"
        self.restored = Checkbox(False, description=upper_band, disabled=not can_restore, **CONTROL)
        self.message = Message()
        self.uploads = VBox([file.box for file in self.files.values()])
        self.playing = Label()  # which pair the players hold
        self.players, self.masks = PlayerWidget(), Image(**PICTURE)
        controls = (self.pair, self.uploads, self.runs, self.blend, self.whole, self.restored, self.message)
        self.box = VBox([*controls, self.playing, self.players, self.masks])
        uploads = [control for file in self.files.values() for control in (file.button, file.begin)]
        observe((self.pair, self.runs, self.blend, self.whole, self.restored, *uploads), self.redraw)
        self.redraw()

    def redraw(self, change: Any = None) -> None:
        title, uploaded = self.pair.value, self.pair.value == UPLOADED
        self.uploads.layout.display = None if uploaded else "none"
        with self.message.show_errors():
            clips = [file.clip() for file in self.files.values()] if uploaded else self.listening.pairs[title]
            if None in clips:
                return self.message.say(f"Choose two audio files: {NAMES}.")
            if uploaded:
                title = " + ".join(f"{file.name.value} from {file.begin.value:g} s" for file in self.files.values())
            settings = Settings(mask_blend=self.blend.value, whole_band=self.whole.value)
            players, parts = self.listening.compare(*clips, self.runs.chosen(), settings, self.restored.value)
            self.players.html = players._repr_html_()
            self.playing.value = f"playing {title}"
            self.masks.layout.display = None if parts else "none"
            if parts:
                titles = {f"taken by {run}": powers for run, powers in parts.items()}
                self.masks.value = figure_png(mixing_maps(titles, players.seconds))
        return None
