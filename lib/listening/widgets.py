"""What every panel is built from: styles, messages, pictures, uploaded files, and whether a front end shows widgets."""

import contextlib
import functools
import hashlib
import io
import re
import threading
import tomllib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import display
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from lib.audio.decode import NAMES, AudioError
from lib.audio.files import AUDIO_SUFFIXES, AudioReport, check_audio
from lib.data.pairs import Clip
from lib.util.errors import UserError
from lib.util.files import make_folder, write_atomic

TABLES = tomllib.loads(Path(__file__).with_name("panels.toml").read_text())
CONTROL = {"style": {"description_width": "11rem"}, "layout": {"width": "30rem", "max_width": "100%"}}
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


def observe(controls: Iterable[ipywidgets.Widget], redraw: Callable[[Any], None]) -> None:
    for control in controls:
        control.observe(redraw, names="value")


def figure_png(figure: Figure) -> bytes:
    """A figure as PNG; closes it."""
    content = io.BytesIO()
    figure.savefig(content)
    plt.close(figure)
    return content.getvalue()


def controls(panel: str, **options: Iterable[str]) -> dict[str, ipywidgets.Widget]:
    """The controls of a panel, by name, as panels.toml has them; `options` of its lists, by their names."""
    table = {name: CONTROL | how for name, how in TABLES[panel].items()}
    table |= {name: table[name] | {"options": list(names)} for name, names in options.items()}
    return {name: getattr(ipywidgets, how.pop("kind"))(**how) for name, how in table.items()}


def chosen(control: ipywidgets.SelectMultiple) -> tuple[str, ...]:
    """The selected names; `UserError` if there is none."""
    if not control.value:
        raise UserError(f"{control.description}: none is selected; click one, or several with Ctrl")
    return control.value


class Message(ipywidgets.HTML):
    """A line under the controls that says what is missing or wrong."""

    def say(self, text: str, *, problem: bool = False) -> None:
        role, colour = ("alert", "var(--jp-error-color1, #b00020)") if problem else ("status", "inherit")
        self.value = str(Markup('<p role="{}" style="color: {}">{}</p>').format(role, colour, text))

    @contextlib.contextmanager
    def show_errors(self) -> Iterator[None]:
        """Clear the message before the block; show what the block raises, and raise it unless it is a `UserError`."""
        self.value = ""
        try:
            yield
        except Exception as error:  # a thread would keep it to itself
            self.say(str(error) if isinstance(error, UserError) else repr(error), problem=True)
            if not isinstance(error, UserError):
                raise


class Cancelled(Exception):
    """Ends work that nobody waits for any more."""


STEP = ContextVar("step", default=lambda what: None)


def step(what: str) -> None:
    """Called by slow code before a step, with what it does: a panel shows it, and here its work ends if cancelled."""
    STEP.get()(what)


class Work(ipywidgets.VBox):
    """One piece of work at a time, in a thread where a front end shows widgets; a newer one replaces it at its next
    `step`. Shows that it goes on, a button that cancels it, and what is missing or wrong."""

    THREAD = ThreadPoolExecutor(1)  # of all panels: they share models
    BUSY = threading.Lock()  # while one of them works

    def __init__(self):
        self.message, self.sign = Message(), ipywidgets.HTML()
        self.button = ipywidgets.Button(description="Cancel", icon="times")
        self.button.on_click(self.cancel)
        self.busy = ipywidgets.HBox([self.sign, self.button], layout={"display": "none"})
        super().__init__([self.busy, self.message])

    def start(self, work: Callable[[], None]) -> None:
        self.current = work
        self.say("waiting for another panel" if self.BUSY.locked() else "starting")
        run = functools.partial(copy_context().run, self.do, work)
        self.THREAD.submit(run) if can_show_widgets() else run()

    def cancel(self, button: Any) -> None:
        self.current, self.busy.layout.display = None, "none"
        self.message.say("Cancelled: what plays is what played before, whatever the controls say.")

    def say(self, what: str) -> None:
        self.sign.value, self.busy.layout.display = f"<progress></progress> {escape(what)}", None

    def do(self, work: Callable[[], None]) -> None:
        def show(what: str) -> None:
            if self.current is not work:
                raise Cancelled
            self.say(what)

        STEP.set(show)
        with self.BUSY, self.message.show_errors(), contextlib.suppress(Cancelled):
            try:
                work()
            finally:
                if self.current is work:
                    self.busy.layout.display = "none"


class Upload(ipywidgets.HBox):
    """A button to upload a file with, kept in `folder`, and the second at which the clip of it, or of another file,
    begins."""

    def __init__(self, role: str, folder: Path, clip_length: int, sample_rate: int):
        """`clip_length`: samples at `sample_rate` (Hz), the codec's."""
        self.folder, self.clip_length, self.sample_rate = folder, clip_length, sample_rate
        self.button, self.begin = controls("upload").values()
        self.button.accept, self.button.description = ",".join(AUDIO_SUFFIXES), f"{role} file"
        self.uploaded = self.file, self.name = None, ""  # all of it as a clip, and what its owner calls it
        super().__init__([self.button, self.begin])

    def keep(self) -> None:
        """Keep and hold the file that has arrived. `AudioError` if it cannot be used; then the one before it stays."""
        (file,) = self.button.value
        try:
            report = keep_upload(file["name"], bytes(file["content"]), self.folder)
        except UserError:
            self.button.value = ()  # which counts what it holds; and the same file, uploaded again, is then a change
            raise
        self.uploaded = all_of(report, self.sample_rate), file["name"]
        self.hold(*self.uploaded)

    def hold(self, file: Clip | None, name: str, begin: int = 0) -> None:
        """Offer the parts of a file, at first the one from sample `begin` on."""
        self.file, self.name = file, name
        self.begin.value = 0  # which any highest value allows
        self.begin.max = max(begin, file.length - self.clip_length) / self.sample_rate if file else 0
        self.begin.value = begin / self.sample_rate

    def clip(self) -> Clip:
        """The chosen part, or the rest of a file that is shorter; `UserError` without a file."""
        if self.file is None:
            raise UserError(f"Choose two audio files: {NAMES}.")
        offset = round(self.begin.value * self.sample_rate)
        return replace(self.file, offset=offset, length=min(self.clip_length, self.file.length - offset))

    def part(self) -> str:
        """'song.wav 4–20 s of 24 s'."""
        seconds = self.file.length / self.sample_rate
        return f"{describe_clip(replace(self.clip(), path=self.name))} of {seconds:.4g} s"


def all_of(file: AudioReport, sample_rate: int) -> Clip:
    return Clip(str(file.path), 0, file.samples_at(sample_rate), file.sha256, sample_rate)


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


def uploaded_clips(folder: Path, length: int, sample_rate: int) -> dict[str, Clip]:
    """Name → clip of every uploaded file: its first `length` samples at this rate, or all of a shorter one."""
    clips = {}
    for path in sorted(folder.glob("*")):
        with contextlib.suppress(AudioError):  # any other file in the folder
            whole = all_of(check_audio(path), sample_rate)
            clip = replace(whole, length=min(length, whole.length))
            name = path.name.partition("_")[2] or path.name  # without its hash
            clips[describe_clip(replace(clip, path=name))] = clip
    return clips


def plain_name(name: str, most: int = 100) -> str:
    """A name of letters, digits, '.', '_' and '-' only, valid in any folder; the last `most` bytes of a longer one."""
    return re.sub(r"[^\w.-]+", "_", name).encode()[-most:].decode(errors="ignore")


def describe_clip(clip: Clip) -> str:
    """'song_04.wav 4–8 s'."""
    begin, end = (n / clip.sample_rate for n in (clip.offset, clip.offset + clip.length))
    return f"{clip.path} {begin:.4g}–{end:.4g} s"
