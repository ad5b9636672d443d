"""What is looked at: the scored rounds of a run, or shards by their keys."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..data import Scored
from ..errors import InputsMissing, OpdcacheError, UsageError
from ..resolve import model_folder
from ..runfile import load_run
from ..runfolder import RunFolder
from ..schemas.config import RunConfig
from ..schemas.manifests import AS_SAMPLED, RolloutIdentity, RolloutManifest, ScoreManifest
from ..schemas.rounds import RolloutShard, ScoredShard, ScoreRound, ServedColumns
from ..store.cache import Cache, as_listed
from ..store.upkeep import with_key

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """A rollout shard with its scores.

    Attributes:
        student: fingerprint of the policy that sampled.
        expected_teacher: fingerprint of the model that the run has for it; None for a key.
        own: the policy's score set of its own completions; none when it was not scored.
    """

    scored: Scored
    student: str
    expected_teacher: str | None
    own: tuple[ServedColumns, ...]

    @property
    def name(self) -> str:
        """The start of its rollout key."""
        return self.scored.rollouts.key[:12]


@dataclass(frozen=True, slots=True)
class Part:
    """What is spoken of together: a round of a run, or a key."""

    name: str
    round: int | None
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """Shards of one cache.

    Attributes:
        name: for people.
        special: special tokens by id; their texts where a tokenizer is at hand.
        tokenizer: file of the student's tokenizer, where it is at hand.
        config: of a run.
    """

    name: str
    cache: Cache
    parts: tuple[Part, ...]
    special: dict[int, str | None] = field(default_factory=dict)
    tokenizer: Path | None = None
    config: RunConfig | None = None


def target(
    named: Sequence[str], *, cache: str | None, rounds: Sequence[int], reference: str | None = None
) -> Target:
    """A run file, or keys (or how they begin) in a cache.

    Args:
        rounds: of a run; every scored one by default.
        reference: of a run: look at this reference's scores in place of the teacher's.

    Raises:
        UsageError: keys without a cache, or that name no shard or several.
        InputsMissing: the run has no scored round, or not one that was asked for.
    """
    runs = [one for one in named if Path(one).suffix in (".yaml", ".yml")]
    if runs and len(named) > 1:
        raise UsageError("one run file, or keys alone", where=runs[0])
    if runs:
        if cache is not None:
            raise UsageError("a run file names its cache", where=runs[0], remedy="omit --cache")
        return of_run(Path(runs[0]), rounds, reference)
    if cache is None:
        raise UsageError(
            f"{named[0]!r} is no run file, and a key is looked up in a cache",
            remedy="name a RUN.yaml, or give --cache",
        )
    if rounds or reference:
        raise UsageError("a key has no rounds and no references", where=named[0])
    return of_keys(Cache.there(cache), named)


def of_run(path: Path, rounds: Sequence[int] = (), reference: str | None = None) -> Target:
    """What a run's scored rounds pinned; no model is looked at."""
    config = load_run(path)
    assert config.output is not None
    folder, cache = RunFolder(Path(config.output), writes=False), Cache.there(config.cache)
    resolved = folder.resolved()
    wanted = sorted(set(rounds)) or list(folder.scored_rounds())
    if resolved is None or not wanted:
        raise InputsMissing(
            "the run has no scored round yet",
            where=path,
            remedy="'opdcache run' makes them, or 'opdcache rollout' and 'score' one by one",
        )
    parts = []
    for index in wanted:
        rollouts, scores = folder.with_scores(index)
        listed = scores.shards if reference is None else _reference(scores, reference, path)
        own = cache.objects.each(partial(_own_set, cache, rollouts.student), rollouts.shards)
        shards = tuple(
            Shard(
                Scored(rollout, scored.teacher, scored.served),
                rollouts.student,
                resolved.teacher_of(rollout.task) if reference is None else scored.teacher,
                ours,
            )
            for rollout, scored, ours in zip(rollouts.shards, listed, own, strict=True)
        )
        parts.append(Part(f"round {index}", index, shards))
    home = _home(config)
    tokenizer = None if home is None else home / TOKENIZER
    special = _eos(cache, parts) if tokenizer is None else _special_tokens(tokenizer)
    name = str(path) if reference is None else f"{path}, reference {reference}"
    return Target(name, cache, tuple(parts), special, tokenizer, config)


def _reference(scores: ScoreRound, name: str, path: Path) -> tuple[ScoredShard, ...]:
    if name not in scores.references:
        known = ", ".join(sorted(scores.references)) or "none"
        raise UsageError(
            f"round {scores.round} has no scores of a reference {name!r}",
            where=path,
            expected=f"one of: {known}",
        )
    return scores.references[name]


def of_keys(cache: Cache, keys: Sequence[str]) -> Target:
    """Shards by key: a score set, or a rollout shard with the widest set of each teacher."""
    parts, special = list[Part](), dict[int, str | None]()
    for key in keys:
        found = with_key(cache, key)
        if len(found) != 1:
            raise UsageError(
                f"{len(found)} shards have a key that starts with {key!r}",
                where=cache.objects.url,
                remedy="'opdcache cache ls' shows the keys",
            )
        rollouts, sets = _with_sets(cache, found[0])
        identity = rollouts.identity
        special |= _eos_of(rollouts)
        listed = as_listed(rollouts, cached=True)
        own = _own_set(cache, identity.student, listed)
        parts += [
            Part(
                key if len(sets) == 1 else f"{key} by {of.identity.teacher[:12]}",
                None,
                (Shard(_whole(listed, of), identity.student, None, own),),
            )
            for of in sets
        ]
    return Target(", ".join(keys), cache, tuple(parts), special)


def _with_sets(
    cache: Cache, found: RolloutManifest | ScoreManifest
) -> tuple[RolloutManifest, list[ScoreManifest]]:
    """The rollouts of a key, and the score sets to look at."""
    if isinstance(found, ScoreManifest):
        rollouts = cache.rollouts(found.rollout_key)
        if rollouts is None or rollouts.content != found.identity.content:
            raise InputsMissing("the rollouts of these scores are gone", where=found.key[:12])
        return rollouts, [found]
    widest: dict[str, ScoreManifest] = {}
    for of in cache.score_sets(found.content):
        teacher = of.identity.teacher
        if teacher != found.identity.student and _wider(of, widest.get(teacher)):
            widest[teacher] = of
    if not widest:
        raise InputsMissing("no teacher has scored these rollouts", where=found.key[:12])
    return found, list(widest.values())


def _wider(one: ScoreManifest, other: ScoreManifest | None) -> bool:
    def width(of: ScoreManifest) -> tuple[int, int]:
        return len(of.identity.columns), of.identity.k

    return other is None or width(one) > width(other)


def _whole(rollouts: RolloutShard, of: ScoreManifest) -> Scored:
    return Scored(rollouts, of.identity.teacher, (_served(of),))


def _served(of: ScoreManifest) -> ServedColumns:
    return ServedColumns(key=of.key, columns=of.identity.columns)


def _own_set(cache: Cache, student: str, rollout: RolloutShard) -> tuple[ServedColumns, ...]:
    """The policy's scores of its own completions that give its entropy, whoever asked for them."""
    with suppress(OpdcacheError):  # a set that is wrong is not needed: H(p) has bounds without it
        for of in cache.score_sets(rollout.content, student):
            if of.identity.rendering == AS_SAMPLED and "entropy" in of.identity.columns:
                return (_served(of),)
    return ()


def _eos(cache: Cache, parts: Sequence[Part]) -> dict[int, str | None]:
    """What ends completions, as the first rollout shard says."""
    with suppress(OpdcacheError):
        for part in parts:
            for shard in part.shards[:1]:
                manifest = cache.rollouts(shard.scored.rollouts.key)
                return {} if manifest is None else _eos_of(manifest)
    return {}


def _eos_of(rollouts: RolloutManifest) -> dict[int, str | None]:
    identity = rollouts.identity
    if isinstance(identity, RolloutIdentity) and identity.eos_token_id is not None:
        return {identity.eos_token_id: None}
    return {}


def _home(config: RunConfig) -> Path | None:
    """Folder of the student's files; None when they are not here, which nothing but texts needs."""
    with suppress(OpdcacheError):
        home = model_folder(config.student, [TOKENIZER])
        return home if (home / TOKENIZER).is_file() else None
    return None


def _special_tokens(file: Path) -> dict[int, str | None]:
    try:
        added = json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
        return {token["id"]: token["content"] for token in added if token.get("special")}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(
            "not a tokenizer's file", where=file, remedy="restore the student's folder"
        ) from error
