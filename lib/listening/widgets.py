"""Whether anybody is watching: live widgets and redrawn figures need a front end, a headless run gets static ones."""

import io
import re
from collections.abc import Callable
from typing import TypeVar

import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import display
from ipywidgets import Widget
from matplotlib.figure import Figure

T = TypeVar("T")


def can_show_widgets() -> bool:
    """Whether the cell that runs now was sent by a front end in a browser.

    Papermill, nbval and nbconvert send cells through jupyter_client, whose message ids end in _<process>_<number>;
    JupyterLab and its kin send ids of their own.
    """
    shell = get_ipython()
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return False
    message_id = kernel.get_parent().get("header", {}).get("msg_id", "")
    return bool(message_id) and re.search(r"_\d+_\d+$", message_id) is None


def show(panel: Callable[[], Widget], instead: T) -> T | None:
    """Display a live panel where the front end can show one; else return what a headless run shows instead."""
    if not can_show_widgets():
        return instead
    display(panel())
    return None


def figure_png(figure: Figure) -> bytes:
    """A figure as the PNG that an `ipywidgets.Image` shows; closes it."""
    content = io.BytesIO()
    figure.savefig(content)
    plt.close(figure)
    return content.getvalue()
