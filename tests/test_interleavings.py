"""Crashes, resumes, clean-ups and workers that meet, in any order: one sound shard a key."""

from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from opdcache.identity import key_of
from opdcache.schemas.manifests import RolloutIdentity, RolloutManifest
from opdcache.stage import Silent, Worker, make_shards
from opdcache.store.cache import Attempt, Cache
from opdcache.store.upkeep import collect, garbage, verify

from .shards import rollout_identity, table, write_rollouts

NAMES = ("pinned", "unused")
KEYS = {name: key_of(rollout_identity(name)) for name in NAMES}
EVERYTHING_IS_OLD = timedelta(seconds=-5)
names = st.sampled_from(NAMES)


@dataclass
class Making:
    """A worker's try at a shard: a claim, if it still has one, and what it has written."""

    name: str
    attempt: Attempt
    claim: ExitStack | None
    manifest: RolloutManifest | None = None


class Interleavings(RuleBasedStateMachine):
    """Workers step by step on one cache; every try samples other tokens, as an engine may."""

    making = Bundle("making")

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache("memory://")
        self.cache.pin("a run", "rollouts", [KEYS["pinned"]])
        self.committed: dict[str, RolloutManifest] = {}
        self.unclaimed: list[Making] = []
        self.rng = np.random.default_rng(0)

    def written(self, name: str, attempt: Attempt) -> RolloutManifest:
        tokens = self.rng.integers(1000, size=3).tolist()
        return write_rollouts(attempt, rollout_identity(name), table(tokens, []))

    @rule(target=making, name=names)
    def take(self, name: str) -> object:
        """A worker claims a key, unless another has it or the shard is there."""
        claim = ExitStack()
        if not claim.enter_context(self.cache.claims.hold("rollouts", KEYS[name])):
            claim.close()
            return multiple()
        return Making(name, self.cache.attempt(KEYS[name]), claim)

    @rule(target=making, name=names)
    def come_back(self, name: str) -> Making:
        """A worker whose lease ran out, and who does not know it."""
        late = Making(name, self.cache.attempt(KEYS[name]), None)
        self.unclaimed.append(late)
        return late

    @rule(one=making)
    def write(self, one: Making) -> None:
        if one.manifest is None:
            one.manifest = self.written(one.name, one.attempt)

    @rule(one=consumes(making))
    def commit(self, one: Making) -> None:
        if one.manifest is None:
            self.write(one)
        assert one.manifest is not None
        won = self.cache.commit(one.attempt, one.manifest)
        assert won == (one.name not in self.committed)
        self.committed.setdefault(one.name, one.manifest)
        if not won:
            prefix = f"data/{KEYS[one.name][:2]}/{KEYS[one.name]}/{one.attempt.name}"
            assert list(self.cache.objects.list(prefix)) == []
        self.let_go(one)

    @rule(one=consumes(making))
    def crash(self, one: Making) -> None:
        """What it wrote stays; its claim ends as the lease does."""
        self.let_go(one)

    def let_go(self, one: Making) -> None:
        if one.claim is not None:
            one.claim.close()
        else:
            self.unclaimed.remove(one)

    @precondition(lambda self: not self.unclaimed)  # against them there is the grace
    @rule()
    def clean_up(self) -> None:
        held = {i.path.split("/")[2].split(".")[0] for i in self.cache.objects.list("claims")}
        collect(self.cache, garbage(self.cache, grace=EVERYTHING_IS_OLD))
        if KEYS["unused"] not in held:
            self.committed.pop("unused", None)
        there = {i.path.split("/")[3] for i in self.cache.objects.list("data")}
        kept = {manifest.attempt for manifest in self.committed.values()}
        assert kept <= there
        assert {i.path.split("/")[2] for i in self.cache.objects.list("data")} <= {
            *held,
            *(KEYS[name] for name in self.committed),
        }

    @precondition(lambda self: not list(self.cache.objects.list("claims")))
    @rule()
    def resume(self) -> None:
        """A fresh worker runs the stage: all that is missing is made, and nothing else."""

        def compute(identity: RolloutIdentity, attempt: Attempt) -> RolloutManifest:
            self.committed[identity.student] = self.written(identity.student, attempt)
            return self.committed[identity.student]

        missing = set(NAMES) - set(self.committed)
        made = make_shards(
            self.cache,
            "rollouts",
            {key_of(rollout_identity(name)): rollout_identity(name) for name in NAMES},
            is_done=lambda identity: self.cache.rollouts(key_of(identity)) is not None,
            compute=compute,
            worker=Worker(),
            progress=Silent(),
        )
        assert made == len(missing)

    @invariant()
    def every_committed_shard_is_the_first_one_and_whole(self) -> None:
        found = self.cache.committed_rollouts(KEYS.values())
        assert found == {KEYS[name]: one for name, one in self.committed.items()}
        assert verify(self.cache, deep=True) == []

    def teardown(self) -> None:
        for info in list(self.cache.objects.list("claims")):
            self.cache.objects.delete(info.path)


TestInterleavings = pytest.mark.filterwarnings("error")(Interleavings.TestCase)
TestInterleavings.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
