"""Files and folders that are whole or not there: all that is written to stay is written through here.

It grows in a hidden folder beside its place, until it is whole and on the disk; one renaming then puts it there. The
process that writes holds a lock on the hidden folder, which ends with the process. So what a killed one left is known
by its lock, which is free, and the next write beside it sweeps it away.
"""

import ctypes
import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ldm.errors import UserError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_TEMPORARY = re.compile(
    r"\.(.*)\.[0-9a-f]{8}\.(tmp|new|old)", re.DOTALL
)  # .new and .old are of older versions
_ABANDONED = 86400.0  # seconds after which a temporary is taken for left behind where nothing can be locked
_NAME = 80  # characters of a name in a temporary's name: 240 bytes at most of the 255 that there may be


def unwritable(path: Path, error: OSError) -> UserError:
    """Return the error for a place that can't be written to."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "make room there" if full else "give a place that can be written to"
    return UserError(f"can't write {path}: {error.strerror or error}; {advice}")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Have what the system says while `path` is written (a full disk, no permission) come as a UserError."""
    try:
        yield
    except OSError as error:
        raise unwritable(Path(path), error) from error


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary file to write to; it takes the place of `path` once the block ends well.

    It has the name of `path`, in a hidden folder. Whatever goes wrong before that, the old file stays as it was and the
    temporary one is removed.

    Raises:
        UserError: the place can't be written to.
    """
    path = Path(path)
    with writing(path), workshop(path) as folder:
        if path.is_dir():
            raise UserError(f"can't write {path}: it is a folder")
        temporary = folder / path.name
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask allows; some writers leave a file to its owner alone
        yield temporary
        temporary.chmod(mode)
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all; UserError if the place can't be written to."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all; UserError if the place can't be written to."""
    write_bytes(path, text.encode("utf-8"))


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Give a new folder to fill; it takes the place of `target`, and of all that is in it, once the block ends well.

    If the block fails, the old folder is as it was. There is no moment without one where the system can swap two names
    (Linux); elsewhere a kill between two renamings leaves none, and the next write beside it puts the old one back.

    Raises:
        UserError: the place can't be written to.
    """
    with writing(target), workshop(target) as folder:
        new, old = folder / "new" / target.name, folder / "old" / target.name
        new.mkdir(parents=True)
        yield new
        for each in [*new.rglob("*"), new]:
            if each.is_file() or each.is_dir():
                flush_to_disk(each)
        if not (target.exists() and _swapped(new, target)):
            old.parent.mkdir()
            if target.exists():
                os.rename(target, old)
            try:
                os.rename(new, target)
            except OSError:
                if old.exists():
                    os.rename(old, target)
                raise
        flush_to_disk(target.parent)


@contextmanager
def workshop(path: Path) -> Iterator[Path]:
    """Give a hidden folder beside `path`, made with the folders above it, to write in; it is removed in the end.

    What processes that are dead have left beside `path` goes first. Raises OSError, and UserError for a NUL in `path`.
    """
    if "\0" in str(path):
        raise UserError(f"{str(path)!r} can't be a file's name")
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    folder, lock = _locked_folder(path)
    try:
        yield folder
    finally:
        _remove(folder)
        if lock is not None:
            os.close(lock)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk: a renaming never shows half of them."""
    if path.is_dir():
        with suppress(OSError):  # some file systems, and Windows, have no such wait for folders
            number = os.open(path, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


# What was left


def sweep(folder: Path) -> None:
    """Remove what processes that were killed left in a folder of what they were writing to it."""
    with suppress(FileNotFoundError):
        for name in os.listdir(folder):
            if name.startswith(".") and (found := _TEMPORARY.fullmatch(name)):
                _sweep(folder / name, found[1] if found[2] == "old" else "")


def _sweep(path: Path, name: str) -> None:
    """Remove one temporary, unless its writer lives; a folder that was moved aside and not replaced goes back.

    name: where to, where all of it is such a folder.
    """
    with suppress(OSError):  # someone else was quicker, or it is not ours to remove: it does no harm
        try:
            if (lock := try_lock(path)) is None:
                return
        except OSError:  # no locks on this file system
            if time.time() - path.lstat().st_mtime < _ABANDONED:
                return
            lock = None
        try:
            aside = [path] if name else list((path / "old").glob("*"))
            for each in aside:
                if not os.path.lexists(place := path.parent / (name or each.name)):
                    os.rename(each, place)
            _remove(path)
        finally:
            if lock is not None:
                os.close(lock)


def try_lock(path: Path) -> int | None:
    """Lock a file or folder until the returned number is closed, or the process ends; None where another holds it.

    Raises OSError where the file system has no locks, or there is no such file.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return number
    except BlockingIOError:
        os.close(number)
        return None
    except OSError:
        os.close(number)
        raise


def _locked_folder(path: Path) -> tuple[Path, int | None]:
    """A new hidden folder beside `path`, and its lock; None where there are none."""
    while True:
        folder = path.parent / f".{path.name[:_NAME]}.{uuid.uuid4().hex[:8]}.tmp"
        folder.mkdir()
        try:
            lock = try_lock(folder)
            if lock is not None and folder.exists():
                return folder, lock
            if lock is not None:
                os.close(lock)
        except FileNotFoundError:
            pass
        except OSError:
            return folder, None
        # Another process took it for left behind, between the two steps: once more.


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # its own trouble must not hide what led here
        return
    with suppress(OSError):
        path.unlink()


def _swapped(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system, or the file system, can't."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def cache_folder(name: str) -> Path:
    """Return the folder, which need not exist, of what is kept between runs and can be made anew at any time.

    It lies in the one that the environment variable LDM_CACHE names, else where the system keeps a user's caches.
    """
    own = os.environ.get("LDM_CACHE")
    if own:
        return Path(own) / name
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(base)) / "ldm-text-to-image" / name
