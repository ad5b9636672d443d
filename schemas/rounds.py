"""Files of a run folder: what the run resolved to, and what each stage of a round pinned."""

from typing import Literal

from pydantic import Field

from .base import Model
from .columns import ScoreColumn
from .config import RunConfig

Stage = Literal["rollout", "score", "train"]
STAGES: tuple[Stage, ...] = ("rollout", "score", "train")


class Resolved(Model):
    """``resolved.json``: what a run file meant when the run began."""

    run_id: str = Field(description="identity of the run, random")
    opdcache: str = Field(description="version that began the run")
    config: RunConfig = Field(description="the run file, paths made absolute")
    student: str = Field(description="fingerprint of the policy of round 0")
    teacher: str = Field(description="fingerprint of the teacher")
    teachers: dict[str, str] = Field({}, description="fingerprints of single tasks' teachers")
    references: dict[str, str] = Field(
        {}, description="fingerprints of the references that are no round's student"
    )
    vocabulary: str = Field(description="fingerprint of the shared token ids")
    tokenizers: str = Field(description="digest of all models' tokenizer files")
    chat_template: str | None = Field(
        None, description="digest of the files of prompts.chat_template; None without one"
    )
    vocab_size: int = Field(description="ids that the student can produce")
    shared_ids: dict[str, int] = Field(
        {},
        description="of each scoring model, by its place in the run file: the ids below this are "
        "those that it and the student can produce",
    )

    def teacher_of(self, task: str) -> str:
        """Fingerprint of the teacher that scores a task."""
        return self.teachers.get(task, self.teacher)

    def shared_ids_of(self, task: str) -> int:
        """The student's ids that the teacher of a task can produce are those below this."""
        return self.shared_ids[f"teachers.{task}" if task in self.teachers else "teacher"]


class StagePlan(Model):
    """``rounds/NNN/STAGE.plan.json``: what a stage set out to make, for ``status``."""

    num_shards: int = Field(description="shards of the stage")
    keys: str = Field("", description="digest of the shards' keys, as the first worker made them")
    inputs: str = Field("", description="digest of what they are made from")
    version: str = Field("", description="of opdcache, of that worker")
    missing: tuple[str, ...] = Field(description="commits that were not there when it began")


class RolloutShard(Model):
    """A rollout shard that a round uses."""

    key: str = Field(description="rollout key")
    content: str = Field(description="content hash that everything downstream hangs on")
    task: str = Field(description="the shard's task")
    num_rows: int = Field(description="completions")
    num_tokens: int = Field(description="completion tokens")
    cached: bool = Field(description="whether another run had made it")


class RolloutRound(Model):
    """``rounds/NNN/rollout.json``."""

    round: int = Field(description="index of the round")
    student: str = Field(description="fingerprint of the policy that sampled")
    shards: tuple[RolloutShard, ...] = Field(description="training shards, in plan order")
    failed: dict[str, str] = Field({}, description="keys set aside, and the last error of each")
    dropped: dict[str, int] = Field(description="prompts left out, by reason")
    elapsed_s: float = Field(description="wall time of the worker that finished the stage")


class HeldOutRound(Model):
    """``rounds/NNN/held_out.json``: the same policy's completions of held-out prompts."""

    round: int = Field(description="index of the round; the number of rounds for the last student")
    student: str = Field(description="fingerprint of the policy that sampled")
    shards: tuple[RolloutShard, ...] = Field(description="held-out shards, in plan order")
    dropped: dict[str, int] = Field(description="prompts left out, by reason")
    elapsed_s: float = Field(description="wall time of the worker that finished the stage")


class ServedColumns(Model):
    """A score set and the columns that a round takes from it."""

    key: str = Field(description="score key")
    columns: tuple[ScoreColumn, ...] = Field(description="columns taken")


class ScoredShard(Model):
    """The score sets of one model that serve a rollout shard."""

    content: str = Field(description="content hash of the rollout shard")
    teacher: str = Field(description="fingerprint of the scoring model")
    served: tuple[ServedColumns, ...] = Field(description="sets, and what each gives")
    cached: bool = Field(description="whether other runs had made every set")


class ScoreRound(Model):
    """``rounds/NNN/score.json``."""

    round: int = Field(description="index of the round")
    shards: tuple[ScoredShard, ...] = Field(description="in the order of the rollout shards")
    references: dict[str, tuple[ScoredShard, ...]] = Field(
        {}, description="the same of each reference, by its name"
    )
    failed: dict[str, str] = Field(
        {}, description="contents that could not be scored, and the last error of each"
    )
    elapsed_s: float = Field(description="wall time of the worker that finished the stage")


class TrainRound(Model):
    """``rounds/NNN/train.json``."""

    round: int = Field(description="index of the round")
    student: str = Field(description="fingerprint of the exported student")
    num_updates: int = Field(description="optimizer updates of the run so far")
    num_samples: int = Field(description="samples trained on in this round")
    num_tokens: int = Field(description="supervised tokens in this round")
    num_skipped: int = Field(0, description="updates left out since a gradient was not finite")
    ended_early: str | None = Field(
        None, description="why the round ended before its last sample; none: it did not"
    )
    dropped: dict[str, int] = Field(description="samples left out, by reason")
    elapsed_s: float = Field(description="wall time of the stage, over its restarts")


class EvaluationRound(Model):
    """``rounds/NNN/evaluation.json``: a round's student, before training, on held-out prompts."""

    round: int = Field(description="index of the round; 0 is before any training")
    student: str = Field(description="fingerprint of the student")
    teachers: tuple[str, ...] = Field(description="fingerprints of the shards' teachers, in order")
    contents: tuple[str, ...] = Field(description="content hashes of the held-out rollouts")
    reverse_kl: float = Field(description="mean over tokens of KL(student || teacher), nats")
    overlap: float = Field(description="share of the student's top 16 in the teacher's top 16")
    entropy_gap: float = Field(description="mean over tokens of |H(teacher) - H(student)|, nats")
    student_entropy: float = Field(description="mean over tokens of H(student), nats")
    teacher_entropy: float = Field(description="mean over tokens of H(teacher), nats")
    tokens: int = Field(description="completion tokens, sampled anew from this round's student")


class PromptScores(Model):
    """What a verifier says of one held-out prompt's completions."""

    prompt_id: str = Field(description="the prompt's id")
    task: str = Field(description="the prompt's task")
    scores: tuple[float, ...] = Field(
        description="of its completions, by sample index: 0 is wrong, 1 right"
    )
    num_truncated: int = Field(description="completions cut off at their longest")
    num_failed: int = Field(
        0, description="completions that the verifier could not judge, which count as wrong"
    )


class _Verified(Model):
    verifier: str = Field(description="evaluation.verifier")
    version: str = Field(
        description="of the verifier's package, + a revision of how answers are read here; of a "
        "function, the SHA-256 of its file"
    )
    contents: tuple[str, ...] = Field(description="content hashes of the completions' shards")
    prompts: tuple[PromptScores, ...] = Field(description="every held-out prompt")


class AccuracyRound(_Verified):
    """``rounds/NNN/accuracy.json``: a round's student, before training, on held-out prompts."""

    round: int = Field(description="index of the round; 0 is before any training")
    student: str = Field(description="fingerprint of the student")


class TeacherHeldOut(Model):
    """``teacher/held_out.json``: the teachers' completions of the held-out prompts."""

    teachers: tuple[str, ...] = Field(description="fingerprints of the shards' teachers, in order")
    shards: tuple[RolloutShard, ...] = Field(description="shards of completions, in plan order")
    elapsed_s: float = Field(description="wall time of the worker that finished them")


class TeacherAccuracy(_Verified):
    """``teacher/accuracy.json``: the same of the teachers, each on its own tasks."""

    teachers: tuple[str, ...] = Field(description="fingerprints of the shards' teachers, in order")


RoundFile = RolloutRound | HeldOutRound | ScoreRound | TrainRound | EvaluationRound | AccuracyRound
