"""``dph serve``: what is refused before it serves."""

import socket

import pytest

from dph.cli import serve


def test_missing_packages_are_named(refused, models, monkeypatch):
    monkeypatch.setattr(serve, "PACKAGES", ("fastapi_that_is_not_there", "json"))
    line = refused("serve", models / "judge")
    assert line.endswith("expected the packages fastapi_that_is_not_there, got none: pip install 'dph[serve]'")


@pytest.mark.parametrize(
    ("key", "expected"),
    [("s3cret\n", "s3cret"), ("", None), ("two words", None), ("\u00e9", None), (None, None)],
)
def test_the_key_of_a_file(key, expected, tmp_path, monkeypatch):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    file = tmp_path / "key"
    if key is None:
        assert serve.read_key(None) is None
        monkeypatch.setenv(serve.KEY_VARIABLE, "other")
        assert serve.read_key(None) == "other"
        return
    file.write_text(key, encoding="utf-8")
    if expected is None:
        with pytest.raises(ValueError, match="key: expected a key of visible ASCII characters"):
            serve.read_key(file)
    else:
        assert serve.read_key(file) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "argument --port: expected a port from 0 (any free one) to 65535, got '70000'"),
        (["--timeout", "0"], "argument --timeout: expected a number of seconds up to 86400, got '0'"),
        (["--api-key-file", "nothing"], "nothing: No such file or directory"),
        (["--host", "256.0.0.1"], "--host, --port: expected a free address, got 256.0.0.1 port 8000"),
        (["--head", "nice"], "expected one of default, short, got 'nice'"),
        (["--best-of", "200"], "--best-of: expected at most --max-candidates (128), got 200"),
    ],
)
def test_wrong_options(refused, models, options, message):
    for package in serve.PACKAGES:
        pytest.importorskip(package, reason="the server needs the extra serve")
    assert message in refused("serve", models / "judge", "--cache-mib", 8, *options)


def test_a_port_that_is_taken(refused, models):
    for package in serve.PACKAGES:
        pytest.importorskip(package, reason="the server needs the extra serve")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused("serve", models / "judge", "--port", port)
    assert f"--host, --port: expected a free address, got 127.0.0.1 port {port}: " in line
