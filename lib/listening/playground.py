"""The fuse playground: one input, several targets, and what the model makes of them when its settings move.

A favourite is saved as a WAV with the recipe that makes it again (`python -m lib.fuse --recipe`). Where the front end
shows no widgets, `Playground.settings_side_by_side` has a few settings of one pair instead.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from lib.audio.plots import waveforms_and_mels
from lib.codec.codec import Codec
from lib.data.pairs import Manifest
from lib.listening.panel import SLIDER, Message, Models, describe_clip, plain_name, uploaded_clips, whole_clip
from lib.listening.player import Players, PlayerWidget
from lib.listening.render import Settings, load_pair, render, save_with_recipe
from lib.training.run import Run
from lib.util.errors import UserError
from lib.util.files import make_folder


class Playground:
    """Settings of a run's rendition, over the clips of the validation pairs."""

    def __init__(
        self,
        codec: Codec,
        manifest: Manifest,
        runs: Mapping[str, Run],
        favourites: str | Path,
        uploads: str | Path | None = None,
    ):
        """`runs`: name → run, the first one is chosen at the start. `favourites`: folder for what is saved. `uploads`:
        folder of the listening panel's uploaded files, which are offered as well."""
        self.codec, self.runs, self.favourites = codec, dict(runs), Path(favourites)
        pairs = manifest.split("val")
        clips = [clip for pair in pairs for clip in (pair.input, pair.target)]
        self.clips = {describe_clip(clip): whole_clip(manifest, clip) for clip in clips}
        if uploads is not None:
            self.clips |= uploaded_clips(uploads, manifest.clip_length)
        self.first = (describe_clip(pairs[0].input), describe_clip(pairs[0].target))
        self.model = Models(self.runs, codec)

    def fuse(self, run: str, input: str, targets: tuple[str, ...], settings: Settings) -> Players:
        """The input, and its fusion with each target, by the clips' names."""
        wavs = {}
        for target in targets:
            pair = load_pair(self.clips[input], self.clips[target])
            wavs.setdefault("input", pair[0])
            wavs[f"with {target}"] = render(self.model(run), self.codec, *pair, settings).wav
        return Players(wavs)

    def save(self, name: str, run: str, input: str, target: str, settings: Settings) -> Path:
        """Save one fusion as favourites/<name>.wav with its recipe, whose path is returned. A name that is taken gets a
        number: nothing is overwritten."""
        stem = plain_name(name).strip("._") or "favourite"
        make_folder(self.favourites)
        path, number = self.favourites / f"{stem}.wav", 1
        while path.exists() or path.with_suffix(".json").exists():
            number += 1
            path = self.favourites / f"{stem}_{number}.wav"
        clips = self.clips[input], self.clips[target]
        return save_with_recipe(path, Run.open(self.runs[run].path), self.codec, *clips, settings)

    def settings_side_by_side(self) -> Figure:
        """The first pair, rendered with one setting moved at a time."""
        model = self.model(next(iter(self.runs)))
        moved = {"as trained": Settings(), "half noise": Settings(noise=0.5)}
        if len(model.cascade.stages) > 1:
            moved["one stage"] = Settings(stages=1)
        moved["last residual 0.1"] = Settings(residual_weight=0.1)
        if model.masking.masking != "none":
            moved["all-or-nothing masks"] = Settings(mask_hardness=100.0)
        pair = load_pair(*(self.clips[name] for name in self.first))
        return waveforms_and_mels(
            {name: render(model, self.codec, *pair, settings).wav for name, settings in moved.items()}
        )

    def panel(self) -> ipywidgets.Widget:
        """The live playground."""
        return _Panel(self).box


class _Panel:
    """The widgets of a playground and what moves them."""

    def __init__(self, playground: Playground):
        self.playground = playground
        names = list(playground.clips)
        slider = {"continuous_update": False, **SLIDER}
        input, target = playground.first
        self.run = ipywidgets.Dropdown(options=list(playground.runs), description="run", **SLIDER)
        self.input = ipywidgets.Dropdown(options=names, value=input, description="input", **SLIDER)
        self.targets = ipywidgets.SelectMultiple(
            options=names, value=(target,), rows=5, description="targets (one or more)", **SLIDER
        )
        self.stages = ipywidgets.IntSlider(1, min=1, max=1, description="stages to apply", **slider)
        self.weight = ipywidgets.FloatSlider(
            1, min=0, max=2, step=0.05, description="residual of the last one", **slider
        )
        self.noise = ipywidgets.FloatSlider(0, min=0, max=1, step=0.05, description="noise share", **slider)
        self.seed = ipywidgets.BoundedIntText(0, min=0, max=2**31 - 1, description="seed of the noise", **SLIDER)
        self.hardness = ipywidgets.FloatLogSlider(
            1, base=10, min=-2, max=2, step=0.1, description="mask hardness", **slider
        )
        self.message, self.players = Message(), PlayerWidget()
        self.shown: Any = None  # what the players play: two sliders that move together redraw once
        self.favourite = ipywidgets.Dropdown(description="save the fusion with", **SLIDER)
        self.name = ipywidgets.Text("favourite", description="as", **SLIDER)
        self.button = ipywidgets.Button(description="Save WAV and recipe", icon="save", layout={"width": "14rem"})
        self.button.on_click(self.save)
        self.moving = (self.stages, self.weight, self.noise, self.seed, self.hardness)
        choices = (self.run, self.input, self.targets)
        saving = (self.favourite, self.name, self.button, self.message.html)
        self.box = ipywidgets.VBox([*choices, *self.moving, self.players, *saving])
        self.fit_to_run()
        self.run.observe(self.fit_to_run, names="value")
        self.stages.observe(self.fit_weight, names="value")
        for control in (self.run, self.input, self.targets, *self.moving):
            control.observe(self.redraw, names="value")
        self.redraw()

    def fit_to_run(self, change: Any = None) -> None:
        """As many stages as the run has, and the masks' slider only where there are masks."""
        with self.message.telling_errors():
            model = self.playground.model(self.run.value)
            self.stages.max = self.stages.value = len(model.cascade.stages)
            self.hardness.disabled = model.masking.masking == "none"
            self.fit_weight()

    def fit_weight(self, change: Any = None) -> None:
        with self.message.telling_errors():
            stage = self.playground.model(self.run.value).cascade.stages[self.stages.value - 1]
            self.weight.max = max(2.0, stage.config.residual_weight)
            self.weight.value = stage.config.residual_weight

    def settings(self) -> Settings:
        return Settings(
            stages=self.stages.value,
            residual_weight=self.weight.value,
            noise=self.noise.value,
            mask_hardness=self.hardness.value,
            seed=self.seed.value,
        )

    def redraw(self, change: Any = None) -> None:
        with self.message.telling_errors():
            if not self.targets.value:
                raise UserError("targets: none is chosen; click one, or several with Ctrl")
            asked = (self.run.value, self.input.value, self.targets.value, self.settings())
            if asked == self.shown:
                return
            self.players.html = self.playground.fuse(*asked)._repr_html_()
            self.shown = asked
            kept = self.favourite.value
            self.favourite.options = self.targets.value
            self.favourite.value = kept if kept in self.targets.value else self.targets.value[0]

    def save(self, button: Any) -> None:
        with self.message.telling_errors():
            if self.favourite.value is None:
                raise UserError("save the fusion with: nothing to save yet; choose a target that plays")
            recipe = self.playground.save(
                self.name.value, self.run.value, self.input.value, self.favourite.value, self.settings()
            )
            self.message.say(
                f"Saved {recipe.with_suffix('.wav').name} in {recipe.parent}. "
                f"The same again: python -m lib.fuse --recipe {shlex.quote(str(recipe))} -o again.wav"
            )
