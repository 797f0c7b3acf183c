"""The listening panel: a pair of clips and what one or several runs make of it, to listen to and to look at.

Where the front end shows no widgets, `Listening.blends` shows the masks of one pair instead.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib.audio.files import SAMPLE_RATE, resample
from lib.audio.plots import mel_power, mixing_maps
from lib.codec.codec import Codec
from lib.data.pairs import Clip, Manifest
from lib.listening.player import Players, PlayerWidget
from lib.listening.render import Rendition, Settings, load_pair, render
from lib.listening.widgets import CONTROL, PICTURE, SLIDER, Message, Upload, describe_clip, figure_png, observe
from lib.model.fusion import FusionModel, load_model
from lib.model.masks import apply_mask
from lib.superres import mel
from lib.superres.resolver import Restoration, SuperResolver, band_edge
from lib.training.run import Run
from lib.util.errors import UserError

UPLOADED = "uploaded files"  # the choice beside the validation pairs
BLENDS = {"the masks": 0.0, "blended by half with 0.5": 0.5, "0.5 everywhere": 1.0}  # what a headless run shows
PREVIEW_STEPS = 20  # of the super-resolver's sampler, so that a listener does not wait long


class Listening:
    """Validation pairs and uploaded files, fused by runs that share a codec."""

    def __init__(
        self, codec: Codec, manifest: Manifest, runs: Mapping[str, Run], uploads: str | Path, superres: str | Path
    ):
        """`runs`: name → run; the first one is selected at the start. `uploads`: folder that keeps uploaded files, so
        that a recipe can name them. `superres`: folder of the super-resolver, which notebook 06 may not have trained
        yet."""
        self.codec, self.runs, self.uploads, self.superres = codec, dict(runs), Path(uploads), Path(superres)
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
            model = load_model(Run.open(path), "best", codec_fingerprint=self.codec.fingerprint)
            self.models[run] = written, model
        return self.models[run][1]

    def compare(
        self, input: Clip, target: Clip, runs: Sequence[str], settings: Settings | None = None, restored: bool = False
    ) -> tuple[Players, dict[str, tuple[Tensor, Tensor]]]:
        """A pair beside its fusion by each run and the plain average of both clips; and for each run with masks, mel
        powers `[80, F]` of what it took from input and target.

        The average goes through the codec like the fusions, so that all have the same band; input and target are the
        originals. `restored`: everything at 48 kHz, the outputs with a restored upper band.
        """
        pair = load_pair(input, target)
        wavs, parts = dict(zip(("input", "target"), pair, strict=True)), {}
        for run in runs:
            rendition = render(self.model(run), self.codec, *pair, settings)
            wavs["output" if len(runs) == 1 else f"output: {run}"] = rendition.wav
            if rendition.masks is not None:
                parts[run] = taken(self.codec, rendition)
        with torch.inference_mode():
            latents = self.codec.encode((pair[0] + pair[1])[None] / 2)
            wavs["plain average"] = self.codec.decode(latents, length=pair[0].shape[-1])[0]
        return (Players(self.restore(wavs), mel.SAMPLE_RATE) if restored else Players(wavs)), parts

    def restore(self, wavs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The clips at 48 kHz, the outputs with a restored upper band."""
        resolver = SuperResolver(self.superres)
        found = {name: resample(wav, SAMPLE_RATE, mel.SAMPLE_RATE) for name, wav in wavs.items()}
        for name in found:
            if name.startswith("output") and (edge := band_edge(wavs[name], SAMPLE_RATE)):
                found[name] = resolver.restore_signal(found[name], Restoration(PREVIEW_STEPS, cutoff=edge))
        return found

    def blends(self) -> Figure | None:
        """What the first run takes from which clip of the first pair, its masks blended with 0.5; None without
        masks."""
        pair = load_pair(*next(iter(self.pairs.values())))
        model = self.model(next(iter(self.runs)))
        shown = {}
        for title, blend in BLENDS.items():
            rendition = render(model, self.codec, *pair, Settings(mask_blend=blend))
            if rendition.masks is not None:
                shown[title] = taken(self.codec, rendition)
        return mixing_maps(shown, pair[0].shape[-1] / SAMPLE_RATE) if shown else None

    def panel(self) -> ipywidgets.Widget:
        """The live panel."""
        return _Panel(self).box


@torch.inference_mode()
def taken(codec: Codec, rendition: Rendition) -> tuple[Tensor, Tensor]:
    """Mel powers `[80, F]` of the masked input and of the masked target, each decoded separately."""
    masked = map(apply_mask, rendition.latents, rendition.masks)
    return tuple(mel_power(codec.decode(latents)[0]) for latents in masked)


def whole_clip(manifest: Manifest, clip: Clip) -> Clip:
    """The clip with the full path of its file instead of the path within the data folder."""
    return dataclasses.replace(clip, path=str(manifest.path(clip)))


def describe_pair(input: Clip, target: Clip) -> str:
    return f"{describe_clip(input)} + {describe_clip(target)}"


class _Panel:
    """The widgets of a panel and what they do."""

    def __init__(self, listening: Listening):
        self.listening = listening
        names = list(listening.runs)
        self.pair = ipywidgets.Dropdown(options=[*listening.pairs, UPLOADED], description="pair", **CONTROL)
        self.files = {role: Upload(role, listening.uploads, listening.clip_length) for role in ("input", "target")}
        self.runs = ipywidgets.SelectMultiple(
            options=names, value=names[:1], rows=min(5, max(2, len(names))), description="runs (one or more)", **CONTROL
        )
        self.blend = ipywidgets.FloatSlider(0, min=0, max=1, step=0.05, description="blend masks with 0.5", **SLIDER)
        upper_band = "restore the outputs' upper band (48 kHz)"
        can_restore = (listening.superres / "diffusion" / "best").exists()
        if not can_restore:
            upper_band += ": needs notebook 06, which trains the super-resolver"
        self.restored = ipywidgets.Checkbox(False, description=upper_band, disabled=not can_restore, **CONTROL)
        self.message = Message()
        self.uploads = ipywidgets.VBox([file.box for file in self.files.values()])
        self.playing = ipywidgets.Label()  # which pair the players hold
        self.players = PlayerWidget()
        self.masks = ipywidgets.Image(**PICTURE)
        controls = (self.pair, self.uploads, self.runs, self.blend, self.restored, self.message)
        self.box = ipywidgets.VBox([*controls, self.playing, self.players, self.masks])
        uploads = [control for file in self.files.values() for control in (file.button, file.begin)]
        observe((self.pair, self.runs, self.blend, self.restored, *uploads), self.redraw)
        self.redraw()

    def chosen(self) -> tuple[Clip, Clip] | None:
        """The clips to play; None while a file is missing."""
        if self.pair.value != UPLOADED:
            return self.listening.pairs[self.pair.value]
        clips = tuple(file.clip() for file in self.files.values())
        return None if None in clips else clips

    def title(self) -> str:
        if self.pair.value != UPLOADED:
            return self.pair.value
        return " + ".join(f"{file.name.value} from {file.begin.value:g} s" for file in self.files.values())

    def redraw(self, change: Any = None) -> None:
        self.uploads.layout.display = None if self.pair.value == UPLOADED else "none"
        with self.message.show_errors():
            clips = self.chosen()
            if clips is None:
                return self.message.say("Choose two audio files: WAV, FLAC, OGG or MP3.")
            if not self.runs.value:
                raise UserError("runs: none is selected; click one, or several with Ctrl")
            settings = Settings(mask_blend=self.blend.value)
            players, parts = self.listening.compare(*clips, self.runs.value, settings, self.restored.value)
            self.players.html = players._repr_html_()
            self.playing.value = "playing " + self.title()
            self.masks.layout.display = None if parts else "none"
            if parts:
                titles = {f"taken by {run}": powers for run, powers in parts.items()}
                self.masks.value = figure_png(mixing_maps(titles, players.seconds))
        return None
