"""The run file: what one experiment asks for. ``opdcache.runfile`` loads and checks it."""

from typing import Self

from pydantic import Field, JsonValue, model_validator

from .audit import AuditLimits
from .base import Model
from .columns import Compression, ScoreColumn
from .launch import LaunchConfig
from .losses import (
    cell,
    imitates,
    is_divergence,
    reference_columns,
    refusal,
    tolerates_older,
)
from .manifests import Sampling
from .prompts import PromptsConfig, PromptSource, ReasoningGymSource
from .teachers import STUDENT, Dtype, HttpBackend, ModelRef, TeacherConfig
from .training import TrainConfig


class RolloutConfig(Model):
    """The rollout stage."""

    samples_per_prompt: int = Field(4, ge=1, description="completions a prompt")
    sampling: Sampling = Field(Sampling(), description="how completions are drawn")
    student_topk: int = Field(16, ge=0, description="recorded student entries a token; 0: none")
    shard_samples: int = Field(
        256, ge=1, description="completions a shard at most; one batch of the engine"
    )
    dtype: Dtype = Field("bfloat16", description="dtype that the engine computes in")
    engine: dict[str, JsonValue] = Field({}, description="more vLLM engine arguments")


class RolloutsFrom(Model):
    """Rollouts that another run sampled, or that were imported."""

    from_: str = Field(
        alias="from",
        description="output folder of a run, or of 'opdcache cache import': round r trains on its "
        "round r; held-out prompts are still sampled from this run's student",
    )


class ScoreConfig(Model):
    """The score stage."""

    k: int = Field(16, ge=1, le=65535, description="most kept teacher entries a token")
    mass: float = Field(
        1.0, gt=0, le=1, description="entries are kept until they hold this mass; 1: always k"
    )
    columns: tuple[ScoreColumn, ...] | None = Field(
        None,
        description="stored columns; by default all that the teacher's backend gives and the "
        "rollouts allow, draws when score.draws says how many; none: []: nothing is scored, for a "
        "loss that looks at no score",
    )
    step: float = Field(
        1 / 256,
        ge=1 / 4096,
        le=0.1,
        description="quantisation step: stored log-probs are off by at most half of it, in nats, "
        "or as a share of the value where that is more",
    )
    compression: Compression = Field(
        "blosc", description="of the shards; pcodec is smaller, and an extension of Zarr"
    )
    draws: int = Field(
        0, ge=0, le=65535, description="ids drawn a token from the teacher's distribution"
    )
    draw_seed: int = Field(0, ge=0, description="seed of the draws")
    batch_tokens: int = Field(8192, ge=1, description="padded tokens of a teacher forward at most")


class EvaluationConfig(Model):
    """Held-out evaluation of every round's student."""

    source: PromptSource | None = Field(
        None,
        description="held-out prompts; never trained on; without it, those that "
        "prompts.held_out_share holds out",
    )
    num_prompts: int = Field(
        64, ge=1, description="prompts taken, in the order listed, or in the order of their hash"
    )
    samples_per_prompt: int = Field(1, ge=1, description="completions a prompt")
    sampling: Sampling = Field(Sampling(), description="how completions are drawn")
    verifier: str | None = Field(
        None,
        pattern=r"^(reasoning_gym|math|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$",
        description="what says how right a completion is: reasoning_gym (the scorer of the "
        "prompts' dataset), math (math-verify), or module:function, which gives a number from 0 "
        "to 1 for a completion's text and the prompt's reference answer; none: only the "
        "divergence is evaluated",
    )
    teacher: bool = Field(
        True, description="with a verifier, the teacher answers the prompts too, for the gap"
    )


class RunConfig(Model):
    """One experiment."""

    seed: int = Field(0, description="seed of prompt order, sampling and sample order")
    rounds: int = Field(1, ge=1, description="policy rounds")
    cache: str = Field("cache", description="URL or folder of the shared cache")
    max_failed_shards: int = Field(
        0,
        ge=0,
        description="shards that may fail three times, in a stage of a round, and be left out; one "
        "more stops the run",
    )
    output: str | None = Field(
        None, description="folder of this run; next to the run file, named after it, by default"
    )
    student: ModelRef = Field(description="the policy of round 0")
    teacher: TeacherConfig = Field(description="the model distilled from")
    teachers: dict[str, TeacherConfig] = Field(
        {}, description="teachers of single tasks, by task; the others are teacher's"
    )
    references: dict[str, TeacherConfig] = Field(
        {},
        description="more models that score the same rollouts, by a name of one's own; the model "
        f"{STUDENT} is the policy that sampled",
    )
    prompts: PromptsConfig = Field(description="prompts and their schedule")
    rollout: RolloutConfig = Field(RolloutConfig(), description="rollout stage")
    rollouts: RolloutsFrom | None = Field(
        None, description="where completions are taken from, in place of sampling them"
    )
    score: ScoreConfig = Field(ScoreConfig(), description="score stage")
    train: TrainConfig = Field(TrainConfig(), description="train stage")
    evaluation: EvaluationConfig | None = Field(None, description="held-out evaluation")
    audit: AuditLimits = Field(AuditLimits(), description="limits of the audit's verdict")
    launch: LaunchConfig = Field(LaunchConfig(), description="how the work is spread")

    @model_validator(mode="after")
    def _held_out_prompts_come_from_somewhere(self) -> Self:
        splits, evaluation = self.prompts.held_out_share > 0, self.evaluation
        if evaluation is not None and evaluation.source is None and not splits:
            raise ValueError(
                "evaluation: no prompts; give evaluation.source, or prompts.held_out_share"
            )
        if self.prompts.near_duplicates and evaluation is None and not splits:
            raise ValueError(
                "prompts.near_duplicates: no evaluation prompts to compare with; give evaluation, "
                "or prompts.held_out_share"
            )
        return self

    @model_validator(mode="after")
    def _masters_are_float32(self) -> Self:
        if self.train.dtype == "float32" and (self.train.attention or "").startswith("flash"):
            raise ValueError(
                "train.attention: flash attention does not compute in float32; set train.dtype to "
                "bfloat16"
            )
        if self.train.dtype == "bfloat16" and self.train.zero_stage == 0:
            raise ValueError(
                "train.zero_stage: 0 keeps no float32 masters of bfloat16 weights; set it to 1, "
                "which on one device costs nothing"
            )
        return self

    @model_validator(mode="after")
    def _outcomes_are_compared(self) -> Self:
        alone = self.rollout.samples_per_prompt == 1 and self.rollouts is None
        if alone and self.train.loss.outcome_weight:
            raise ValueError(
                "train.loss.outcome: completions of a prompt are compared; set "
                "rollout.samples_per_prompt to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _shared_prompts_need_masks(self) -> Self:
        if self.train.share_prompts and self.train.packing:
            raise ValueError("train.share_prompts: a row holds one prompt; leave out train.packing")
        if self.train.share_prompts and (self.train.attention or "").startswith("flash_attention"):
            raise ValueError(
                "train.share_prompts: flash attention takes no mask; train.attention may be sdpa, "
                "eager or flex_attention"
            )
        return self

    @model_validator(mode="after")
    def _offload_needs_parts(self) -> Self:
        if self.train.offload_optimizer and self.train.zero_stage == 0:
            raise ValueError("train.offload_optimizer: it needs train.zero_stage 1, 2 or 3")
        return self

    def teacher_of(self, task: str) -> TeacherConfig:
        """The teacher that scores a task."""
        return self.teachers.get(task, self.teacher)

    def place_of(self, task: str) -> str:
        """Key of the run file that the teacher of a task stands under."""
        return f"teachers.{task}" if task in self.teachers else "teacher"

    def columns_of(self, teacher: TeacherConfig) -> frozenset[ScoreColumn]:
        """Columns that this run stores of a scoring model."""
        absent: set[ScoreColumn] = set() if self.rollout.student_topk else {"student_topk"}
        drawn: set[ScoreColumn] = {"draws"} if self.score.draws else set()
        if self.score.columns is not None:
            return (frozenset(self.score.columns) | drawn) - absent
        return ((teacher.can_give - {"draws"}) | drawn) - absent

    @property
    def scores(self) -> bool:
        """Whether anything is scored."""
        models = (self.teacher, *self.teachers.values(), *self.references.values())
        return any(map(self.columns_of, models))

    @model_validator(mode="after")
    def _columns_can_be_given(self) -> Self:
        if "draws" in (self.score.columns or ()) and not self.score.draws:
            raise ValueError("score.columns: 'draws' needs score.draws to say how many")
        for teacher in (self.teacher, *self.teachers.values(), *self.references.values()):
            lacking = sorted(self.columns_of(teacher) - teacher.can_give)
            if lacking:
                raise ValueError(
                    f"score: the backend {teacher.backend.type!r} cannot give {lacking[0]!r}, only "
                    f"{', '.join(sorted(teacher.can_give))}"
                )
        return self

    @model_validator(mode="after")
    def _the_student_can_be_scored(self) -> Self:
        if STUDENT in {teacher.model for teacher in (self.teacher, *self.teachers.values())}:
            raise ValueError(f"teacher.model: {STUDENT} can only be a reference")
        for name, reference in self.references.items():
            if reference.model == STUDENT and isinstance(reference.backend, HttpBackend):
                raise ValueError(f"references.{name}: {STUDENT} is not served by http")
        return self

    @model_validator(mode="after")
    def _evaluation_asks_no_served_teacher(self) -> Self:
        served = [t for t in (self.teacher, *self.teachers.values()) if t.backend.type == "http"]
        evaluation = self.evaluation
        if evaluation is None or not served or (evaluation.verifier and not evaluation.teacher):
            return self
        raise ValueError(
            "evaluation: it compares whole distributions, and samples answers, which an http "
            "teacher does not give; set evaluation.verifier, and evaluation.teacher to false, to "
            "evaluate students alone"
        )

    @model_validator(mode="after")
    def _the_verifier_knows_the_prompts(self) -> Self:
        if self.evaluation is None or self.evaluation.verifier != "reasoning_gym":
            return self
        if not isinstance(self.evaluation.source or self.prompts.source, ReasoningGymSource):
            raise ValueError(
                "evaluation.verifier: 'reasoning_gym' scores answers to prompts of a reasoning_gym "
                "source; take 'math' or a function of yours"
            )
        return self

    @model_validator(mode="after")
    def _loss_is_served(self) -> Self:
        loss = self.train.loss
        reason = refusal(loss)
        if reason:
            raise ValueError(f"train.loss: {reason}")
        if imitates(loss) and self.rollouts is None:
            raise ValueError(
                "train.loss: cross-entropy on the sampled token imitates whoever sampled, here the "
                "student itself; take completions of another model with 'rollouts: {from: …}'"
            )
        needs, tokens = cell(loss), self.train.tokens
        chosen: set[ScoreColumn] = (
            {"entropy"} if tokens.fraction < 1 and tokens.by == "entropy" else set()
        )
        if needs.needs_recorded_topk and self.rollout.student_topk < loss.k:
            raise ValueError(
                f"train.loss: support {loss.support!r} with k = {loss.k} needs rollouts that "
                f"record it; set rollout.student_topk to {loss.k} or more, not "
                f"{self.rollout.student_topk}"
            )
        if self.train.max_staleness and not tolerates_older(loss):
            raise ValueError(
                "train.max_staleness: this loss looks at what the round's own policy sampled; "
                "take support 'teacher_topk', 'overlap' or 'draws' without reference_kl, and "
                "importance_cap with 'sampled' or an outcome"
            )
        if tokens.fraction < 1 and tokens.by == "divergence" and not is_divergence(loss):
            raise ValueError(
                "train.tokens.by: the value of this loss is no divergence, so its largest tokens "
                "are not those that differ most; choose by 'entropy'"
            )
        teachers = (self.teacher, *self.teachers.values())
        stored = frozenset.intersection(*map(self.columns_of, teachers))
        missing = (needs.columns | chosen) - stored
        if "draws" in missing and not self.score.draws:
            raise ValueError("train.loss: support 'draws' needs score.draws to say how many")
        if missing:
            names = ", ".join(sorted(missing))
            place = "train.loss" if missing & needs.columns else "train.tokens.by"
            raise ValueError(
                f"{place}: it needs the score column {names}; add it to score.columns, or take a "
                "backend that gives it"
            )
        ends = self.train.end_round
        if (ends.overlap or ends.support_mass) and "topk" not in stored:
            raise ValueError(
                "train.end_round: overlap and support_mass need the score column topk of every "
                "teacher"
            )
        if loss.reference is not None:
            self._reference_serves(loss.reference)
        if "topk" in needs.columns and self.score.k < loss.k:
            raise ValueError(
                f"train.loss: k = {loss.k} is more than score.k = {self.score.k} keeps"
            )
        return self

    def _reference_serves(self, name: str) -> None:
        if name not in self.references:
            named = ", ".join(sorted(self.references)) or "none"
            raise ValueError(f"train.loss.reference: {name!r} is not in references ({named})")
        columns = reference_columns(self.train.loss)
        missing = columns - self.columns_of(self.references[name])
        if missing:
            raise ValueError(
                f"train.loss.reference: the loss needs the score column {sorted(missing)[0]} of "
                f"references.{name}; add it to score.columns, or take a backend that gives it"
            )
