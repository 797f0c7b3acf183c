"""Listening to a trained model in a notebook, and watching it train. Only what needs no widgets is imported here, so
that `python -m lib.fuse` starts quickly. `lib.listening.render` as an attribute is the function."""

from lib.listening.render import Settings, follow_recipe, render, save_with_recipe
