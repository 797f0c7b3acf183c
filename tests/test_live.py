"""Whether anybody is watching: a browser's cell is told from one that a headless run sent."""

import pytest
from jupyter_client.session import Session

import lib.live
from lib.live import can_show_widgets


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
    monkeypatch.setattr(lib.live, "get_ipython", lambda: Shell(message_id))
    assert can_show_widgets() is live


def test_a_headless_message_is_what_jupyter_client_sends(monkeypatch):
    """The real library's own ids, of several messages of a session."""
    session = Session()
    for _ in range(3):
        message_id = session.msg("execute_request")["header"]["msg_id"]
        monkeypatch.setattr(lib.live, "get_ipython", lambda message_id=message_id: Shell(message_id))
        assert not can_show_widgets()


def test_without_ipython_or_without_a_kernel_nobody_watches(monkeypatch):
    assert not can_show_widgets()
    monkeypatch.setattr(lib.live, "get_ipython", lambda: object())  # IPython in a terminal
    assert not can_show_widgets()
