"""One process at a time in a folder."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lib.util.errors import UserError
from lib.util.files import make_folder

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def only_one(path: Path, *, wait: bool = False) -> Iterator[None]:
    """While inside, no other process is inside with this file, on any host that the file system locks for: `UserError`
    names the one that is or, with `wait`, this one waits. The lock ends with its process, however that ends; inside,
    the same process may enter again."""
    make_folder(path.parent)
    lock = FileLock(path, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        other = path.read_text() or "another process"
        if not wait:
            fix = "wait for it, stop it, or choose another output folder"
            raise UserError(f"{path.parent}: {other} is at work here; {fix}") from None
        logger.warning("%s: waiting for %s", path.parent, other)
        lock.acquire(timeout=-1)
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()
