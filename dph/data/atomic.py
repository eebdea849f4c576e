"""Files and folders that get their name when they are complete; until then the old ones stay as they were."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import BinaryIO

ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU)
"""Signals that end a process at once if it does not handle them; Python turns Ctrl-C into an exception itself."""

NEW = ".new.partial"
"""Temporary folder of :func:`new_files` in a directory that exists."""


# Files


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Binary file that replaces ``path`` if the block succeeds; after an error or a signal the old file is as it was.

    The temporary file ``.NAME.XXXXXXXX.partial`` is in the same folder and is deleted unless the process is killed. The
    new file has the permissions and the owner of the old one; the target of a symbolic link is replaced, not the link.
    Pipes, devices and the process's own stdout cannot be replaced: they are written directly.

    Raises OSError with the name ``path``.
    """
    target = _replaceable(path)
    if target is None:
        with naming(path), _open_directly(path) as file:
            yield file
        return
    with _temporary_file(path, target) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, target)
    sync(target.parent)


def check_writable(path: str | Path) -> None:
    """Raise the OSError that :func:`atomic_file` would raise for ``path``."""
    target = _replaceable(path)
    if target is not None:
        with _temporary_file(path, target):
            pass


def _replaceable(path: str | Path) -> Path | None:
    """Return the file that ``path`` names, symbolic links followed; None if it can only be written directly."""
    name = os.fspath(path)
    try:
        status = os.stat(name)
    except FileNotFoundError:
        if not os.path.basename(name):  # no name, or one that ends in a slash
            raise
        return Path(os.path.realpath(name))
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    if not os.access(name, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
    if _standard_stream(status) is not None or not stat.S_ISREG(status.st_mode) or not status.st_nlink:
        return None
    return Path(os.path.realpath(name))


def _standard_stream(status: os.stat_result) -> int | None:
    """Return the descriptor of stdout or stderr if this file or pipe is open there, else None."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), status) and not stat.S_ISCHR(status.st_mode):
                return descriptor
    return None


def _open_directly(path: str | Path) -> BinaryIO:
    """Open what cannot be replaced. A standard stream is shared, so that its position moves for both writers."""
    descriptor = _standard_stream(os.stat(path))
    return open(path if descriptor is None else os.dup(descriptor), "wb")


@contextlib.contextmanager
def _temporary_file(path: str | Path, target: Path) -> Iterator[BinaryIO]:
    """New file in the folder of ``target``, deleted at the end of the block unless it was renamed."""
    temporary = target.with_name(f".{target.name[:24]}.{os.urandom(4).hex()}.partial")
    with _ending_signals_raise(), naming(path, temporary):
        try:
            with open(temporary, "xb") as file:
                with contextlib.suppress(FileNotFoundError):
                    _copy_permissions(os.stat(target), file.fileno())
                yield file
        finally:
            temporary.unlink(missing_ok=True)


def _copy_permissions(old: os.stat_result, descriptor: int) -> None:
    with contextlib.suppress(PermissionError):  # only root can give a file to another user
        os.fchown(descriptor, old.st_uid, old.st_gid)
    with contextlib.suppress(PermissionError):  # some file systems have no permissions
        os.fchmod(descriptor, old.st_mode & 0o777)


# Folders


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Temporary directory that replaces ``path`` if the block succeeds and is deleted if it raises.

    Raises OSError, which names ``path`` unless it names another file, for example if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old")
    with _temporary_directory(path, temporary):
        yield temporary
        _finish(temporary)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        temporary.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def new_files(path: str | Path, last: str) -> Iterator[Path]:
    """Temporary directory; its files appear in the directory ``path`` if the block succeeds.

    A directory that does not exist appears with all of them at once. In one that exists, other files stay, and the file
    ``last``, without which the directory cannot be opened, comes last. Errors as :func:`atomic_directory`.
    """
    directory = Path(os.path.realpath(path))
    if not directory.exists():
        with naming(path), atomic_directory(directory) as temporary:
            yield temporary
        return
    temporary = directory / NEW
    with _temporary_directory(Path(path), temporary):
        yield temporary
        _finish(temporary)
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == last):
            file.replace(directory / file.name)
    sync(directory)


def check_new_files(path: str | Path) -> None:
    """Raise the OSError that :func:`new_files` would raise for ``path``, if it can be foreseen."""
    directory = Path(os.path.realpath(path))
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))


@contextlib.contextmanager
def _temporary_directory(path: Path, temporary: Path) -> Iterator[None]:
    """Create the directory ``temporary``, and delete it at the end of the block unless it was renamed."""
    with _ending_signals_raise(), naming(path, temporary):
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
        try:
            temporary.mkdir()
            yield
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _finish(folder: Path) -> None:
    """Flush a folder's files to the disk, readable as the folder is."""
    make_readable(folder)
    for entry in [*folder.rglob("*"), folder]:
        sync(entry)


def clean_up(leftover: Path) -> None:
    """Delete a directory that a killed ``atomic_directory`` left; if ``path`` is missing, rename ``old`` back to it."""
    path = leftover.with_name(leftover.name[1:].removesuffix(leftover.suffix))
    if leftover.suffix == ".old" and not path.exists():
        leftover.rename(path)
    else:
        shutil.rmtree(leftover)


def make_readable(folder: Path) -> None:
    """Give the files in ``folder`` its read and write permissions; safetensors writes files with mode 0600."""
    readable = folder.stat().st_mode & 0o666
    for file in filter(Path.is_file, folder.rglob("*")):
        if readable & ~file.stat().st_mode:
            with contextlib.suppress(PermissionError):  # some file systems have no permissions
                file.chmod(readable)


# Both


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk (fsync); some file systems cannot do so for directories."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: str | Path, temporary: Path | None = None) -> Iterator[None]:
    """Context for writing ``path``: errors without a file's name, as those of a full disk, are OSError with ``path``.

    So are errors that name ``temporary`` or a file in it, and those of libraries in Rust (safetensors, tokenizers).
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        if error.filename is None or (temporary is not None and _is_in(error.filename, temporary)):
            raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error
        raise
    except ValueError:  # of the user's input
        raise
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error


def _is_in(filename: str | bytes | int, folder: Path) -> bool:
    return not isinstance(filename, int) and Path(os.fsdecode(filename)).is_relative_to(folder)


@contextlib.contextmanager
def _ending_signals_raise() -> Iterator[None]:
    """Context in which signals that would end the process at once raise SystemExit, so that files are deleted.

    Signals with a handler are left alone, and all of them outside the main thread, since Python allows no handlers
    there.
    """
    replaced = []
    if threading.current_thread() is threading.main_thread():
        replaced = [number for number in ENDING if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in replaced:
            signal.signal(number, _exit)
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
