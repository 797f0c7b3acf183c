"""Files: written so that a kill leaves the old or the new one, read with errors that name the fix, and prefetched; and
folders, for one process at a time."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import socket
import tempfile
import uuid
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from lib.util.errors import UserError

logger = logging.getLogger(__name__)

FIX = "restore it"
FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG  # of a disk, a user's share of it, a file

Shape = type | Mapping[str, type]
Item = TypeVar("Item")
Result = TypeVar("Result")


@contextlib.contextmanager
def writing(path: str | Path, otherwise: str = "choose another output folder") -> Iterator[None]:
    """What prevents writing there becomes a `UserError` with what to do: `otherwise`, unless the disk is full."""
    try:
        yield
    except OSError as error:
        fix = "make room there and run it again" if error.errno in FULL else otherwise
        raise UserError(f"{path}: cannot be written ({error.strerror}); {fix}") from error


def make_folder(path: Path) -> None:
    """Create a folder for output and prove that it can be written to; `UserError` if not."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


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


def write_atomic(path: Path, content: str | bytes | memoryview, *, sync: bool = True) -> None:
    """Write a file under a temporary name, fsync and rename it. Text is UTF-8; surrogates carry odd file names. Without
    `sync`, a power failure may leave an empty file: for what carries a checksum and can be made again."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
        if sync:
            fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: str) -> None:
    """`write_atomic`, in a folder that is created if need be; what prevents it becomes a `UserError`."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path, shape: Shape = dict, *, missing: str = "", fix: str = FIX, errors: str = "strict") -> Any:
    """The content of a JSON file: an object, one of another type, or an object that has certain fields (name → type).
    `UserError` for a file that is missing, cannot be read, is not JSON in UTF-8, or has another shape. `fix`: what to
    do about it; `missing`: the whole message where there is no such file; `errors`: as in `open`."""
    with naming(path, fix, missing):
        return _parsed(Path(path).read_bytes().decode(errors=errors), shape)


def read_json_lines(path: Path, *, fix: str = FIX) -> list[dict[str, Any]]:
    """The object in every line but a half-written last one. Errors as in `read_json`, with the number of the line."""
    with naming(path, fix):
        rows, lines = [], path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        with naming(f"{path}, line {number}", fix):
            rows.append(_parsed(line.decode()))
    return rows


@contextlib.contextmanager
def naming(where: str | Path, fix: str, missing: str = "") -> Iterator[None]:
    """While a file is read and its content used: what is wrong with it becomes a `UserError` that names the file and
    the fix; `missing`: the whole message where there is no such file."""
    try:
        yield
    except UserError as error:  # names the field and the fix already
        raise UserError(str(error) if str(where) in str(error) else f"{where}: {error}") from None
    except FileNotFoundError:
        raise UserError(missing or f"{where}: no such file; {fix}") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except (ValueError, LookupError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{where}: damaged ({reason}); {fix}") from None


def _parsed(text: str, shape: Shape = dict) -> Any:
    content = json.loads(text)
    kind, fields = (shape, {}) if isinstance(shape, type) else (dict, shape)
    if not isinstance(content, kind):
        raise TypeError(f"JSON, but not the {kind.__name__} that it should be")
    for name, kind in fields.items():
        if not isinstance(content[name], kind) or (kind is int and isinstance(content[name], bool)):
            raise TypeError(f"field {name!r} is {content[name]!r}, not of type {kind.__name__}")
    return content


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prefetch(function: Callable[[Item], Result], items: Iterable[Item], *, threads: int) -> Iterator[Result]:
    """`map` in threads, in order. While one result is used, as many of the next as there are threads are computed, so
    that memory stays bounded. An error is raised when its result is reached. Closing the iterator ends the threads."""
    pool = ThreadPoolExecutor(threads, "prefetch")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
