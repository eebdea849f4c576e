"""The command with streams that are closed, full, without a reader, or of another encoding, started by a shell."""

import errno
import io
import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dph.cli import chat, common, streams
from dph.errors import printable

ROOT = Path(__file__).parents[2]

# A command that says much on both streams by all ways, then writes a file. It prints "low" for a low descriptor.
WORK = """
import logging, os, sys, warnings
import dph.cli.main as main
def run(args):
    with open("file", "w") as file:
        print("low" if file.fileno() < 3 else "x" * 100_000)
        for i in range(200):
            logging.getLogger("dph.work").warning("one\\n\\x1b[2J " + 100 * "y")
            warnings.warn(f"two {i} \\x9b", stacklevel=1)
            print("three", file=sys.stderr, flush=True)
            os.write(2, b"four\\n") if os.environ.get("RAW") else None
        file.write("done")
import dph.cli.doctor as command
command.run = run
sys.exit(main.main(["doctor"]))
"""
ENOSPC, EBADF = "stdout: No space left on device", "stdout: Bad file descriptor"


def shell(folder, redirection, code=WORK, **environment):
    """The exit code of a Python script with redirected streams, what is left of its output, and of its errors."""
    (folder / "script.py").write_text(code)
    if "/dev/full" in redirection and not stat.S_ISCHR(os.stat("/dev/full").st_mode):
        pytest.skip("/dev/full is no device here")
    command = f"set -o pipefail; {sys.executable} script.py {redirection}"
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=variables, capture_output=True, text=True)
    for word in ("Traceback", "Exception ignored", "Logging error", "low"):
        assert word not in done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("redirection", "code", "error"),
    [
        ("", 0, ""),
        ("<&-", 0, ""),
        ("| head -c 9", 1, ""),
        (">/dev/full", 1, ENOSPC),
        (">&-", 1, EBADF),
        ("2>/dev/full", 0, None),
        ("2>&-", 0, None),
        ("<&- >&- 2>&-", 1, None),
        (">/dev/full 2>&1", 1, None),
        ("2>&1 | head -c 9", 1, None),
    ],
)
def test_no_stream_ends_the_work(tmp_path, redirection, code, error):
    got, out, err = shell(tmp_path, redirection)
    assert got == code
    if "| head" not in redirection:  # the first print ends a command whose reader is gone
        assert (tmp_path / "file").read_text() == ("done" if code == 0 else "")
    if error is None:
        assert err == ""
    else:
        last = err.splitlines()[-1] if err else ""
        assert last == f"dph: error: {error}" if error else "dph: error" not in err
    if code == 0:
        assert out == "x" * 100_000 + "\n"
    if not redirection:
        assert err.count("one\\n\\x1b[2J y") == 200
        assert err.count("199 \\x9b\n") == 1


def test_libraries_do_not_write_into_a_data_file(tmp_path):
    assert shell(tmp_path, "<&- 2>&-", RAW="1")[0] == 0
    assert (tmp_path / "file").read_text() == "done"


@pytest.mark.parametrize("words", ["--help", "--version", "train --options", "plot run --help"])
def test_help_that_cannot_be_written_is_an_error(tmp_path, words):
    code = f"import sys, dph.cli.main; sys.exit(dph.cli.main.main({words.split()}))"
    assert shell(tmp_path, ">/dev/full", code) == (1, "", f"dph: error: {ENOSPC}\n")


def test_an_error_after_output_that_cannot_be_written(tmp_path):
    """The flush at Python's exit neither changes the exit code nor prints."""
    for error, expected in (("KeyboardInterrupt", 1), ("SystemExit(3)", 1), ("ValueError('x')", 1)):
        code = WORK.replace('    with open("file", "w") as file:', f'    print("x")\n    raise {error}\n    if 1:')
        assert shell(tmp_path, ">/dev/full", code) == (expected, "", f"dph: error: {ENOSPC}\n")


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_characters_that_the_terminal_lacks_are_escaped(tmp_path, environment):
    code = (
        "import sys, dph.cli.main as main, dph.cli.doctor as command\n"
        "from dph.cli import common\n"
        "command.run = lambda args: print('é漢\\udc80') or common.print_json({'a': '漢\\udc80'})\n"
        "main.main(['doctor']); sys.exit(main.main(['é漢']))"
    )
    got, out, err = shell(tmp_path, "", code, **environment)
    assert got == 2
    line, text = out.splitlines()
    assert line in ("\\xe9\\u6f22\\udc80", "é漢\\udc80")
    assert json.loads(text) == {"a": "漢\udc80"}
    assert "invalid choice" in err


# In this process


def test_stdin_that_cannot_be_read_is_named(monkeypatch):
    def read(prompt):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.input", read)
    with pytest.raises(OSError, match="Input/output error: 'stdin'"):
        chat._read_line("")


@pytest.mark.parametrize("text", ["\x9b\x85\u2028\u2029\u202e", "\ud83d", "\x00\x1b\x7f", 'é漢🙂"\\'])
def test_json_is_one_line_without_control_characters(text, monkeypatch):
    for encoding in ("utf-8", "ascii", "latin-1"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        common.print_json({text: [text, float("nan")]}, flush=True)
        line = stream.buffer.getvalue().decode(encoding)
        assert json.loads(line) == {text: [text, None]}
        assert len(line.splitlines()) == 1
        assert printable(line) == line


def test_log_records_of_others_keep_their_lines():
    for name, message in (("dph.x", "a\\nb\\x1b"), ("dphx", "a\nb\\x1b")):
        assert streams._Record(name, logging.INFO, "", 0, "a\nb%s", ("\x1b",), None).getMessage() == message


@pytest.mark.parametrize("redirection", [">/dev/full", "| true"])
def test_an_error_of_the_command_is_not_replaced_by_one_of_its_output(redirection, tmp_path):
    code = """
import sys
import dph.cli.main as main
import dph.cli.doctor as command
def run(args):
    print("a line")
    raise RuntimeError("the error")
command.run = run
sys.exit(main.main(["doctor"]))
"""
    assert shell(tmp_path, redirection, code, PYTHONUNBUFFERED="") == (1, "", "dph: error: the error\n")
