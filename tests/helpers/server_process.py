"""``dph serve`` in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """A process of ``dph serve``."""

    def __init__(self, model, log, *options, **environment):
        self.log = log
        with log.open("wb") as file:
            command = [sys.executable, "-m", "dph.cli", "serve", str(model), "--port", "0", "--cache-mib", "8"]
            self.process = subprocess.Popen(
                [*command, *map(str, options)],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True, env={**os.environ, **environment},
            )  # fmt: skip
        self.line = self.process.stdout.readline()
        assert " at http" in self.line, log.read_text()
        self.url = self.line.split(" at ")[1].split(",")[0]
        self.port = int(self.url.rpartition(":")[2])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """A test that fails leaves no process."""
        self.process.kill()
        self.process.wait()

    def post(self, body, path="/v1/chat/completions"):
        """The JSON of a response, or the whole text of a stream."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            content = response.read().decode()
        return content if body.get("stream") else json.loads(content)

    def figure(self, name):
        """A number of /metrics."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def wait_for(self, name, value, seconds=60):
        end = time.monotonic() + seconds
        while (figure := self.figure(name)) != value:
            assert time.monotonic() < end, (name, figure)
            time.sleep(0.02)

    def stop(self, number=signal.SIGTERM):
        """The exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(60)
