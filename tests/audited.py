"""A run whose rounds were made from whole distributions: what an audit looks at, and no engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import yaml

from opdcache import documents
from opdcache.runfile import load_run
from opdcache.runfolder import RunFolder
from opdcache.schemas.manifests import RolloutManifest, ScoreManifest
from opdcache.schemas.rounds import Resolved, RolloutRound, ServedColumns
from opdcache.store.cache import Cache, as_listed
from opdcache.store.scores import Scores

from . import handmade, shards
from .dense import STEP, Distributions, rows_of, scores_of
from .shards import TEACHER

COLUMNS = ("entropy", "sampled", "student_topk", "topk")
RECORDED = 16


@dataclass(frozen=True)
class Made:
    """A run file, its cache, and what each round's shards hold."""

    path: Path
    cache: Cache

    @property
    def folder(self) -> RunFolder:
        """Its folder."""
        return RunFolder(self.path.with_suffix(""))


def make_run(folder: Path, name: str = "run", **changes: object) -> Made:
    """A run file, and a run that began; no round yet."""
    config = {
        "rounds": 3,
        "cache": "cache",
        "student": {"model": "models/student"},
        "teacher": {"model": "models/teacher"},
        "prompts": {"source": {"type": "jsonl", "path": "prompts.jsonl"}},
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    resolved = Resolved(
        run_id=name,
        opdcache="0",
        config=load_run(path),
        student="student",
        teacher=TEACHER,
        vocabulary="v",
        tokenizers="t",
        vocab_size=60,
    )
    made = Made(path, Cache(str(folder / "cache")))
    documents.create(made.folder.path / "resolved.json", resolved)
    return made


def add_round(
    made: Made,
    index: int,
    given: Sequence[Distributions],
    scores: Sequence[Scores] | None = None,
    tables: Sequence[pa.Table] | None = None,
    teacher: str = TEACHER,
) -> list[tuple[RolloutManifest, ScoreManifest]]:
    """A scored round: a shard for each of the distributions, scored as they say by default."""
    made_shards, pairs = [], list[tuple[RolloutManifest, ScoreManifest]]()
    for i, one in enumerate(given):
        table = rows_of(one, RECORDED) if tables is None else tables[i]
        name = f"{made.path.stem} {index} {i}"
        rollout = shards.commit_rollouts(made.cache, name, table, student_topk=RECORDED)
        held = scores_of(one.q, one, 16, RECORDED) if scores is None else scores[i]
        columns = tuple(sorted(held.columns))
        k = 16 if held.topk is None else held.topk.ids.shape[1]
        scored = shards.commit_scores(
            made.cache, rollout, *columns, scores=held, teacher=teacher, k=k, step=STEP
        )
        served = [ServedColumns(key=scored.key, columns=scored.identity.columns)]
        made_shards.append((as_listed(rollout, cached=False), served))
        pairs.append((rollout, scored))
    rollouts, scored_round = handmade.rounds(
        [shard for shard, _ in made_shards], [sets for _, sets in made_shards], index
    )
    listed = tuple(s.model_copy(update={"teacher": teacher}) for s in scored_round.shards)
    made.folder.write(rollouts)
    made.folder.write(scored_round.model_copy(update={"shards": listed}))
    return pairs


def add_own(
    made: Made, index: int, given: Sequence[Distributions], every: int = 1
) -> list[ScoreManifest]:
    """The policy's own scores of every so many of a round's shards."""
    rollouts = made.folder.need(RolloutRound, index)
    made_sets = []
    for place, (shard, one) in enumerate(zip(rollouts.shards, given, strict=True)):
        if place % every == 0:
            own = scores_of(one.p, one, 16)
            made_sets.append(
                shards.commit_scores(
                    made.cache,
                    made.cache.need_rollouts(shard),
                    *sorted(own.columns),
                    scores=own,
                    teacher=rollouts.student,
                    k=16,
                )
            )
    return made_sets
