"""Tools that every package uses and that know nothing of audio or models."""

from lib.util.errors import UserError
