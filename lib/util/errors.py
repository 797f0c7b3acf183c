"""Mistakes of the user, reported in one line. Any other exception is a bug and keeps its traceback."""

import contextlib
import sys
from collections.abc import Iterator

from tqdm import tqdm


class UserError(ValueError):
    """What a user can put right: a file, an option, a folder. The message is one line: where, what, how to fix it."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback."""
        return [str(self)]


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Around the body of a command: `UserError` → one line on stderr and exit code 2, Ctrl-C → exit code 130. Names of
    files that are not UTF-8 are printed with \\udc… in place of what cannot be printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a notebook's has no encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        # on a line of its own, where a progress bar is under way
        tqdm.write("error: " + " ".join((str(error) or "interrupted").split()), file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 130)
