"""Where every shard set of a run comes from, and what each stage cost, by the manifests."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from ...errors import IntegrityError
from ...runfolder import RunFolder
from ...schemas.manifests import RolloutManifest, ScoreIdentity, ScoreManifest
from ...schemas.rounds import (
    HeldOutRound,
    RolloutRound,
    RolloutShard,
    ScoredShard,
    ScoreRound,
    TrainRound,
)
from ...store.cache import Cache, rollout_commit, score_commit
from ..targets import Part, Target

Kind = Literal[
    "rollouts", "held-out rollouts", "scores", "reference scores", "the student's own scores"
]
MOST_LISTED = 200
"""More sets than that are grouped."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What made a set.

    Attributes:
        versions: packages and their versions.
        details: engine arguments, batch shape, device, as JSON.
    """

    host: str
    versions: tuple[tuple[str, str], ...]
    details: str


@dataclass(frozen=True, slots=True)
class Group:
    """Sets of one round that one model made in one environment, for one run."""

    round: int
    kind: Kind
    model: str
    run_id: str
    environment: int


@dataclass(slots=True)
class Counts:
    """What sets are in sum; times are UTC, ISO 8601."""

    num: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    size_bytes: int = 0
    first: str = ""
    last: str = ""

    def add(self, manifest: RolloutManifest | ScoreManifest) -> None:
        """Put in a set."""
        created_at = manifest.provenance.created_at
        self.num += 1
        self.num_rows += manifest.num_rows
        self.num_tokens += manifest.num_tokens
        self.size_bytes += _size_bytes(manifest)
        self.first = min(filter(None, (self.first, created_at)))
        self.last = max(self.last, created_at)


@dataclass(frozen=True, slots=True)
class Cost:
    """A stage of a round.

    Attributes:
        wall_s: of the worker that finished it; None of references, which are scored with the rest.
        compute_s: of all workers, loading left out, whenever they made the sets; None of training.
        num_sets: shard sets it made or found.
        num_found: of these, the ones that another run had made.
        teacher_tokens: that the scoring model read, prompts included; None of other stages.
    """

    round: int
    stage: str
    wall_s: float | None
    compute_s: float | None
    num_tokens: int
    num_sets: int
    num_found: int
    size_bytes: int
    teacher_tokens: int | None


@dataclass(slots=True)
class Sets:
    """Every shard set of some rounds, in bounded memory.

    Attributes:
        listed: the sets one by one, with their keys, while there are few.
        groups: all of them.
        environments: what made them, numbered from 0.
        costs: in order of the rounds and stages.
        num_gone: sets whose manifests can be read no more.
        sent_tokens: sent to teachers that others serve.
    """

    listed: list[tuple[str, Group, Counts]] = field(default_factory=list)
    groups: dict[Group, Counts] = field(default_factory=dict)
    environments: dict[Environment, int] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    num_gone: Counter[str] = field(default_factory=Counter)
    sent_tokens: int = 0

    @property
    def num(self) -> int:
        """Sets."""
        return sum(counts.num for counts in self.groups.values())

    def add(self, round: int, kind: Kind, manifest: RolloutManifest | ScoreManifest) -> None:
        """Put in a set."""
        made, identity = manifest.provenance, manifest.identity
        details = json.dumps(made.details, sort_keys=True)
        environment = Environment(made.host, tuple(sorted(made.versions.items())), details)
        number = self.environments.setdefault(environment, len(self.environments))
        model = identity.teacher if isinstance(identity, ScoreIdentity) else identity.student
        group = Group(round, kind, model, made.run_id, number)
        self.groups.setdefault(group, Counts()).add(manifest)
        if len(self.listed) <= MOST_LISTED:
            one = Counts()
            one.add(manifest)
            self.listed.append((manifest.key, group, one))


def sets_of(folder: RunFolder, target: Target, rounds: Iterable[int]) -> Sets:
    """What rounds, by their files, are made of and cost; and the policies' own scores that are
    looked at."""
    found, cache = Sets(), target.cache
    for index in rounds:
        for stage in (_rollouts, _held_out, _scores, _training):
            found.costs += stage(folder, cache, index, found)
    for part in target.parts:
        _own(folder, cache, part, found)
    with suppress(FileNotFoundError):
        sent = folder.sent_tokens_path.read_text().split()
        found.sent_tokens = sum(map(int, sent))
    return found


def _rollouts(folder: RunFolder, cache: Cache, index: int, found: Sets) -> Iterator[Cost]:
    if (file := folder.find(RolloutRound, index)) is not None:
        yield _sampled("rollout", "rollouts", file, cache, found)


def _held_out(folder: RunFolder, cache: Cache, index: int, found: Sets) -> Iterator[Cost]:
    if (file := folder.find(HeldOutRound, index)) is not None:
        yield _sampled("held-out rollout", "held-out rollouts", file, cache, found)


def _sampled(
    stage: str, kind: Kind, file: RolloutRound | HeldOutRound, cache: Cache, found: Sets
) -> Cost:
    compute_s, stored = 0.0, 0
    for shard in file.shards:
        if (manifest := _manifest(cache, rollout_commit(shard.key), found)) is not None:
            found.add(file.round, kind, manifest)
            compute_s += manifest.provenance.elapsed_s
            stored += _size_bytes(manifest)
    return Cost(
        round=file.round,
        stage=stage,
        wall_s=file.elapsed_s,
        compute_s=compute_s,
        num_tokens=sum(shard.num_tokens for shard in file.shards),
        num_sets=len(file.shards),
        num_found=sum(shard.cached for shard in file.shards),
        size_bytes=stored,
        teacher_tokens=None,
    )


def _scores(folder: RunFolder, cache: Cache, index: int, found: Sets) -> Iterator[Cost]:
    if folder.find(ScoreRound, index) is None:
        return
    rollouts, scores = folder.scored(index)
    yield _scored("score", "scores", rollouts, scores.shards, scores.elapsed_s, cache, found)
    for name, shards in scores.references.items():
        stage = f"score, {name}"
        yield _scored(stage, "reference scores", rollouts, shards, None, cache, found)


def _scored(
    stage: str,
    kind: Kind,
    rollouts: RolloutRound,
    shards: Iterable[ScoredShard],
    wall_s: float | None,
    cache: Cache,
    found: Sets,
) -> Cost:
    compute_s, stored, read, num, num_found = 0.0, 0, 0, 0, 0
    for rollout, scored in zip(rollouts.shards, shards, strict=True):
        prompts = _num_prompt_tokens(cache, rollout)
        for served in scored.served:
            num, num_found = num + 1, num_found + scored.cached
            path = score_commit(scored.content, scored.teacher, served.key)
            if (manifest := _manifest(cache, path, found)) is not None:
                found.add(rollouts.round, kind, manifest)
                compute_s += manifest.provenance.elapsed_s
                stored += _size_bytes(manifest)
                read += prompts + manifest.num_tokens
    return Cost(
        round=rollouts.round,
        stage=stage,
        wall_s=wall_s,
        compute_s=compute_s,
        num_tokens=sum(shard.num_tokens for shard in rollouts.shards),
        num_sets=num,
        num_found=num_found,
        size_bytes=stored,
        teacher_tokens=read,
    )


def _own(folder: RunFolder, cache: Cache, part: Part, found: Sets) -> None:
    """The policy's scores of its own completions, where they are no reference's."""
    if part.round is None:
        return
    references = folder.need(ScoreRound, part.round).references.values()
    listed = {s.key for shards in references for shard in shards for s in shard.served}
    for shard in part.shards:
        for served in shard.own:
            path = score_commit(shard.scored.rollouts.content, shard.student, served.key)
            if served.key not in listed and (made := _manifest(cache, path, found)) is not None:
                found.add(part.round, "the student's own scores", made)


def _num_prompt_tokens(cache: Cache, shard: RolloutShard) -> int:
    with suppress(IntegrityError):
        if (manifest := cache.rollouts(shard.key)) is not None:
            return manifest.num_prompt_tokens
    return 0


def _training(folder: RunFolder, cache: Cache, index: int, found: Sets) -> Iterator[Cost]:
    if (file := folder.find(TrainRound, index)) is not None:
        yield Cost(
            round=index,
            stage="train",
            wall_s=file.elapsed_s,
            compute_s=None,
            num_tokens=file.num_tokens,
            num_sets=0,
            num_found=0,
            size_bytes=0,
            teacher_tokens=None,
        )


def _manifest(cache: Cache, path: str, found: Sets) -> RolloutManifest | ScoreManifest | None:
    try:
        if (manifest := cache.manifest(path)) is None:
            found.num_gone["not there"] += 1
    except IntegrityError as error:
        found.num_gone[error.what] += 1
        return None
    return manifest


def _size_bytes(manifest: RolloutManifest | ScoreManifest) -> int:
    return sum(entry.size_bytes for entry in manifest.objects)
