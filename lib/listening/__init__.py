"""Listening to a trained model in a notebook, and watching it train.

render      one pair through a model, with any settings; recipes that render it again
panel       validation pairs and uploaded files, fused by one or several runs
playground  one input with several targets, and the model's settings on sliders
explorer    sliders over the RMS of an untrained cascade
dashboard   curves, clips and a stop button for a training
player      audio players that keep levels as they are (player.js: their panel, with a blind test)
widgets     what the panels share
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "Dashboard": "dashboard",
    "Listening": "panel",
    "Players": "player",
    "Playground": "playground",
    "RmsExplorer": "explorer",
    "show": "widgets",
    "watch": "dashboard",
}
__all__ = ["Dashboard", "Listening", "Players", "Playground", "RmsExplorer", "show", "watch"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is used: `lib.fuse` needs only `render`, without widgets and figures."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
