"""The playground: one input fused with several targets while sliders change the model's settings; headless, settings
of one pair. A favourite is saved as a WAV with a recipe that renders it again, by `python -m lib.fuse --recipe`."""

import itertools
import shlex
from pathlib import Path
from typing import Any

from ipywidgets import Button, HBox, Label, VBox
from matplotlib.figure import Figure

from lib.audio.plots import waveforms_and_mels
from lib.listening import widgets as ui
from lib.listening.panel import Comparing, Listening
from lib.listening.player import Players
from lib.listening.render import Rendition, Settings, save_with_recipe
from lib.listening.widgets import step
from lib.model.fusion import FusionModel
from lib.model.rms_law import Clips
from lib.training.run import Run
from lib.util.errors import UserError
from lib.util.files import make_folder


class Playground:
    """The clips of the validation pairs and all uploaded files, fused by any run with any settings."""

    def __init__(self, listening: Listening, favourites: Path):
        """`favourites`: the folder that fusions are saved in."""
        self.listening, self.favourites = listening, favourites
        self.first = tuple(listening.clips)[:2]  # names of the first pair's input and target

    def fuse(self, run: str, input: str, targets: tuple[str, ...], settings: Settings) -> tuple[Players, dict, str]:
        """For each target, given like the input by the name of its clip: `Listening.compare` of the variant with these
        settings and the unmodified output. What both took, and the variant's level in words, are of the first."""
        outputs = {"variant": (run, settings), "unmodified output": (run, Settings(whole_band=settings.whole_band))}
        clips = self.listening.clips
        compared = [self.listening.compare(clips[input], clips[target], outputs) for target in targets]
        (players, parts, found), *others = compared
        for target, (other, *_) in zip(targets[1:], others, strict=True):
            players.wavs |= {f"{name}, {target}": wav for name, wav in other.wavs.items() if name != "input"}
        level = level_in_words(self.listening.model(run), found["variant"], settings)
        return Players(players.wavs, players.sample_rate), parts, level

    def save(self, name: str, run: str, input: str, target: str, settings: Settings) -> Path:
        """Save a fusion as favourites/<name>.wav and return its recipe's path. A taken name gets a number."""
        stem = ui.plain_name(name).strip("._") or "favourite"
        make_folder(self.favourites)
        paths = (self.favourites / f"{stem}{f'_{i}' if i > 1 else ''}.wav" for i in itertools.count(1))
        path = next(path for path in paths if not (path.exists() or path.with_suffix(".json").exists()))
        clips = self.listening.clips
        opened = Run.open(self.listening.runs[run].path)  # another training may have replaced it
        return save_with_recipe(path, opened, self.listening.codec, clips[input], clips[target], settings)

    def settings_side_by_side(self) -> Figure:
        """The first pair, rendered with one setting changed at a time, of those that the first run has."""
        run = next(iter(self.listening.runs))
        model, table = self.listening.model(run), ui.TABLES["side_by_side"]
        stages, masks = len(model.cascade.stages), model.masking.masking != "none"
        fitting = {title: how for title, how in table.items() if how["stages"] <= stages and how["masks"] <= masks}
        outputs = {title: (run, Settings(**how["settings"])) for title, how in fitting.items()}
        players, *_ = self.listening.compare(*(self.listening.clips[name] for name in self.first), outputs)
        wavs = players.resampled()
        return waveforms_and_mels({title: wavs[title] for title in outputs})

    def panel(self) -> VBox:
        """The live playground."""
        return _Panel(self)


def level_in_words(model: FusionModel, rendition: Rendition, settings: Settings) -> str:
    """The RMS after the last stage that was applied, beside the law's for two unlike clips at the level that scaling
    aims at; empty without stages."""
    if not rendition.traces:
        return ""
    last, trace = len(rendition.traces) - 1, rendition.traces[-1]
    goal, weight = (trace.target_scale * trace.rms_before_scaling).item(), settings.residual_weight
    config = model.cascade.config.with_stage(last, **({} if weight is None else {"residual_weight": weight}))
    law = config.predict_rms(Clips(goal, goal))[last]
    found = f"RMS {trace.output_rms.item():.2f} of {goal:.2f}; by the law, before training, {law.output_rms:.2f}"
    return f"{found}; smallest safe weight {law.smallest_safe_weight:.2f}"


class _Panel(Comparing):
    """The live playground and what its widgets do."""

    def __init__(self, playground: Playground):
        super().__init__()
        self.playground, listening = playground, playground.listening
        chosen = ui.controls("playground", run=listening.runs, input=listening.clips, targets=listening.clips)
        self.run, self.input, self.targets = chosen.values()
        self.input.value, self.targets.value = playground.first[0], playground.first[1:]
        self.controls, saved = ui.controls("settings"), ui.controls("favourite")  # the former by the settings they set
        self.favourite, self.name = saved.values()
        self.level, self.greyed = Label(), Label()  # of the last stage; why some of the controls are disabled
        self.shown: Any = None  # what the players hold: two sliders that change together redraw once
        self.choices = (*chosen.values(), *self.controls.values())
        self.states: list[tuple[Any, ...]] = []  # that all choices had, the newest last
        self.restoring = False
        self.undo, self.reset = Button(description="Undo", icon="undo"), Button(description="Reset", icon="refresh")
        self.button = Button(description="Save WAV and recipe", icon="save", layout={"width": "14rem"})
        stages, weight, *others = self.controls.values()
        beside = HBox([weight, self.level], layout={"flex_flow": "row wrap"})
        top = (*chosen.values(), stages, beside, *others, self.greyed, HBox([self.undo, self.reset]), self.work)
        self.children = (*top, self.players, self.masks, self.favourite, self.name, self.button)
        self.fit()
        ui.observe([self.run, stages], self.fit)
        ui.observe(self.choices, self.redraw)
        self.undo.on_click(lambda button: self.restore(self.states[:-1] or self.states))
        self.reset.on_click(lambda button: self.restore([*self.states, self.states[0]]))
        self.button.on_click(lambda button: self.work.start(self.save))
        listening.observe(self.offer, "clips")
        self.redraw()

    def fit(self, change: Any = None) -> None:
        """Offer as many stages as the run has, the last one's own weight, and hardness only where there are masks."""
        changing, self.restoring = self.restoring, True  # what fits the run is no change of its own
        with self.work.message.show_errors():
            model = self.playground.listening.model(self.run.value)
            stages, weight, hardness = (self.controls[name] for name in ("stages", "residual_weight", "mask_hardness"))
            if change is None or change["owner"] is self.run:
                stages.disabled = weight.disabled = not len(model.cascade.stages)
                stages.max = stages.value = max(1, len(model.cascade.stages))
                hardness.disabled = model.masking.masking == "none"
                why = ["stages and residual weight: this run has no cascade"] * stages.disabled
                why += ["mask hardness: this run has no masks"] * hardness.disabled
                self.greyed.value = f"Greyed: {'; '.join(why)}." if why else ""
            if not weight.disabled:
                own = model.cascade.stages[stages.value - 1].config.residual_weight
                weight.max, weight.value = max(2.0, own), own
        self.restoring = changing

    def settings(self) -> Settings:
        return Settings(**{name: control.value for name, control in self.controls.items() if not control.disabled})

    def offer(self, change: Any) -> None:
        """List the files that have been uploaded, too."""
        self.restoring = True
        self.input.options = self.targets.options = tuple(change["new"])
        self.restore(self.states)

    def restore(self, states: list[tuple[Any, ...]]) -> None:
        """Make the last of these states that of all choices, and play it."""
        self.states, self.restoring = states, True
        for choice, value in zip(self.choices, states[-1], strict=True):
            choice.value = value
        self.restoring = False
        self.redraw()

    def redraw(self, change: Any = None) -> None:
        if not self.restoring:
            state = tuple(choice.value for choice in self.choices)
            self.states += [state] if state not in self.states[-1:] else []
            self.work.start(self.render)

    def render(self) -> None:
        targets = ui.chosen(self.targets)
        wanted = (self.run.value, self.input.value, targets, self.settings())
        if wanted == self.shown:
            return
        players, parts, level = self.playground.fuse(*wanted)
        self.show(players, parts)
        self.level.value, self.shown = level, wanted
        kept, self.favourite.options = self.favourite.value, targets
        self.favourite.value = kept if kept in targets else targets[0]

    def save(self) -> None:
        if self.favourite.value is None:
            raise UserError("nothing to save yet: choose a target whose fusion is playing")
        step("saving")
        choices = (self.name, self.run, self.input, self.favourite)
        recipe = self.playground.save(*(choice.value for choice in choices), self.settings())
        again = f"python -m lib.fuse --recipe {shlex.quote(str(recipe))} -o again.wav"
        self.work.message.say(f"Saved {recipe.stem}.wav in {recipe.parent}. Render it again: {again}")
