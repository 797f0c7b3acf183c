"""What panels share: a browser's cell against a headless run's, messages, pictures, and uploaded files."""

import io
import threading

import ipywidgets
import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import soundfile
from jupyter_client.session import Session
from PIL import Image

import lib.listening.widgets
from lib.audio.decode import AudioError
from lib.audio.files import load_audio
from lib.data.pairs import Clip
from lib.listening.widgets import (
    Message,
    Work,
    can_show_widgets,
    describe_clip,
    figure_png,
    keep_upload,
    plain_name,
    show,
    step,
)
from lib.util.errors import UserError

HALF = 12_000  # samples of a clip


class Shell:
    def __init__(self, message_id: str):
        self.kernel = self
        self.message_id = message_id

    def get_parent(self):
        return {"header": {"msg_id": self.message_id}} if self.message_id else {}


@pytest.mark.parametrize(
    ("message_id", "live"),
    [
        ("0bd7eb91-3c5ba6d5a1ccb6ec7d6a4a79_4021_7", False),  # jupyter_client: papermill, nbval, nbconvert
        ("f5b1d3a9-6a1c-4c3e-9a43-2f7c93a55d0e", True),  # JupyterLab
        ("", False),
    ],
)
def test_a_browser_is_distinguished_from_a_headless_run(monkeypatch, message_id, live):
    monkeypatch.setattr(lib.listening.widgets, "get_ipython", lambda: Shell(message_id))
    assert can_show_widgets() is live


def test_a_headless_message_is_what_jupyter_client_sends(monkeypatch):
    """The real library's own ids, of several messages of a session."""
    session = Session()
    for _ in range(3):
        message_id = session.msg("execute_request")["header"]["msg_id"]
        monkeypatch.setattr(lib.listening.widgets, "get_ipython", lambda message_id=message_id: Shell(message_id))
        assert not can_show_widgets()


def test_without_ipython_or_without_a_kernel_nobody_watches(monkeypatch):
    assert not can_show_widgets()
    monkeypatch.setattr(lib.listening.widgets, "get_ipython", lambda: object())  # IPython in a terminal
    assert not can_show_widgets()


def test_a_front_end_gets_the_panel(monkeypatch):
    monkeypatch.setattr(lib.listening.widgets, "can_show_widgets", lambda: True)
    shown = []
    monkeypatch.setattr(lib.listening.widgets, "display", shown.append)
    panel = ipywidgets.Label("live")
    assert show(lambda: panel, "still") is None  # or the cell would show it a second time
    assert shown == [panel]


def test_a_headless_run_gets_the_alternative_and_builds_no_panel(monkeypatch):
    monkeypatch.setattr(lib.listening.widgets, "can_show_widgets", lambda: False)
    monkeypatch.setattr(lib.listening.widgets, "display", pytest.fail)
    assert show(lambda: pytest.fail("built"), "still") == "still"


def test_without_ipython_the_still_one_is_shown():
    assert show(lambda: pytest.fail("built"), "still") == "still"


def test_a_figure_becomes_a_picture_and_is_closed():
    bystanders = [plt.figure().number, *plt.get_fignums()]
    figure, axes = plt.subplots(figsize=(2, 1), dpi=50)
    axes.set_position((0, 0, 1, 1))
    axes.set_axis_off()
    axes.axhspan(0, 1, color=(0, 1, 0))
    with plt.rc_context({"savefig.dpi": "figure"}):
        picture = Image.open(io.BytesIO(figure_png(figure)))
    assert picture.format == "PNG"
    assert picture.size == (100, 50)
    assert tuple(np.asarray(picture.convert("RGB"))[25, 50]) == (0, 255, 0)
    assert plt.get_fignums() == sorted(set(bystanders))
    plt.close(bystanders[0])


# --- messages ---------------------------------------------------------------------------------------------------------


def test_messages_escape_markup():
    message = Message()
    message.say("<img src=x onerror=alert(1)> & more")
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; more" in message.value
    assert "<img" not in message.value


def test_mistakes_are_shown_and_defects_are_raised():
    message = Message()
    with message.show_errors():
        raise UserError("a.wav: gone; put it back")
    assert "a.wav: gone; put it back" in message.value
    with message.show_errors():
        assert message.value == ""
    with pytest.raises(RuntimeError), message.show_errors():
        raise RuntimeError


# --- work -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def live(monkeypatch) -> None:
    """As if a front end showed widgets."""
    monkeypatch.setattr(lib.listening.widgets, "can_show_widgets", lambda: True)


class Slow:
    """Work of two steps, the second of which waits for leave."""

    def __init__(self):
        self.taken, self.begun, self.leave = [], threading.Event(), threading.Event()

    def __call__(self) -> None:
        step("first <step>")
        self.taken.append("first")
        self.begun.set()
        assert self.leave.wait(60)
        step("second")
        self.taken.append("second")


def all_done() -> None:
    Work.THREAD.submit(lambda: None).result()


def test_in_a_front_end_work_shows_its_step_and_can_be_cancelled(live):
    work, slow = Work(), Slow()
    work.start(slow)  # and comes back at once
    assert slow.begun.wait(60)
    assert work.busy.layout.display is None
    assert work.sign.value == "<progress></progress> first &lt;step&gt;"
    work.button.click()
    assert work.busy.layout.display == "none"
    slow.leave.set()
    all_done()
    assert slow.taken == ["first"]
    assert "Cancelled" in work.message.value
    step("outside of any work")  # which nobody can cancel


def test_newer_work_replaces_what_is_under_way(live):
    work, slow, other, newest = Work(), Slow(), Slow(), Slow()
    newest.leave.set()
    for started in (slow, other, newest):
        work.start(started)
    slow.leave.set()
    all_done()
    assert [started.taken for started in (slow, other, newest)] in (
        [["first"], [], ["first", "second"]],
        [[], [], ["first", "second"]],
    )
    assert work.busy.layout.display == "none"
    assert work.message.value == ""


def test_what_waits_for_another_panel_says_so_from_the_start(live):
    first, second, slow, other = Work(), Work(), Slow(), Slow()
    assert first.busy.layout.display == "none"  # no sign of nothing
    first.start(slow)
    assert slow.begun.wait(60)
    second.start(other)
    assert second.busy.layout.display is None
    assert second.sign.value.endswith(" waiting for another panel")
    for work in (slow, other):
        work.leave.set()
    all_done()
    assert second.busy.layout.display == "none"


@pytest.mark.parametrize(("error", "words"), [(UserError("a.wav: gone"), "a.wav: gone"), (KeyError("x"), "KeyError")])
def test_what_fails_in_a_thread_is_shown(live, error, words):
    def fail() -> None:
        raise error

    work = Work()
    work.start(fail)
    all_done()
    assert words in work.message.value
    assert work.busy.layout.display == "none"


def test_without_a_front_end_work_is_done_at_once():
    work, slow = Work(), Slow()
    slow.leave.set()
    work.start(slow)
    assert slow.taken == ["first", "second"]
    assert threading.current_thread() is threading.main_thread()


# --- uploaded files ---------------------------------------------------------------------------------------------------


def audio(num_samples: int = HALF, seed: int = 0, rate: int = 24_000, format: str = "WAV") -> bytes:
    wav = 0.1 * np.random.default_rng(seed).standard_normal(num_samples)
    file = io.BytesIO()
    soundfile.write(file, wav, rate, format=format, subtype="FLOAT" if format == "WAV" else None)
    return file.getvalue()


BROKEN = {
    "empty": (b"", "empty"),
    "text": (b"not a sound", "not audio"),
    "truncated": (audio()[:-8_000], "truncated"),
    "silent": (b"RIFF", "not audio"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_no_broken_file_is_kept(tmp_path, fault):
    content, told = BROKEN[fault]
    with pytest.raises(AudioError, match=rf"^my\.wav: .*{told}"):
        keep_upload("my.wav", content, tmp_path / "uploads")
    assert list((tmp_path / "uploads").iterdir()) == []


def test_the_same_content_again_leaves_its_file_alone(tmp_path):
    content = audio()
    path = keep_upload("a.wav", content, tmp_path).path
    before = path.stat()
    assert keep_upload("a.wav", content, tmp_path).path == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    other = keep_upload("b.wav", content, tmp_path).path
    with pytest.raises(AudioError):
        keep_upload("a.wav", content[:-100], tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted({path, other})
    assert path.read_bytes() == other.read_bytes() == content


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd.wav",
        "/absolute.wav",
        r"C:\music\a b.wav",
        "Übung – 1/été.wav",
        "x" * 400 + ".wav",
        "音楽" * 150 + ".wav",
        "a\x00b\nc.wav",
        "\ud800.wav",
        "",
        "..",
        ".hidden",
    ],
    ids=lambda name: ascii(name[-12:]),
)
def test_any_name_becomes_a_file_in_the_folder(tmp_path, name):
    content = audio()
    path = keep_upload(name, content, tmp_path / "uploads").path
    assert path.parent == tmp_path / "uploads"
    assert [path] == list((tmp_path / "uploads").iterdir())
    assert path.read_bytes() == content
    assert path.suffix == ".wav" or not name.endswith(".wav")
    assert load_audio(path).shape == (1, HALF)


def test_plain_names_keep_what_reads_well():
    assert plain_name("été_1-b.WAV") == "été_1-b.WAV"
    assert plain_name("a  b/c:d.wav") == "a_b_c_d.wav"
    assert plain_name("é" * 80, 99) == "é" * 49  # no half letter
    assert len(plain_name("音" * 400).encode()) == 99


def test_clips_are_named_by_file_and_seconds():
    clip = Clip("rock/song_04.wav", 96_000, 96_000, "0" * 64)
    assert describe_clip(clip) == "rock/song_04.wav 4–8 s"
    other = Clip("b.wav", 12_000, 11_000, "0" * 64)
    assert describe_clip(other) == "b.wav 0.5–0.9583 s"
