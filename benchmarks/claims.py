"""What claims and listings of a stage cost on a store.

``python -m benchmarks.claims URL``: a folder or a URL; ``--s3`` in its place starts the S3 server
of the tests. Prints a JSON object: milliseconds an operation, medians; of taking a claim and giving
it back; and of a look at one of many shards that are not there.
"""

import argparse
import json
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from opdcache.store.cache import Cache
from opdcache.store.objects import ObjectStore

TURNS, SHARDS = 50, 200
LISTED = (10, 100, 1_000)


def main() -> None:
    """Measure, and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("url", nargs="?")
    arguments.add_argument("--s3", action="store_true")
    given = arguments.parse_args()
    with ExitStack() as stack:
        url = given.url
        if given.s3:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            server = import_module("tests.s3_server")
            stack.enter_context(server.s3_server(folder))
            url = f"s3://{server.BUCKET}/claims"
        print(json.dumps(measured(f"{url}/{secrets.token_hex(4)}"), indent=1))


def measured(url: str) -> dict[str, Any]:
    """The costs on an empty place of a store."""
    objects = ObjectStore(f"{url}/plain")
    found: dict[str, Any] = {
        "create_ms": _median(lambda i: objects.create(f"x/{i}", b"x" * 200)),
        "get_ms": _median(lambda i: objects.get(f"x/{i}")),
        "rewrite_ms": _median(lambda i: objects.put(f"x/{i}", b"y" * 200)),
        "delete_ms": _median(lambda i: objects.delete(f"x/{i}")),
    }
    for count in LISTED:
        for number in range(count):
            objects.put(f"{count}/{number}", b"x")
        found[f"list_{count}_ms"] = _median(partial(_listed, objects, str(count)), 10)
    cache = Cache(f"{url}/cache")
    found["claim_ms"] = _median(lambda i: _claim(cache, f"{i:064x}"))
    absent = [f"{number:064x}" for number in range(SHARDS)]
    found["look_ms"] = _median(lambda i: cache.committed_rollouts(absent), 5) / SHARDS
    return {name: round(value, 2) for name, value in found.items()}


def _listed(objects: ObjectStore, prefix: str, turn: int) -> None:
    for _ in objects.list(prefix):
        pass


def _claim(cache: Cache, key: str) -> None:
    with cache.claims.hold("rollouts", key) as mine:
        assert mine


def _median(do: Callable[[int], object], turns: int = TURNS) -> float:
    """Milliseconds."""
    took = []
    for turn in range(turns):
        began = time.monotonic()
        do(turn)
        took.append(1e3 * (time.monotonic() - began))
    return statistics.median(took)


if __name__ == "__main__":
    main()
