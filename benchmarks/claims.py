"""What claims, commits and listings of a stage cost on a store.

``python -m benchmarks.claims URL``: a folder or a URL; ``--s3`` in its place starts the S3 server
of the tests. Prints a JSON object: milliseconds an operation, medians; and what a stage takes a
shard beside the shard itself, and a waiting worker a look.
"""

import argparse
import json
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from opdcache.identity import key_of
from opdcache.schemas.manifests import RolloutIdentity, RolloutManifest
from opdcache.stage import Silent, Worker, make_shards
from opdcache.store.cache import Attempt, Cache
from opdcache.store.objects import ObjectStore
from tests.s3_server import BUCKET, s3_server
from tests.shards import rollout_identity, write_rollouts

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
            stack.enter_context(s3_server(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
            url = f"s3://{BUCKET}/claims"
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
        objects.each(lambda i, n=count: objects.put(f"{n}/{i}", b"x"), range(count))
        found[f"list_{count}_ms"] = _median(lambda i, n=count: list(objects.list(str(n))), 10)
    cache, tasks = Cache(f"{url}/cache"), _tasks()
    began = time.monotonic()
    _stage(cache, tasks)
    made_s = time.monotonic() - began
    alone = Cache(f"{url}/alone")
    began = time.monotonic()
    for identity in tasks.values():
        attempt = alone.attempt(key_of(identity))
        alone.commit(attempt, write_rollouts(attempt, identity))
    found["claims_a_shard_ms"] = 1e3 * (made_s - (time.monotonic() - began)) / len(tasks)
    began = time.monotonic()
    _stage(cache, tasks)
    found["look_a_shard_ms"] = 1e3 * (time.monotonic() - began) / len(tasks)
    return {name: round(value, 2) for name, value in found.items()}


def _tasks() -> dict[str, RolloutIdentity]:
    identities = [rollout_identity(f"shard {number}") for number in range(SHARDS)]
    return {key_of(identity): identity for identity in identities}


def _stage(cache: Cache, tasks: dict[str, RolloutIdentity]) -> None:
    def compute(identity: RolloutIdentity, attempt: Attempt) -> RolloutManifest:
        return write_rollouts(attempt, identity)

    make_shards(
        cache,
        "rollouts",
        tasks,
        is_done=lambda identity: cache.rollouts(key_of(identity)) is not None,
        compute=compute,
        worker=Worker(),
        progress=Silent(),
    )


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
