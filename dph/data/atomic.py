"""Files and folders that get their name when they are complete; until then the old ones stay as they were."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import BinaryIO

ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU)
"""Signals that end a process at once if it does not handle them; Python turns Ctrl-C into an exception itself."""

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
"""Names of the temporary files and folders of this module, but for those of :func:`atomic_directory`."""

ABANDONED = 60  # seconds after which a temporary folder without a lock is that of a killed process


def temporary_name(name: str) -> str:
    """Return a name that no other process uses: ``.NAME.XXXXXXXX.partial``."""
    return f".{name[:24]}.{os.urandom(4).hex()}.partial"


# Files


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Binary file that replaces ``path`` if the block succeeds; after an error or a signal the old file is as it was.

    The temporary file ``.NAME.XXXXXXXX.partial`` is in the same folder and is deleted unless the process is killed. The
    new file has the permissions and the owner of the old one; the target of a symbolic link is replaced, not the link.
    Pipes, devices and the process's own stdout cannot be replaced: they are written directly.

    Raises OSError with the name ``path``.
    """
    target = replaceable(path)
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


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, as :func:`atomic_file` does."""
    with atomic_file(path) as file:
        file.write(text.encode())


def check_writable(path: str | Path) -> None:
    """Raise the OSError that :func:`atomic_file` would raise for ``path``."""
    target = replaceable(path)
    if target is not None:
        with _temporary_file(path, target):
            pass


def replaceable(path: str | Path) -> Path | None:
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
    temporary = target.with_name(temporary_name(target.name))
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

    Only one process at a time may write to ``path``: the temporary directory is ``.NAME.partial``, the old one is for a
    moment ``.NAME.old``, and :func:`clean_up` deals with those of a killed process.

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

    Of several processes that write to ``path`` at the same time, each has a temporary directory of its own, and all
    files are those of one of them. OSError if another process has made a directory that did not exist before.
    """
    directory = Path(os.path.realpath(path))
    exists = directory.exists()
    folder, name = (directory, "new") if exists else (directory.parent, directory.name)
    with naming(path):
        folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / temporary_name(name)
    with _temporary_directory(Path(path), temporary), _locked(temporary):
        _delete_abandoned(folder, name)
        yield temporary
        _finish(temporary)
        if exists:
            with _locked(directory):
                for file in sorted(temporary.iterdir(), key=lambda file: file.name == last):
                    file.replace(directory / file.name)
        else:
            temporary.rename(directory)
    sync(folder)


def is_temporary(path: Path) -> bool:
    """Return whether ``path`` has the name of a temporary file or directory, as a killed process leaves it."""
    return TEMPORARY.fullmatch(path.name) is not None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Context in which no other process has locked ``folder``; some file systems have no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _delete_abandoned(folder: Path, name: str) -> None:
    """Delete the temporary directories for ``name`` in ``folder`` that killed processes left, which hold no lock."""
    for path in folder.glob(".*.partial"):
        if not is_temporary(path) or not path.name.startswith(f".{name[:24]}.") or not path.is_dir():
            continue
        with contextlib.suppress(OSError):  # it is locked, or another process deletes it
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - path.stat().st_mtime > ABANDONED:  # not between its creation and its lock
                    shutil.rmtree(path)
            finally:
                os.close(descriptor)


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
    """Delete what a killed process left under a temporary name; rename an ``.old`` back whose ``path`` is missing."""
    path = leftover.with_name(leftover.name[1:].removesuffix(leftover.suffix))
    if leftover.suffix == ".old" and not path.exists():
        leftover.rename(path)
    elif leftover.is_dir():
        shutil.rmtree(leftover)
    else:
        leftover.unlink()


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
