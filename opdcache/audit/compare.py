"""Two sets of scores against each other: token by token where they are of the same rollouts, and
by their audits where they are not."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..errors import IntegrityError, ObjectMissing
from ..schemas.audit import AuditLimits, PartAudit
from ..schemas.comparison import (
    CompareLimits,
    Comparison,
    Difference,
    Estimate,
    LeftOut,
    SharedRollouts,
    SideBySide,
)
from ..schemas.manifests import ScoreManifest
from ..store.cache import ScoreSet
from . import likeness
from .blocks import beside, blocks
from .likeness import Likeness
from .measures import MEANS
from .operands import by_content
from .run import Reader
from .tally import Look, Tally
from .targets import Part, Shard, Target

Models = tuple[str, str, bool]
"""A's model, B's, and whether both read the same prompt tokens."""
_MADE = ("dtype", "arguments", "k", "mass", "num_ids", "step", "columns")
_ONLY = "only {} has scores of these rollouts"
_SAME = "both read the same stored scores"


def compare(
    one: Target,
    other: Target,
    *,
    k: int = 16,
    chunk_tokens: int = 1024,
    limits: CompareLimits | None = None,
) -> Comparison:
    """Hold two targets' scores against each other, in bounded memory.

    A shard that cannot be read, or is not what was committed, is named, and in no number.

    Args:
        one, other: A and B.
        k: entries that the overlap is taken of.
        chunk_tokens: tokens of a position chunk.

    Raises:
        UsageError: several models' scores of the same rollouts are in a target.
    """
    started, limits = time.monotonic(), limits or CompareLimits()
    pairs = _Pairs(one, other, k, chunk_tokens)
    pairs.read()
    look = Look(k, chunk_tokens, {}, AuditLimits().special_outlier_nats)
    others, unpaired = _parts(one, other)
    audits = [_side_by_side((one, other), both, look) for both in others]
    wrong = [*pairs.unreadable, *(reason for _, reasons in audits for reason in reasons)]
    return Comparison(
        a=one.name,
        b=other.name,
        k=k,
        chunk_tokens=chunk_tokens,
        limits=limits,
        shared=tuple(_shared(models, of, limits) for models, of in pairs.groups.items()),
        side_by_side=tuple(found for found, _ in audits),
        left_out=tuple(pairs.left_out()),
        unpaired=tuple(unpaired),
        unreadable=tuple(dict.fromkeys(wrong)),
        elapsed_s=round(time.monotonic() - started, 3),
    )


@dataclass(slots=True)
class _Group:
    """What is said of the rollouts that one pair of models scored."""

    likeness: Likeness
    made_otherwise: set[str] = field(default_factory=set)


class _Pairs:
    """Reads the shards that both targets have.

    Attributes:
        groups: what was found, by models.
        unreadable: what is wrong with shards.
    """

    def __init__(self, one: Target, other: Target, k: int, chunk_tokens: int) -> None:
        self._caches = one.cache, other.cache
        self._a, self._b = by_content(one), by_content(other)
        self._k, self._chunk_tokens = k, chunk_tokens
        self._left: dict[str, list[Shard]] = defaultdict(list)
        self.groups: dict[Models, _Group] = {}
        self.unreadable: list[str] = []

    def read(self) -> None:
        """Compare every shard, or say why not."""
        self._left[_ONLY.format("A")] = [s for c, s in self._a.items() if c not in self._b]
        self._left[_ONLY.format("B")] = [s for c, s in self._b.items() if c not in self._a]
        for content in [content for content in self._a if content in self._b]:
            try:
                self._read(self._a[content], self._b[content])
            except (IntegrityError, ObjectMissing) as error:
                self._left["unreadable"].append(self._a[content])
                self.unreadable.append(str(error))

    def left_out(self) -> Iterator[LeftOut]:
        """Shards that were not compared, by reason."""
        for reason, shards in self._left.items():
            if shards:
                tokens = sum(shard.scored.rollouts.num_tokens for shard in shards)
                yield LeftOut(reason=reason, num_shards=len(shards), num_tokens=tokens)

    def _read(self, shard: Shard, other: Shard) -> None:
        sets = [
            cache.open_score_set(of.rollouts.content, of.teacher, of.served, whole=False)
            for cache, of in zip(self._caches, (shard.scored, other.scored), strict=True)
        ]
        a, b = (_manifests(each) for each in sets)
        if [(m.key, m.attempt) for m in a] == [(m.key, m.attempt) for m in b]:
            self._left[_SAME].append(shard)
            return
        found = Likeness(self._k, self._chunk_tokens)
        for block, others in beside(blocks(self._caches[0], shard), sets[1]):
            found.add(block, others)
        columns = {side: _columns(each) for side, each in zip("AB", sets, strict=True)}
        found.end(shard.scored.rollouts.num_tokens, columns)
        models = (
            shard.scored.teacher,
            other.scored.teacher,
            a[0].identity.rendering == b[0].identity.rendering,
        )
        group = self.groups.setdefault(models, _Group(Likeness(self._k, self._chunk_tokens)))
        group.likeness.merge(found)
        group.made_otherwise |= set(_made_otherwise(a, b))


def _manifests(scores: ScoreSet) -> list[ScoreManifest]:
    return [manifest for _, _, manifest in scores.parts]


def _columns(scores: ScoreSet) -> frozenset[str]:
    return frozenset(column for columns, _, _ in scores.parts for column in columns)


def _made_otherwise(a: Sequence[ScoreManifest], b: Sequence[ScoreManifest]) -> Iterator[str]:
    """What was asked for, the backend and the versions, where they differ."""
    made = [[_how(manifest) for manifest in manifests] for manifests in (a, b)]
    for name in dict.fromkeys(name for sides in made for how in sides for name in how):
        one, other = (
            ", ".join(dict.fromkeys(how.get(name, "none") for how in side)) for side in made
        )
        if one != other:
            yield f"{name}: {one} | {other}"


def _how(manifest: ScoreManifest) -> dict[str, str]:
    provenance = manifest.provenance
    asked = {name: str(getattr(manifest.identity, name)) for name in _MADE}
    return {**asked, "backend": str(provenance.details.get("backend")), **provenance.versions}


def _shared(models: Models, of: _Group, limits: CompareLimits) -> SharedRollouts:
    teacher_a, teacher_b, same_rendering = models
    same_model = teacher_a == teacher_b and same_rendering
    agreement = of.likeness.agreement()
    tests = tuple(likeness.tests(agreement, limits, same_model=same_model))
    return SharedRollouts(
        teacher_a=teacher_a,
        teacher_b=teacher_b,
        same_rendering=same_rendering,
        num_shards=of.likeness.num_shards,
        num_completions=of.likeness.num_completions,
        made_otherwise=tuple(sorted(of.made_otherwise)),
        agreement=agreement,
        by_position=of.likeness.by_position(),
        largest=of.likeness.largest,
        left_out=of.likeness.left_out,
        tests=tests,
        verdict=likeness.verdict(tests, same_model=same_model),
    )


def _parts(one: Target, other: Target) -> tuple[list[tuple[Part, Part]], list[str]]:
    """Parts that are put side by side, and the names of those that are alone.

    Two single parts are a pair, parts of many are paired by round. A part whose rollouts the other
    target has throughout is held against them token by token, and not spoken of again.
    """
    if len(one.parts) == len(other.parts) == 1:
        pairs = [(one.parts[0], other.parts[0])]
    else:
        rounds = {part.round: part for part in other.parts if part.round is not None}
        pairs = [(part, rounds[part.round]) for part in one.parts if part.round in rounds]
    paired = {id(part) for pair in pairs for part in pair}
    alone = [
        f"{side}'s {part.name}"
        for side, target, against in (("A", one, other), ("B", other, one))
        for part in target.parts
        if id(part) not in paired and not _contents(part) <= _contents(*against.parts)
    ]
    return [(a, b) for a, b in pairs if _contents(a) != _contents(b)], alone


def _contents(*parts: Part) -> frozenset[str]:
    return frozenset(shard.scored.rollouts.content for part in parts for shard in part.shards)


def _side_by_side(
    targets: tuple[Target, Target], parts: tuple[Part, Part], look: Look
) -> tuple[SideBySide, list[str]]:
    """The audits of two parts, and what is wrong with shards that are in neither."""
    (a, tally_a, wrong_a), (b, tally_b, wrong_b) = (
        _audit(target, part, look) for target, part in zip(targets, parts, strict=True)
    )
    num_shared = len(_contents(parts[0]) & _contents(parts[1]))
    found = SideBySide(
        a=a,
        b=b,
        num_shared_shards=num_shared,
        num_shared_prompts=len(tally_a.prompts & tally_b.prompts),
        differences=tuple(
            _difference(
                name, tally_a.clustered.estimate(name), tally_b.clustered.estimate(name), num_shared
            )
            for name in MEANS
        ),
    )
    return found, wrong_a + wrong_b


def _audit(target: Target, part: Part, look: Look) -> tuple[PartAudit, Tally, list[str]]:
    reader = Reader(target.cache, look, AuditLimits())
    for _ in reader.read(part):
        pass
    wrong = [found.reason for found in reader.findings if found.check == "unreadable shard"]
    return reader.summary(part), reader.tally, wrong


def _difference(name: str, a: Estimate | None, b: Estimate | None, num_shared: int) -> Difference:
    """B less A; the error is that of independent draws, which shared rollouts are not."""
    if a is None or b is None:
        return Difference(name=name, a=a, b=b, change=None)
    error = None
    if not num_shared and a.standard_error is not None and b.standard_error is not None:
        error = (a.standard_error**2 + b.standard_error**2) ** 0.5
    return Difference(
        name=name, a=a, b=b, change=Estimate(mean=b.mean - a.mean, standard_error=error)
    )
