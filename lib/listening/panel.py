"""The listening panel: a pair of clips and its fusion by one or several runs; headless, the masks of one pair."""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from ipywidgets import Image, Label, VBox
from matplotlib.figure import Figure
from torch import Tensor
from traitlets import Dict, HasTraits

from lib.audio.files import check_audio
from lib.audio.plots import mel_power, mixing_maps
from lib.codec.codec import Codec, decoded
from lib.data.pairs import Clip, Manifest, Pair, load_pair, whole_clip
from lib.evaluation.baselines import recipes
from lib.listening import widgets as ui
from lib.listening.player import Players, PlayerWidget
from lib.listening.render import Rendition, Settings, render
from lib.listening.widgets import describe_clip, step, uploaded_clips
from lib.model.fusion import FusionModel, load_model
from lib.model.masks import apply_mask
from lib.model.whole_band import leaves_out, left_out
from lib.superres import mel
from lib.superres.degradation import LOWEST
from lib.superres.resolver import FULL, Restoration, SuperResolver, band_edge
from lib.training.run import Run

checked = functools.lru_cache(maxsize=16)(check_audio)
UPLOADED = "uploaded files"  # the choice beside the validation pairs
BLENDS = {"the masks": 0.0, "blended by half with 0.5": 0.5, "0.5 everywhere": 1.0}  # what a headless run shows


class Listening(HasTraits):
    """Validation pairs and uploaded files, fused by runs that share a codec."""

    clips = Dict()  # by name, those that are uploaded meanwhile included

    def __init__(self, codec: Codec, manifest: Manifest, runs: Mapping[str, Run], uploads: Path, superres: Path):
        """`manifest`: of clips at the codec's rate. `runs`: name → run; the first is selected at the start. `uploads`:
        folder that keeps uploaded files, which recipes name. `superres`: folder of the super-resolver, which notebook
        06 may not have trained yet."""
        super().__init__()
        self.codec, self.runs, self.uploads, self.superres = codec, dict(runs), uploads, superres
        self.clip_length, self.root = manifest.clip_length, manifest.root
        pairs = {marked(pair): (pair.input, pair.target) for pair in manifest.split("val")}
        self.pairs = {name: tuple(whole_clip(manifest, clip) for clip in pair) for name, pair in pairs.items()}
        self.clips = {describe_clip(clip): whole_clip(manifest, clip) for pair in pairs.values() for clip in pair}
        self.offer_uploads()
        self.load = functools.lru_cache(maxsize=16)(
            lambda path, saved: load_model(Run.open(path), codec_fingerprint=codec.fingerprint)
        )
        self.pair_of = functools.partial(load_pair, channels=codec.channels)
        self.render = functools.lru_cache(maxsize=8)(  # what a playground plays beside the next variant
            lambda model, input, target, settings: render(model, codec, *self.pair_of(input, target), settings)
        )

    def offer_uploads(self) -> None:
        self.clips = self.clips | uploaded_clips(self.uploads, self.clip_length, self.codec.sample_rate)

    def model(self, run: str) -> FusionModel:
        """The best model of a run: loaded at the first call, and again once another training has replaced it."""
        path = self.runs[run].path
        meta = path / "best" / "meta.json"
        return self.load(path, meta.stat().st_mtime_ns if meta.exists() else 0)  # without one, it says what is wrong

    def compare(
        self, input: Clip, target: Clip, outputs: Mapping[str, tuple[str, Settings]], restored: bool = False
    ) -> tuple[Players, dict[str, tuple[Tensor, Tensor]], dict[str, Rendition]]:
        """A pair beside its fusions, by name, each by a run with settings, and by hand: the plain average and HPSS,
        through the codec. For each output with masks, mel powers `[80, F]` of what it took from both. And all that was
        rendered. `restored`: at 48 kHz, with an upper band."""
        wavs, parts, found = dict(zip(("input", "target"), self.pair_of(input, target), strict=True)), {}, {}
        for name, (run, settings) in outputs.items():
            step(f"fusing: {name}")
            model = self.model(run)
            found[name] = self.render(model, input, target, settings)
            wavs[name] = found[name].wav
            if found[name].masks is not None:
                parts[name] = taken(model, self.codec, found[name])
        step("plain average and HPSS")
        with torch.inference_mode():
            for name, wav in by_hand(input, target, self.codec.channels).items():
                latents = self.codec.encode(wav[None])
                rest = left_out(self.codec, wav[None], latents) if settings.whole_band else 0
                wavs[name] = (self.codec.decode(latents, length=wav.shape[-1]) + rest)[0]
        step("players")
        players = Players(wavs, self.codec.sample_rate)
        return (self.restore(players) if restored else players), parts, found

    def restore(self, players: Players) -> Players:
        """The clips at 48 kHz, the outputs with a restored upper band, which both clips limit as in `lib.fuse`."""
        resolver, found = SuperResolver(self.superres), players.resampled(mel.SAMPLE_RATE)
        edges = {name: band_edge(players.wavs[name], players.sample_rate) for name in ("input", "target")}
        sources = [(found[name], max(edge, LOWEST)) for name, edge in edges.items()]
        for name, wav in players.wavs.items():
            if name.startswith("output") and 0 < (edge := band_edge(wav, players.sample_rate)) <= FULL:
                step(f"upper band of the {name}")
                found[name] = resolver.restore_signal(found[name], Restoration(cutoff=edge), sources)
        return Players(found, mel.SAMPLE_RATE)

    def blends(self) -> Figure | None:
        """What the first run takes from which clip of the first pair, masks blended with 0.5; None without masks."""
        run, first = next(iter(self.runs)), next(iter(self.pairs.values()))
        blended = {title: (run, Settings(mask_blend=blend)) for title, blend in BLENDS.items()}
        players, parts, _ = self.compare(*first, blended)
        return mixing_maps(parts, players.seconds) if parts else None

    def panel(self) -> VBox:
        """The live panel."""
        return _Panel(self)


@functools.lru_cache(maxsize=8)  # a slider plays the same pair again and again
def by_hand(input: Clip, target: Clip, channels: int) -> dict[str, Tensor]:
    """What needs no model, `[channels, N]`."""
    pair = load_pair(input, target, channels)
    return {"plain average": (pair[0] + pair[1]) / 2} | recipes(*pair, {})


@torch.inference_mode()
def taken(model: FusionModel, codec: Codec, rendition: Rendition) -> tuple[Tensor, Tensor]:
    """Mel powers `[80, F]` of the masked input and of the masked target, each decoded separately, at 24 kHz."""
    restored = itertools.repeat(model.masking.restore_rms)
    masked = map(apply_mask, rendition.latents, rendition.masks, restored)
    return tuple(mel_power(decoded(codec, latents)[0]) for latents in masked)


def describe_pair(input: Clip, target: Clip) -> str:
    return f"{describe_clip(input)} + {describe_clip(target)}"


def marked(pair: Pair) -> str:
    return f"{pair.mode}: {describe_pair(pair.input, pair.target)}"


class Comparing(VBox):
    """Any panel that compares clips, rendered again with each change: players, and what was taken from which clip."""

    def __init__(self):
        super().__init__()
        self.work, self.players, self.masks = ui.Work(), PlayerWidget(), Image(**ui.PICTURE)

    def show(self, players: Players, parts: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Show what `Listening.compare` returns first."""
        html, masks = players._repr_html_(), ui.figure_png(mixing_maps(parts, players.seconds)) if parts else b""
        step("showing it")
        self.players.html, self.masks.value = html, masks
        self.masks.layout.display = None if parts else "none"


class _Panel(Comparing):
    """The live panel and what its widgets do."""

    def __init__(self, listening: Listening):
        super().__init__()
        self.listening, self.chosen = listening, True
        kept = listening.uploads, listening.clip_length, listening.codec.sample_rate
        self.files = [ui.Upload(role, *kept) for role in ("input", "target")]
        self.controls = ui.controls("listening", runs=listening.runs, pair=[*listening.pairs, UPLOADED])
        search, self.pair, self.runs, *others = self.controls.values()
        self.runs.value = self.runs.options[:1]
        if not (listening.superres / "diffusion" / "best").exists():
            restored = self.controls["restored"]
            restored.disabled, restored.layout.width = True, "auto"
            restored.description += ": needs notebook 06, which trains the super-resolver"
        self.playing, self.greyed = Label(), Label()  # which pair the players hold; why controls are disabled
        above = (*self.files, *self.controls.values(), self.greyed, self.work, self.playing)
        self.children = (*above, self.players, self.masks)
        ui.observe([file.button for file in self.files], self.keep)
        ui.observe([search], self.find)
        ui.observe([self.runs], self.fit)
        self.fit()
        ui.observe([self.pair], self.choose)
        ui.observe((self.runs, *others, *(file.begin for file in self.files)), self.redraw)
        self.choose()

    def keep(self, change: Any) -> None:
        """Keep a file that arrives, offer it to the playground, and play it."""
        if not change["new"]:
            return
        with self.work.message.show_errors(), self.choosing():
            next(file for file in self.files if file.button is change["owner"]).keep()
            self.listening.offer_uploads()
            self.pair.value = UPLOADED

    def choose(self, change: Any = None) -> None:
        """Play a pair, from where its clips begin in their files, or the uploaded files."""
        with self.work.message.show_errors(), self.choosing():
            if self.pair.value == UPLOADED:
                for file in self.files:
                    file.hold(*file.uploaded)
                return
            for file, clip in zip(self.files, self.listening.pairs[self.pair.value], strict=True):
                name = Path(clip.path).relative_to(self.listening.root).as_posix()
                file.hold(ui.all_of(checked(clip.path), clip.sample_rate), name, clip.offset)
                file.button.value = ()

    @contextlib.contextmanager
    def choosing(self) -> Iterator[None]:
        """Render once, when all is chosen."""
        outer, self.chosen = self.chosen, False
        try:
            yield
        finally:
            self.chosen = outer
        self.redraw()

    def fit(self, change: Any = None) -> None:
        """Offer to blend masks only where there are some, and the whole band only of a codec that leaves one out."""
        blend, whole_band = (self.controls[name] for name in ("blend", "whole_band"))
        with self.work.message.show_errors():
            models = [self.listening.model(run) for run in ui.chosen(self.runs)]
            blend.disabled = all(model.masking.masking == "none" for model in models)
        whole_band.disabled = not leaves_out(self.listening.codec)
        why = ["blending: no chosen run has masks"] * blend.disabled
        why += ["whole band: this codec's channels are no bands"] * whole_band.disabled
        self.greyed.value = f"Greyed: {'; '.join(why)}." if why else ""

    def find(self, change: Any) -> None:
        """Offer the pairs that have all words, or all pairs where none has."""
        words, playing = change["new"].lower().split(), self.pair.value
        found = [name for name in self.listening.pairs if all(word in name.lower() for word in words)]
        change["owner"].description = f"find pairs ({len(found)} found)"
        self.pair.options = [*(found or self.listening.pairs), UPLOADED]
        self.pair.value = playing if playing in self.pair.options else self.pair.options[0]

    def redraw(self, change: Any = None) -> None:
        if self.chosen:
            self.work.start(self.render)

    def render(self) -> None:
        blend, whole_band, restored = (self.controls[name].value for name in ("blend", "whole_band", "restored"))
        clips, title = [file.clip() for file in self.files], " + ".join(file.part() for file in self.files)
        runs, settings = ui.chosen(self.runs), Settings(mask_blend=blend, whole_band=whole_band)
        outputs = {f"output: {run}" if len(runs) > 1 else "output": (run, settings) for run in runs}
        self.show(*self.listening.compare(*clips, outputs, restored)[:2])
        self.playing.value = f"playing {title}"
