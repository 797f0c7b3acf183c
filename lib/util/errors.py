"""Mistakes of the user, reported in one line.

Everything that a user can put right (a file, an option, a folder) raises `UserError`: its message names the file or
field, says what is wrong and how to fix it. Commands print that line and exit with code 2; any other exception is a bug
and keeps its traceback.
"""

import contextlib
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake that the user can put right. The message is one line: where, what, how to fix it."""


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Around the body of a command: `UserError` → one line on stderr and exit code 2, Ctrl-C → exit code 130."""
    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        print("error: " + " ".join((str(error) or "interrupted").split()), file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 130)
