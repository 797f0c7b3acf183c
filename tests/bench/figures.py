"""The two plots: seconds of a training step against the length of the clips and against the batch."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from lib.audio.plots import AVERAGE, INPUT, STYLE, TARGET

AXES = {"length": ("frames", "length of the clips T (frames, 75 a second)"), "batch": ("batch", "clips in a batch")}
LINES = (("baseline_s", "stock build", TARGET, "o-"), ("here_s", "here", INPUT, "o-"))


def step_times(sweep: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """step_time_by_length.png and step_time_by_batch.png, with the least time that the machine's products allow."""
    with plt.rc_context(STYLE):
        for axis, points in sweep.items():
            key, label = AXES[axis]
            at = [point[key] for point in points]
            figure, ax = plt.subplots(figsize=(6, 4))
            for name, legend, colour, style in LINES:
                ax.plot(at, [point[name] for point in points], style, color=colour, label=legend)
            limit = [point["limit_s"] for point in points]
            ax.plot(at, limit, "--", color=AVERAGE, label="limit: products at the machine's rate")
            other = f"{points[0]['frames']} frames" if axis == "batch" else f"batch {points[0]['batch']}"
            ax.set(xscale="log", yscale="log", xlabel=label, ylabel="training step (s)", title=f"full size, {other}")
            ax.set_xticks(at, [str(value) for value in at])
            ax.minorticks_off()
            ax.legend()
            figure.savefig(folder / f"step_time_by_{axis}.png")
            plt.close(figure)
