"""Files and folders are replaced when they are complete, and otherwise are as they were."""

import contextlib
import errno
import os
import shutil
import signal
import threading
import time

import pytest

from dph.data import atomic

FULL = os.strerror(errno.ENOSPC)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fail(error):
    raise error


def killed(number):
    os.kill(os.getpid(), number)
    time.sleep(1)  # Python runs the handler


def write_file(path, end):
    with atomic.atomic_file(path) as file:
        file.write(b"new" * 100_000)
        assert path.read_bytes() == b"old"
        end()


def write_folder(folder, end):
    with atomic.new_files(folder, last="a") as temporary:
        (temporary / "a").write_bytes(b"new")
        (temporary / "b").write_bytes(b"new")
        end()


ENDINGS = {
    "error": (lambda: fail(ValueError("x")), ValueError, "x"),
    "Ctrl-C": (lambda: fail(KeyboardInterrupt()), KeyboardInterrupt, None),
    "full disk": (lambda: fail(OSError(errno.ENOSPC, FULL)), OSError, FULL),
    "full disk, in Rust": (lambda: fail(Exception("I/O error: full (os error 28)")), OSError, FULL),
    **{number.name: (lambda number=number: killed(number), SystemExit, str(128 + number)) for number in atomic.ENDING},
}


@pytest.fixture(autouse=True)
def default_signals():
    """The actions of a new process, and a check that they are the same after the test."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in atomic.ENDING}
    yield
    after = [signal.signal(number, handler) for number, handler in before.items()]
    assert set(after) == {signal.SIG_DFL}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path, ending):
    end, kind, message = ENDINGS[ending]
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(kind, match=message) as raised:
        write_file(path, end)
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["out"])
    if kind is OSError:
        assert raised.value.filename == str(path)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_gets_all_files_or_none(tmp_path, ending, exists):
    end, kind, message = ENDINGS[ending]
    folder = tmp_path / "out"
    if exists:
        folder.mkdir()
        (folder / "other").write_bytes(b"other")
    before = [names(tmp_path), names(folder) if exists else None]
    with pytest.raises(kind, match=message) as raised:
        write_folder(folder, end)
    assert [names(tmp_path), names(folder) if exists else None] == before
    if kind is OSError:
        assert raised.value.filename == str(folder)
    write_folder(folder, lambda: None)
    assert names(tmp_path) == ["out"]
    assert names(folder) == (["a", "b", "other"] if exists else ["a", "b"])


def test_permissions_and_links_stay(tmp_path):
    old, link, hard = tmp_path / "old", tmp_path / "link", tmp_path / "hard"
    old.write_bytes(b"old")
    old.chmod(0o640)
    link.symlink_to("old")
    hard.hardlink_to(old)
    with atomic.atomic_file(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert (old.read_bytes(), old.stat().st_mode & 0o777, hard.read_bytes()) == (b"new", 0o640, b"old")
    (tmp_path / "dangling").symlink_to("made")
    before = os.umask(0o027)
    try:
        with atomic.atomic_file(tmp_path / "dangling") as file:
            file.write(b"made")
    finally:
        os.umask(before)
    assert ((tmp_path / "made").read_bytes(), (tmp_path / "made").stat().st_mode & 0o777) == (b"made", 0o640)
    assert names(tmp_path) == ["dangling", "hard", "link", "made", "old"]


def test_a_pipe_is_written_directly(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    thread = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    thread.start()
    with atomic.atomic_file(tmp_path / "pipe") as file:
        file.write(b"new")
    thread.join()
    assert (read, names(tmp_path)) == ([b"new"], ["pipe"])


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("", FileNotFoundError),
        ("no/x", FileNotFoundError),
        ("x/", FileNotFoundError),
        ("folder", IsADirectoryError),
        ("file/x", NotADirectoryError),
        ("loop", OSError),
        ("x" * 300, OSError),
    ],
)
def test_what_cannot_be_written_is_an_error_at_once(tmp_path, monkeypatch, name, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(error) as raised:
        atomic.check_writable(name)
    assert raised.value.filename == name
    if name:
        with pytest.raises((NotADirectoryError, OSError)):
            atomic.check_new_files("file/x" if name == "folder" else f"file/{name}")
    assert names(tmp_path) == ["file", "folder", "loop"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_an_error_at_once(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        atomic.check_writable(tmp_path / "x")
    with pytest.raises(PermissionError):
        atomic.check_new_files(tmp_path / "x")


@pytest.mark.parametrize("exists", [False, True])
def test_two_processes_at_once_do_not_mix(tmp_path, exists):
    """Each has its own temporary folder; of a new directory, the first to end is the one that makes it."""
    folder = tmp_path / "out"
    if exists:
        folder.mkdir()
    ending = contextlib.nullcontext() if exists else pytest.raises(OSError, match="not empty")
    with ending as raised, atomic.new_files(folder, last="a") as one:
        (one / "a").write_bytes(b"one")
        with atomic.new_files(folder, last="a") as two:
            (two / "a").write_bytes(b"two")
            (two / "b").write_bytes(b"two")
        assert [path.read_bytes() for path in (folder / "a", folder / "b")] == [b"two", b"two"]
        (one / "b").write_bytes(b"one")
    expected = b"one" if exists else b"two"
    assert [path.read_bytes() for path in (folder / "a", folder / "b")] == [expected, expected]
    assert (names(tmp_path), names(folder)) == (["out"], ["a", "b"])
    if not exists:
        assert raised.value.filename == str(folder)


def write_slowly(folder, text, written, go_on):
    with atomic.new_files(folder, last="a") as temporary:
        (temporary / "a").write_text(text)
        (temporary / "b").write_text(text)
        written.set()
        go_on.wait()


def test_moves_of_two_processes_come_one_after_the_other(tmp_path, monkeypatch):
    """Into a directory that exists, files are moved one by one: all that stay are those of one process."""
    moved, threads = [], []

    def move_slowly(path, to):
        moved.append(path)
        time.sleep(0.05)
        os.replace(path, to)

    monkeypatch.setattr(atomic.Path, "replace", move_slowly)
    for text in ("one", "two"):
        written, go_on = threading.Event(), threading.Event()
        threads.append((threading.Thread(target=write_slowly, args=(tmp_path, text, written, go_on)), written, go_on))
    for thread, written, _ in threads:
        thread.start()
        written.wait()
    for _, _, go_on in threads:
        go_on.set()
    for thread, _, _ in threads:
        thread.join()
    assert [path.parent for path in moved[:2]] == [moved[0].parent] * 2
    assert [path.parent for path in moved[2:]] == [moved[2].parent] * 2
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


@pytest.mark.parametrize("exists", [False, True])
def test_folders_of_killed_processes_are_deleted(tmp_path, exists):
    """When they hold no lock and are not new: another process may be about to lock its own."""
    folder = tmp_path / "out"
    if exists:
        folder.mkdir()
    within, name = (folder, "new") if exists else (tmp_path, "out")
    left, young, other = (
        within / f".{word}.partial" for word in (f"{name}.00000000", f"{name}.11111111", "x.22222222")
    )
    for path in (left, young, other):
        path.mkdir()
        (path / "a").write_bytes(b"half")
    for path in (left, other):
        os.utime(path, (0, 0))
    with atomic.new_files(folder, last="a") as temporary:
        (temporary / "a").write_bytes(b"new")
        assert not left.exists()
        os.utime(temporary, (0, 0))  # locked: it is in use, however old it is
        atomic._delete_abandoned(within, name)
        assert temporary.exists()
        shutil.rmtree(young)
        if exists:
            assert atomic.is_temporary(temporary)
    assert names(within) == sorted([".x.22222222.partial", "a" if exists else "out"])


def test_a_text_is_written_atomically_in_utf_8(tmp_path):
    atomic.write_text(tmp_path / "a", "ä\n")
    assert (tmp_path / "a").read_bytes() == "ä\n".encode()
    assert names(tmp_path) == ["a"]
    for leftover in (tmp_path / ".a.00000000.partial", tmp_path / ".b.old", tmp_path / ".c.partial"):
        leftover.touch() if "a" in leftover.name[:2] else leftover.mkdir()
        atomic.clean_up(leftover)
    assert names(tmp_path) == ["a", "b"]
