"""The playground: one input fused with several targets while sliders change the model's settings; headless, settings
of one pair. A favourite is saved as a WAV with a recipe that renders it again, by `python -m lib.fuse --recipe`."""

import shlex
from pathlib import Path
from typing import Any

from ipywidgets import BoundedIntText, Button, Checkbox, Dropdown, FloatLogSlider, FloatSlider, IntSlider, Text, VBox
from matplotlib.figure import Figure

from lib.audio.plots import waveforms_and_mels
from lib.data.pairs import load_pair
from lib.listening.panel import Listening
from lib.listening.player import Players, PlayerWidget
from lib.listening.render import Settings, render, save_with_recipe
from lib.listening.widgets import CONTROL, SLIDER, Message, Several, observe, plain_name, uploaded_clips
from lib.training.run import Run
from lib.util.errors import UserError
from lib.util.files import make_folder


class Playground:
    """The clips of the validation pairs and all uploaded files, fused by any run with any settings."""

    def __init__(self, listening: Listening, favourites: Path):
        """`favourites`: the folder that fusions are saved in."""
        self.listening, self.favourites = listening, favourites
        self.clips = listening.clips | uploaded_clips(listening.uploads, listening.clip_length)
        self.first = tuple(self.clips)[:2]  # names of the first pair's input and target

    def fuse(self, run: str, input: str, targets: tuple[str, ...], settings: Settings) -> Players:
        """The input and its fusion with each target, all given by the names of their clips."""
        wavs = {}
        for target in targets:
            pair = load_pair(self.clips[input], self.clips[target])
            wavs.setdefault("input", pair[0])
            wavs[f"with {target}"] = render(self.listening.model(run), self.listening.codec, *pair, settings).wav
        return Players(wavs)

    def save(self, name: str, run: str, input: str, target: str, settings: Settings) -> Path:
        """Save a fusion as favourites/<name>.wav and return its recipe's path. A taken name gets a number."""
        stem = plain_name(name).strip("._") or "favourite"
        make_folder(self.favourites)
        path, number = self.favourites / f"{stem}.wav", 1
        while path.exists() or path.with_suffix(".json").exists():
            number += 1
            path = self.favourites / f"{stem}_{number}.wav"
        opened = Run.open(self.listening.runs[run].path)  # another training may have replaced it
        return save_with_recipe(path, opened, self.listening.codec, self.clips[input], self.clips[target], settings)

    def settings_side_by_side(self) -> Figure:
        """The first pair, rendered with one setting changed at a time."""
        model = self.listening.model(next(iter(self.listening.runs)))
        changed = {"as trained": {}, "half noise": {"noise": 0.5}}
        if len(model.cascade.stages) > 1:
            changed["one stage"] = {"stages": 1}
        if len(model.cascade.stages):
            changed["last residual 0.1"] = {"residual_weight": 0.1}
        if model.masking.masking != "none":
            changed["all-or-nothing masks"] = {"mask_hardness": 100.0}
        pair, codec = load_pair(*(self.clips[name] for name in self.first)), self.listening.codec
        wavs = {name: render(model, codec, *pair, Settings(**values)).wav for name, values in changed.items()}
        return waveforms_and_mels(wavs)

    def panel(self) -> VBox:
        """The live playground."""
        return _Panel(self).box


class _Panel:
    """The widgets of a playground and what they do."""

    def __init__(self, playground: Playground):
        self.playground, self.model = playground, playground.listening.model
        names = list(playground.clips)
        input, target = playground.first
        self.run = Dropdown(options=list(playground.listening.runs), description="run", **CONTROL)
        self.input = Dropdown(options=names, value=input, description="input", **CONTROL)
        self.targets = Several("targets", names, target, rows=5)
        self.controls = {  # by the settings that they set
            "stages": IntSlider(1, min=1, max=1, description="stages to apply", **SLIDER),
            "residual_weight": FloatSlider(1, min=0, max=2, step=0.05, description="last residual weight", **SLIDER),
            "noise": FloatSlider(0, min=0, max=1, step=0.05, description="noise share", **SLIDER),
            "seed": BoundedIntText(0, min=0, max=2**31 - 1, description="seed of the noise", **CONTROL),
            "mask_hardness": FloatLogSlider(1, min=-2, max=2, step=0.1, description="mask hardness", **SLIDER),
            "whole_band": Checkbox(True, description="whole band, beyond the codec's", **CONTROL),
        }
        self.message, self.players = Message(), PlayerWidget()
        self.shown: Any = None  # what the players hold: two sliders that change together redraw once
        self.favourite = Dropdown(description="save the fusion with", **CONTROL)
        self.name = Text("favourite", description="as", **CONTROL)
        self.button = Button(description="Save WAV and recipe", icon="save", layout={"width": "14rem"})
        self.button.on_click(self.save)
        choices = (self.run, self.input, self.targets, *self.controls.values())
        self.box = VBox([*choices, self.players, self.favourite, self.name, self.button, self.message])
        self.fit()
        observe([self.run, self.controls["stages"]], self.fit)
        observe(choices, self.redraw)
        self.redraw()

    def fit(self, change: Any = None) -> None:
        """Offer as many stages as the run has, the last one's own weight, and hardness only where there are masks."""
        with self.message.show_errors():
            model = self.model(self.run.value)
            stages, weight = self.controls["stages"], self.controls["residual_weight"]
            if change is None or change["owner"] is self.run:
                stages.disabled = weight.disabled = not len(model.cascade.stages)
                stages.max = stages.value = max(1, len(model.cascade.stages))
                self.controls["mask_hardness"].disabled = model.masking.masking == "none"
            if not weight.disabled:
                own = model.cascade.stages[stages.value - 1].config.residual_weight
                weight.max, weight.value = max(2.0, own), own

    def settings(self) -> Settings:
        return Settings(**{name: control.value for name, control in self.controls.items() if not control.disabled})

    def redraw(self, change: Any = None) -> None:
        with self.message.show_errors():
            targets = self.targets.chosen()
            wanted = (self.run.value, self.input.value, targets, self.settings())
            if wanted == self.shown:
                return
            self.players.html = self.playground.fuse(*wanted)._repr_html_()
            self.shown = wanted
            kept, self.favourite.options = self.favourite.value, targets
            self.favourite.value = kept if kept in targets else targets[0]

    def save(self, button: Any) -> None:
        with self.message.show_errors():
            if self.favourite.value is None:
                raise UserError("nothing to save yet: choose a target whose fusion is playing")
            choices = (self.name, self.run, self.input, self.favourite)
            recipe = self.playground.save(*(choice.value for choice in choices), self.settings())
            again = f"python -m lib.fuse --recipe {shlex.quote(str(recipe))} -o again.wav"
            self.message.say(f"Saved {recipe.stem}.wav in {recipe.parent}. Render it again: {again}")
