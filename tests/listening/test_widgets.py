"""Whether anybody is watching: a browser's cell is told from one that a headless run sent."""

import io

import ipywidgets
import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from jupyter_client.session import Session
from PIL import Image

import lib.listening.widgets
from lib.listening.widgets import can_show_widgets, figure_png, show


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
def test_a_browser_is_told_from_a_headless_run(monkeypatch, message_id, live):
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


def test_a_headless_run_gets_what_stands_for_the_panel_which_is_not_even_built(monkeypatch):
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
