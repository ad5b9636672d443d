"""A worker of its own process: ``python -m tests.faults.worker CACHE LEASE_S SECONDS NAMES…``.

Makes the named shards, each of which takes so long, and prints how many it committed.
"""

import sys
import time

from opdcache.identity import key_of
from opdcache.schemas.manifests import RolloutIdentity, RolloutManifest
from opdcache.stage import Silent, Worker, make_shards
from opdcache.store.cache import Attempt, Cache
from opdcache.store.claims import Claims

from ..shards import write_rollouts
from ..test_stage import tasks


def work(url: str, names: list[str], *, lease_s: float = 60.0, takes_s: float = 0.0) -> int:
    """Make shards; how many this call committed."""
    cache = Cache(url)
    cache.claims = Claims(cache.objects, lease_s)

    def compute(identity: RolloutIdentity, attempt: Attempt) -> RolloutManifest:
        time.sleep(takes_s)
        return write_rollouts(attempt, identity)

    return make_shards(
        cache,
        "rollouts",
        tasks(names),
        is_done=lambda identity: cache.rollouts(key_of(identity)) is not None,
        compute=compute,
        worker=Worker(),
        progress=Silent(),
        poll_s=0.05,
    )


if __name__ == "__main__":
    url, lease_s, takes_s, *names = sys.argv[1:]
    print("ready", time.time(), flush=True)
    sys.stdin.readline()
    print(work(url, names, lease_s=float(lease_s), takes_s=float(takes_s)))
