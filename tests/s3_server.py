"""A real S3 server on loopback ports, for as long as a test session lasts."""

import os
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BUCKET = "bucket"
START_S = 120


class S3Server:
    """SeaweedFS in a folder; it can be killed, and started again on what it had stored."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Its parts also listen 10,000 above.
        self._ports = dict(zip(("master", "volume", "filer", "s3"), free_ports(4), strict=True))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables by which obstore finds it."""
        return {
            "AWS_ENDPOINT": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test-key-id",
            "AWS_SECRET_ACCESS_KEY": "test-secret-key",
        }

    def start(self) -> None:
        """Start, and wait until it answers; the bucket is there."""
        ports = [f"-{name}.port={port}" for name, port in self._ports.items()]
        limits = ["-volume.max=50", "-master.volumeSizeLimitMB=64", "-volume.minFreeSpace=0"]
        others = ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # fixed ports, of no use here
        at_once = ["-master.raftHashicorp", "-master.raftBootstrap"]  # it leads, without a vote
        environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
        address = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    Path(sysconfig.get_path("scripts")) / "weed",
                    "server",
                    f"-dir={self._folder}",
                    *address,
                    "-filer",
                    "-s3",
                    *limits,
                    *others,
                    *at_once,
                    *ports,
                ],
                stdout=log,
                stderr=log,
                env=environment,  # it would take a client's credentials for its administrator's
            )
        deadline = time.monotonic() + START_S
        while not self._has_bucket():
            assert self._process.poll() is None, (self._folder / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.2)

    def kill(self) -> None:
        """End it at once."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _has_bucket(self) -> bool:
        request = urllib.request.Request(f"{self.endpoint}/{BUCKET}", method="PUT")
        try:
            with urllib.request.urlopen(request, timeout=5):
                return True
        except urllib.error.HTTPError as error:
            return error.code == 409  # it is there
        except OSError:
            return False


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """A running server; its environment variables are set meanwhile."""
    server = S3Server(folder)
    server.start()
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    try:
        yield server
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        with suppress(ProcessLookupError):
            server.kill()


def free_ports(count: int) -> list[int]:
    """Ports that are free, and free 10,000 above."""
    found: list[int] = []
    held: list[socket.socket] = []
    while len(found) < count:
        low = socket.socket()
        low.bind(("127.0.0.1", 0))
        held.append(low)
        port = low.getsockname()[1]
        high = socket.socket()
        held.append(high)
        with suppress(OSError, OverflowError):
            high.bind(("127.0.0.1", port - 10_000))
            found.append(port - 10_000)
    for each in held:
        each.close()
    return found
