"""What every panel is built from: styles, messages, pictures, uploaded files, and whether a front end shows widgets."""

import contextlib
import dataclasses
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import display
from markupsafe import Markup
from matplotlib.figure import Figure

from lib.audio.decode import AudioError
from lib.audio.files import AUDIO_SUFFIXES, MIN_SAMPLES, SAMPLE_RATE, AudioReport, check_audio
from lib.data.pairs import Clip
from lib.util.errors import UserError
from lib.util.files import make_folder, write_atomic

CONTROL = {"style": {"description_width": "11rem"}, "layout": {"width": "30rem", "max_width": "100%"}}
SLIDER = {"continuous_update": False, **CONTROL}  # redraws once the handle is released
PICTURE = {"format": "png", "layout": {"max_width": "100%", "align_self": "flex-start"}}


def can_show_widgets() -> bool:
    """Whether a front end in a browser sent the cell that runs now. Papermill, nbval and nbconvert send cells through
    jupyter_client, whose message ids end in _<process>_<number>; JupyterLab and similar front ends use other ids."""
    kernel = getattr(get_ipython(), "kernel", None)
    message_id = kernel.get_parent().get("header", {}).get("msg_id", "") if kernel else ""
    return bool(message_id) and re.search(r"_\d+_\d+$", message_id) is None


def show(panel: Callable[[], ipywidgets.Widget], instead: Any) -> Any:
    """Display a live panel where the front end can show one; otherwise return what a headless run shows instead."""
    return display(panel()) if can_show_widgets() else instead


def choose(what: str, options: Mapping[str, Any]) -> Any:
    """Something whose `value` is one of the options: a list where the front end can show one; otherwise the first."""
    if not can_show_widgets():
        return SimpleNamespace(value=next(iter(options.values())))
    display(listed := ipywidgets.Dropdown(options=list(options.items()), description=what, **CONTROL))
    return listed


def observe(controls: Iterable[ipywidgets.Widget], redraw: Callable[[Any], None]) -> None:
    for control in controls:
        control.observe(redraw, names="value")


def figure_png(figure: Figure) -> bytes:
    """A figure as PNG; closes it."""
    content = io.BytesIO()
    figure.savefig(content)
    plt.close(figure)
    return content.getvalue()


class Several(ipywidgets.SelectMultiple):
    """A list to select one or more names from."""

    def __init__(self, what: str, options: Sequence[str], first: str, rows: int):
        super().__init__(options=options, value=(first,), rows=rows, description=f"{what} (one or more)", **CONTROL)
        self.what = what

    def chosen(self) -> tuple[str, ...]:
        """`UserError` if none is."""
        if not self.value:
            raise UserError(f"{self.what}: none is selected; click one, or several with Ctrl")
        return self.value


class Message(ipywidgets.HTML):
    """A line under the controls that says what is missing or wrong."""

    def say(self, text: str, *, problem: bool = False) -> None:
        role, colour = ("alert", "var(--jp-error-color1, #b00020)") if problem else ("status", "inherit")
        self.value = str(Markup('<p role="{}" style="color: {}">{}</p>').format(role, colour, text))

    @contextlib.contextmanager
    def show_errors(self) -> Iterator[None]:
        """Clear the message before the block; show a `UserError` that the block raises."""
        self.value = ""
        try:
            yield
        except UserError as error:
            self.say(str(error), problem=True)


class Upload:
    """A button to upload a file with, and the second at which the clip begins; the file is kept in `folder`."""

    def __init__(self, role: str, folder: Path, clip_length: int):
        self.folder, self.clip_length = folder, clip_length
        self.button = ipywidgets.FileUpload(accept=",".join(AUDIO_SUFFIXES), multiple=False, description=f"{role} file")
        style = {"description_width": "initial"}
        self.begin = ipywidgets.BoundedFloatText(0, min=0, max=1e6, step=1, description="from second", style=style)
        self.name = ipywidgets.Label()
        self.file: dict[str, Any] | None = None  # the newest one; checked once, not at every redraw
        self.report: AudioReport | None = None
        self.box = ipywidgets.HBox([self.button, self.begin, self.name])

    def clip(self) -> Clip | None:
        """The chosen clip, of `clip_length` samples or fewer; None without a file, `UserError` for a bad one."""
        if not self.button.value:
            return None
        (file,) = self.button.value
        if self.report is None or file is not self.file:
            self.file, self.report, self.name.value = file, None, file["name"]
            self.report = keep_upload(file["name"], bytes(file["content"]), self.folder)
        report, offset = self.report, round(self.begin.value * SAMPLE_RATE)
        length = min(self.clip_length, report.num_samples - offset)
        if length < MIN_SAMPLES:
            seconds = report.num_samples / SAMPLE_RATE
            raise UserError(f"{file['name']}: is only {seconds:.1f} s long; begin before second {self.begin.value:g}")
        return Clip(str(report.path), offset, length, report.sha256)


def keep_upload(name: str, content: bytes, folder: Path) -> AudioReport:
    """Store an uploaded file under its content's hash and its own name; `AudioError` for a file that cannot be used."""
    path = folder / f"{hashlib.sha256(content).hexdigest()[:12]}_{plain_name(Path(name).name)}"
    if not path.exists():
        make_folder(folder)
        write_atomic(path, content)
    try:
        return check_audio(path)
    except AudioError as error:
        path.unlink()
        raise AudioError(name, error.problem) from None  # under the name that its owner knows


def uploaded_clips(folder: Path, length: int) -> dict[str, Clip]:
    """Name → clip of every uploaded file: its first `length` samples, or all of a shorter one."""
    clips = {}
    for path in sorted(folder.glob("*")):
        with contextlib.suppress(AudioError):  # any other file in the folder
            report = check_audio(path)
            clip = Clip(str(path), 0, min(length, report.num_samples), report.sha256)
            name = path.name.partition("_")[2] or path.name  # without its hash
            clips[describe_clip(dataclasses.replace(clip, path=name))] = clip
    return clips


def plain_name(name: str, most: int = 100) -> str:
    """A name of letters, digits, '.', '_' and '-' only, valid in any folder; the last `most` bytes of a longer one."""
    return re.sub(r"[^\w.-]+", "_", name).encode()[-most:].decode(errors="ignore")


def describe_clip(clip: Clip) -> str:
    """'song_04.wav 4–8 s'."""
    return f"{clip.path} {clip.offset / SAMPLE_RATE:.4g}–{(clip.offset + clip.length) / SAMPLE_RATE:.4g} s"
