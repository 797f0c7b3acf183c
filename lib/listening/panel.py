"""The listening panel: a pair, one or several runs, and what they make of it, to hear and to see.

Where the front end shows no widgets, `Listening.blends` has the mask view of one pair instead.
"""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ipywidgets
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib.audio.files import AUDIO_SUFFIXES, MIN_SAMPLES, SAMPLE_RATE, AudioError, AudioReport, check_audio, resample
from lib.audio.plots import mel_power, taken_pictures
from lib.codec.codec import Codec
from lib.data.pairs import Clip, Manifest
from lib.listening.player import Players, PlayerWidget
from lib.listening.render import Rendition, Settings, load_pair, render
from lib.listening.widgets import figure_png
from lib.model.fusion import FusionModel
from lib.model.masks import apply_mask
from lib.superres import mel
from lib.superres.resolver import Restoration, SuperResolver, band_edge
from lib.training.run import Run
from lib.util.errors import UserError
from lib.util.files import make_folder, write_atomic

UPLOADED = "uploaded files"  # the choice beside the validation pairs
BLENDS = {"the masks": 0.0, "blended by half with 0.5": 0.5, "0.5 everywhere": 1.0}  # what a headless run shows
ACCEPT = ",".join(AUDIO_SUFFIXES)
PREVIEW_STEPS = 20  # of the super-resolver's sampler, for an ear that waits
SLIDER = {"style": {"description_width": "11rem"}, "layout": {"width": "30rem", "max_width": "100%"}}


class Heard(NamedTuple):
    """What `listen` returns."""

    wavs: dict[str, Tensor]  # name → [1, N]: input, target, an output for each run, the plain average
    taken: dict[str, tuple[Tensor, Tensor]]  # run with masks → mel powers [80, F] of what it took from either clip
    sample_rate: int = SAMPLE_RATE


def whole_clip(manifest: Manifest, clip: Clip) -> Clip:
    """The clip with its file's own path instead of that within the data folder."""
    return dataclasses.replace(clip, path=str(manifest.path(clip)))


def listen(
    models: Mapping[str, FusionModel], codec: Codec, input: Tensor, target: Tensor, settings: Settings | None = None
) -> Heard:
    """A pair `[1, N]` as the ear compares it: both clips, what each model makes of them, and their plain average.

    The average goes through the codec as the outputs do, so that it has their band; input and target are as they are.
    """
    with torch.inference_mode():
        average = codec.decode(codec.encode((input + target)[None] / 2), length=input.shape[-1])[0]
    outputs, parts = {}, {}
    for name, model in models.items():
        rendition = render(model, codec, input, target, settings)
        outputs["output" if len(models) == 1 else f"output: {name}"] = rendition.wav
        if rendition.masks is not None:
            parts[name] = taken(codec, rendition)
    return Heard({"input": input, "target": target, **outputs, "plain average": average}, parts)


@torch.inference_mode()
def taken(codec: Codec, rendition: Rendition) -> tuple[Tensor, Tensor]:
    """Mel powers `[80, F]` of the masked input and of the masked target, each decoded by itself."""
    masked = map(apply_mask, rendition.latents, rendition.masks)
    return tuple(mel_power(codec.decode(latents)[0]) for latents in masked)


class Models:
    """The best models of runs, by the runs' names: loaded when asked for, and again after another training."""

    def __init__(self, runs: Mapping[str, Run], codec: Codec):
        self.runs, self.codec = runs, codec
        self.loaded: dict[str, tuple[int, FusionModel]] = {}

    def __call__(self, name: str) -> FusionModel:
        path = self.runs[name].path
        meta = path / "best" / "meta.json"
        written = meta.stat().st_mtime_ns if meta.exists() else 0  # without one, loading says what is wrong
        if self.loaded.get(name, (None,))[0] != written:
            model = Run.open(path).load_model("best", codec_fingerprint=self.codec.fingerprint)
            self.loaded[name] = (written, model)
        return self.loaded[name][1]


class Listening:
    """The panel over validation pairs and uploaded files, for runs on one codec's latents."""

    def __init__(
        self,
        codec: Codec,
        manifest: Manifest,
        runs: Mapping[str, Run],
        uploads: str | Path,
        superres: str | Path | None = None,
    ):
        """`manifest`: its validation pairs can be chosen. `runs`: name → run, the first one is chosen at the start.
        `uploads`: folder in which uploaded files are kept, so that a recipe can name them. `superres`: where a
        super-resolver lies, or will once notebook 06 has trained it."""
        self.codec, self.runs, self.uploads = codec, dict(runs), Path(uploads)
        self.superres = superres and Path(superres)
        self.clip_length = manifest.clip_length
        pairs = [(pair.input, pair.target) for pair in manifest.split("val")]
        self.pairs = {describe_pair(*pair): tuple(whole_clip(manifest, clip) for clip in pair) for pair in pairs}
        self.model = Models(self.runs, codec)

    @property
    def can_restore(self) -> bool:
        """Whether there is a super-resolver."""
        return self.superres is not None and (self.superres / "diffusion" / "best").exists()

    def hear(
        self,
        input: Clip,
        target: Clip,
        runs: Iterable[str],
        settings: Settings | None = None,
        *,
        restored: bool = False,
    ) -> Heard:
        """`listen` to clips of files by runs of these names; with `restored` at 48 kHz, outputs with an upper band."""
        heard = listen({name: self.model(name) for name in runs}, self.codec, *load_pair(input, target), settings)
        if not restored:
            return heard
        resolver = SuperResolver(self.superres)
        wavs = {name: resample(wav, SAMPLE_RATE, mel.SAMPLE_RATE) for name, wav in heard.wavs.items()}
        for name in wavs:
            if name.startswith("output") and (edge := band_edge(heard.wavs[name], SAMPLE_RATE)):
                wavs[name] = resolver.restore_signal(wavs[name], Restoration(PREVIEW_STEPS, cutoff=edge))
        return heard._replace(wavs=wavs, sample_rate=mel.SAMPLE_RATE)

    def blends(self, pair: str | None = None) -> Figure | None:
        """What is taken from which clip, the learned masks blended with one half; None for a run without masks."""
        input, target = load_pair(*self.pairs[pair or next(iter(self.pairs))])
        model = self.model(next(iter(self.runs)))
        shown = {}
        for title, blend in BLENDS.items():
            rendition = render(model, self.codec, input, target, Settings(mask_blend=blend))
            if rendition.masks is not None:
                shown[title] = taken(self.codec, rendition)
        return taken_pictures(shown, input.shape[-1] / SAMPLE_RATE) if shown else None

    def panel(self) -> ipywidgets.Widget:
        """The live panel."""
        return _Panel(self).box


class _Panel:
    """The widgets of a panel and what moves them."""

    def __init__(self, listening: Listening):
        self.listening = listening
        self.pair = ipywidgets.Dropdown(options=[*listening.pairs, UPLOADED], description="pair", **SLIDER)
        self.files = {role: Upload(role, listening) for role in ("input", "target")}
        names = list(listening.runs)
        self.runs = ipywidgets.SelectMultiple(
            options=names, value=names[:1], rows=min(5, max(2, len(names))), description="runs (one or more)", **SLIDER
        )
        self.blend = ipywidgets.FloatSlider(
            0, min=0, max=1, step=0.05, description="blend masks with 0.5", continuous_update=False, **SLIDER
        )
        upper_band = "restore the outputs' upper band (48 kHz)"
        if not listening.can_restore:
            upper_band += ": notebook 06 trains what it takes"
        self.restored = ipywidgets.Checkbox(False, description=upper_band, disabled=not listening.can_restore, **SLIDER)
        self.message = Message()
        self.uploads = ipywidgets.VBox([upload.box for upload in self.files.values()])
        self.uploads.layout.display = "none"
        self.heard = ipywidgets.Label()  # which pair the players play
        self.players = PlayerWidget()
        self.masks = ipywidgets.Image(format="png", layout={"max_width": "100%", "align_self": "flex-start"})
        controls = (self.pair, self.uploads, self.runs, self.blend, self.restored, self.message.html)
        self.box = ipywidgets.VBox([*controls, self.heard, self.players, self.masks])
        for control in (self.pair, self.runs, self.blend, self.restored):
            control.observe(self.redraw, names="value")
        for upload in self.files.values():
            upload.on_change(self.redraw)
        self.redraw()

    def chosen(self) -> tuple[Clip, Clip] | None:
        """The clips to hear; None while a file is missing."""
        if self.pair.value != UPLOADED:
            return self.listening.pairs[self.pair.value]
        clips = tuple(upload.clip() for upload in self.files.values())
        return None if None in clips else clips

    def title(self) -> str:
        if self.pair.value != UPLOADED:
            return self.pair.value
        return " + ".join(f"{file.name.value} from {file.begin.value:g} s" for file in self.files.values())

    def redraw(self, change: Any = None) -> None:
        self.uploads.layout.display = None if self.pair.value == UPLOADED else "none"
        with self.message.telling_errors():
            clips = self.chosen()
            if clips is None:
                return self.message.say("Choose two audio files: WAV, FLAC, OGG or MP3.")
            if not self.runs.value:
                raise UserError("runs: none is chosen; click one, or several with Ctrl")
            settings = Settings(mask_blend=self.blend.value)
            heard = self.listening.hear(*clips, self.runs.value, settings, restored=self.restored.value)
            self.players.html = Players(heard.wavs, heard.sample_rate)._repr_html_()
            self.heard.value = "playing " + self.title()
            self.masks.layout.display = None if heard.taken else "none"
            if heard.taken:
                seconds = heard.wavs["input"].shape[-1] / heard.sample_rate
                titles = {f"taken by {name}": found for name, found in heard.taken.items()}
                self.masks.value = figure_png(taken_pictures(titles, seconds))
        return None


class Upload:
    """A file to choose, kept under the name of its content, and the second at which its clip begins."""

    def __init__(self, role: str, listening: Listening):
        self.listening = listening
        self.role = role
        self.button = ipywidgets.FileUpload(accept=ACCEPT, multiple=False, description=f"{role} file")
        self.begin = ipywidgets.BoundedFloatText(
            0, min=0, max=1e6, step=1, description="from second", style={"description_width": "initial"}
        )
        self.name = ipywidgets.Label()
        self.file: dict[str, Any] | None = None  # the newest, and what was found in it, once for all redraws
        self.report: AudioReport | None = None
        self.box = ipywidgets.HBox([self.button, self.begin, self.name])

    def on_change(self, redraw: Any) -> None:
        self.button.observe(redraw, names="value")
        self.begin.observe(redraw, names="value")

    def clip(self) -> Clip | None:
        """The clip that was chosen, of the listening length or shorter. `UserError` says what is wrong with a file."""
        if not self.button.value:
            return None
        (file,) = self.button.value
        if self.report is None or file is not self.file:
            self.file, self.report, self.name.value = file, None, file["name"]
            self.report = check_audio(keep_upload(file["name"], bytes(file["content"]), self.listening.uploads))
        report = self.report
        offset = round(self.begin.value * SAMPLE_RATE)
        length = min(self.listening.clip_length, report.num_samples - offset)
        if length < MIN_SAMPLES:
            seconds = report.num_samples / SAMPLE_RATE
            raise UserError(f"{file['name']}: has {seconds:.1f} s only; begin earlier than {self.begin.value:g} s")
        return Clip(str(report.path), offset, length, report.sha256)


def keep_upload(name: str, content: bytes, folder: Path) -> Path:
    """Store an uploaded file under its own name and its content's hash; `AudioError` unless all of it can be used."""
    path = folder / f"{hashlib.sha256(content).hexdigest()[:12]}_{plain_name(Path(name).name)}"
    if not path.exists():
        make_folder(folder)
        write_atomic(path, content)
    try:
        check_audio(path)
    except AudioError as error:
        path.unlink()
        raise AudioError(name, error.problem) from None  # as its owner knows it
    return path


def uploaded_clips(folder: str | Path, length: int) -> dict[str, Clip]:
    """Name → the first `length` samples of every file that was uploaded, or all of a shorter one."""
    clips = {}
    for path in sorted(Path(folder).glob("*")):
        with contextlib.suppress(AudioError):  # whatever else was put there
            report = check_audio(path)
            clip = Clip(str(path), 0, min(length, report.num_samples), report.sha256)
            name = path.name.partition("_")[2] or path.name
            clips[describe_clip(dataclasses.replace(clip, path=name))] = clip
    return clips


def plain_name(name: str, most: int = 100) -> str:
    """A name of letters, digits, '.', '_' and '-' alone, so that any folder takes it; of a long one, the last bytes."""
    return re.sub(r"[^\w.-]+", "_", name).encode()[-most:].decode(errors="ignore")


class Message:
    """A line under the controls: what is missing, or what is wrong."""

    def __init__(self):
        self.html = ipywidgets.HTML()

    def say(self, text: str, *, problem: bool = False) -> None:
        colour = "var(--jp-error-color1, #b00020)" if problem else "inherit"
        escaped = text.replace("&", "&amp;").replace("<", "&lt;")
        self.html.value = f'<p role="{"alert" if problem else "status"}" style="color: {colour}">{escaped}</p>'

    @contextlib.contextmanager
    def telling_errors(self) -> Iterator[None]:
        """Cleared before the block; a `UserError` in it is told, and what was shown before stays."""
        self.html.value = ""
        try:
            yield
        except UserError as error:
            self.say(str(error), problem=True)


def describe_pair(input: Clip, target: Clip) -> str:
    return f"{describe_clip(input)} + {describe_clip(target)}"


def describe_clip(clip: Clip) -> str:
    """'song_04.wav 4–8 s'."""
    begin, end = (place / SAMPLE_RATE for place in (clip.offset, clip.offset + clip.length))
    return f"{clip.path} {begin:.4g}–{end:.4g} s"
