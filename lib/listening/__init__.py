"""Listening to a trained model in a notebook, and watching it train.

- `render`: one pair through a model with any `Settings`; recipes that render it again
- `panel`: `Listening`, validation pairs and uploaded files, fused by one or several runs
- `playground`: `Playground`, one input with several targets, and the model's settings on sliders
- `explorer`: `RmsExplorer`, sliders over the RMS of an untrained cascade
- `dashboard`: `watch` and `Dashboard`, a training run with its curves, clips and a stop button
- `player`: `Players` that keep levels as they are (`player.js`: their panel, with a blind test)
- `widgets`: what the panels share; `show` displays one where a front end can

Only what needs no widgets is imported here, so that `python -m lib.fuse` starts quickly. `lib.listening.render` as an
attribute is the function; `from lib.listening.render import …` finds the module.
"""

from lib.listening.render import Settings, follow_recipe, render, save_with_recipe
