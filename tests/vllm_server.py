"""A real vLLM server on a loopback port, for as long as the tests that ask it last."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .s3_server import free_ports

START_S = 240
API_KEY = "a-secret-of-the-tests"


class VllmServer:
    """A server of one model, under a name."""

    def __init__(self, folder: Path, model: Path, name: str, *arguments: str) -> None:
        self._log = folder / "log"
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self._command = [
            sys.executable,
            *["-m", "vllm.entrypoints.openai.api_server"],
            *[f"--model={model}", f"--served-model-name={name}", f"--api-key={API_KEY}"],
            *["--host=127.0.0.1", f"--port={port}"],
            *["--enforce-eager", "--no-enable-prefix-caching", "--no-enable-chunked-prefill"],
            *arguments,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env={**os.environ, **quiet}
            )
        deadline = time.monotonic() + START_S
        while not self._is_healthy():
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.2)

    def stop(self) -> None:
        """End it, and the engine that it started."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except OSError:
            return False


@contextmanager
def vllm_server(folder: Path, model: Path, name: str, *arguments: str) -> Iterator[VllmServer]:
    """A running server."""
    server = VllmServer(folder, model, name, *arguments)
    try:
        server.start()
        yield server
    finally:
        server.stop()
