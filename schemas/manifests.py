"""Manifests: what commits a shard, and the preimages that its key is made of.

An *identity* is everything that decides a shard's contents; its key is the SHA-256 of the
identity's canonical JSON (``opdcache.identity.key_of``). What cannot change the contents
(engine version, batch shape, host) is provenance.
"""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from . import SCHEMA_VERSION
from .base import Model
from .columns import ScoreColumn

AS_SAMPLED = "as-sampled"
"""Rendering of a teacher that reads exactly the prompt token ids that the student read. Any other
is the digest of the token ids that the teacher reads in the place of the shard's prompts."""

Kind = Literal["rollouts", "scores"]
Quality = Literal["truncated", "repetitive"]
"""What can be wrong with a completion; ``opdcache.quality`` tells."""


class Sampling(Model):
    """How completions are drawn from the student."""

    temperature: float = Field(1.0, gt=0, description="softmax temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus mass; 1 keeps everything")
    top_k: int = Field(0, ge=0, description="likeliest ids kept; 0 keeps everything")
    min_p: float = Field(0.0, ge=0, le=1, description="least probability, relative to the top one")
    max_tokens: int = Field(1024, ge=1, description="longest completion, in tokens")
    stop: tuple[str, ...] = Field((), description="strings that end a completion")

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the model's own distribution, unchanged."""
        kept = self.top_p == 1 and self.top_k == 0 and self.min_p == 0
        return kept and self.temperature == 1


class RolloutIdentity(Model):
    """Preimage of a rollout key."""

    schema_version: int = Field(SCHEMA_VERSION, description="major version of the shard format")
    student: str = Field(description="fingerprint of the policy's weights and configuration")
    vocabulary: str = Field(description="fingerprint of the token ids' meaning")
    eos_token_id: int | None = Field(
        description="the tokenizer's end of sequence: ends a completion"
    )
    prompts: str = Field(description="SHA-256 of the prompts' token ids, in request order")
    labels: str = Field(
        description="SHA-256 of the requests' prompt id, sample index, task and answer, in order"
    )
    seeds: str = Field(description="SHA-256 of the requests' seeds, in request order")
    num_requests: int = Field(description="completions asked for")
    sampling: Sampling = Field(description="how completions are drawn")
    engine: dict[str, JsonValue] = Field(description="engine arguments that change the policy")
    student_topk: int = Field(description="recorded student entries a token; 0 records none")

    @property
    def absent(self) -> frozenset[str]:
        """Optional columns that the shard cannot have."""
        recorded = {"student_topk_ids"} if not self.student_topk else set()
        return frozenset(recorded | {"loss_mask"})


class ImportIdentity(Model):
    """Preimage of the key of rollouts that were made elsewhere: all that was said of them.

    A digest of a column covers its values on the shard's token axis; None when it is absent.
    """

    schema_version: int = Field(SCHEMA_VERSION, description="major version of the shard format")
    student: str = Field(description="fingerprint of the policy that is said to have sampled")
    vocabulary: str = Field(description="fingerprint of the token ids' meaning")
    content: str = Field(description="content hash of the shard")
    labels: str = Field(
        description="SHA-256 of the rows' prompt id, sample index, task, answer, finish reason, "
        "text and, in a shard that has the column, messages, in order"
    )
    behavior_logprobs: str | None = Field(description="SHA-256 of the column, little-endian")
    sampling_logprobs: str | None = Field(description="SHA-256 of the column, little-endian")
    loss_mask: str | None = Field(description="SHA-256 of the column, a byte a token")

    @property
    def student_topk(self) -> int:
        """Recorded student entries a token: none are imported."""
        return 0

    @property
    def absent(self) -> frozenset[str]:
        """Optional columns that the shard cannot have."""
        optional = ("behavior_logprobs", "sampling_logprobs", "loss_mask")
        missing = {name for name in optional if getattr(self, name) is None}
        return frozenset(missing | {"student_topk_ids"})


class ScoreIdentity(Model):
    """Preimage of a score key."""

    schema_version: int = Field(SCHEMA_VERSION, description="major version of the shard format")
    content: str = Field(description="content hash of the scored rollout shard")
    teacher: str = Field(description="fingerprint of the scoring model")
    rendering: str = Field(description="how the teacher's prompt is made")
    dtype: str = Field(description="dtype that the teacher computes in")
    arguments: dict[str, JsonValue] = Field(
        {}, description="arguments of the model or its engine that change the distributions"
    )
    columns: tuple[ScoreColumn, ...] = Field(description="stored columns, sorted")
    k: int = Field(description="most kept entries a token; whether or not top-k is stored")
    mass: float = Field(description="entries are kept until they hold this mass; 1 keeps k always")
    num_ids: int = Field(description="entries are kept among the ids below this: the shared ones")
    step: float = Field(description="quantisation step of the log-probs")
    draws: int = Field(0, ge=0, description="ids drawn a token; 0 without draws")
    draw_seed: int = Field(0, ge=0, description="seed of the draws; 0 without draws")


class ScoreRequirement(Model):
    """What a run needs of the scores of a rollout shard. Any set that fits may serve it."""

    teacher: str = Field(description="fingerprint of the scoring model")
    rendering: str = Field(description="how the teacher's prompt is made")
    dtype: str = Field(description="dtype that the teacher computes in")
    arguments: dict[str, JsonValue] = Field(
        {}, description="arguments of the model or its engine that change the distributions"
    )
    columns: frozenset[ScoreColumn] = Field(description="columns needed")
    k: int = Field(description="least kept entries a token")
    mass: float = Field(description="least mass threshold")
    num_ids: int = Field(description="entries are kept among the ids below this")
    step: float = Field(description="coarsest quantisation step")
    draws: int = Field(0, ge=0, description="least ids drawn a token, whatever their seed")

    def served_by(self, scores: ScoreIdentity) -> frozenset[ScoreColumn]:
        """The needed columns that this set gives; empty when it is another teacher's."""
        exactly = ("teacher", "rendering", "dtype", "arguments")
        if any(getattr(self, name) != getattr(scores, name) for name in exactly):
            return frozenset()
        fine = scores.step <= self.step
        wide = scores.k >= self.k and scores.mass >= self.mass
        fits = {"topk": fine and wide and scores.num_ids == self.num_ids}
        fits["student_topk"] = fine
        fits["draws"] = scores.draws >= self.draws and scores.num_ids == self.num_ids
        return frozenset(c for c in self.columns & set(scores.columns) if fits.get(c, True))


BLOCK_BYTES = 2**20
"""Length of the blocks that a long object's hashes are of; the last may be shorter."""


class ObjectEntry(Model):
    """One stored object of a shard."""

    path: str = Field(description="path below the attempt's prefix")
    size_bytes: int = Field(description="length of the object")
    sha256: str = Field(description="SHA-256 of the object's bytes, hex")
    blocks: tuple[str, ...] = Field(
        (), description="SHA-256 of each MiB of the object, when it is longer than one"
    )


class Provenance(Model):
    """Who made a shard, when and how: never part of a key."""

    versions: dict[str, str] = Field(description="package versions, this one's included")
    host: str = Field(description="machine that made the shard")
    run_id: str = Field(description="run that asked for the shard")
    created_at: str = Field(description="time of the commit, UTC, ISO 8601")
    elapsed_s: float = Field(description="seconds of computing, model loading excluded")
    tokens_per_s: float = Field(description="completion tokens a second of computing")
    details: dict[str, JsonValue] = Field(description="engine arguments, batch shape, device")


class _Manifest(Model):
    schema_version: int = Field(SCHEMA_VERSION, description="major version of the shard format")
    key: str = Field(description="SHA-256 of the identity")
    attempt: str = Field(description="name of the attempt that won")
    objects: tuple[ObjectEntry, ...] = Field(description="every object of the shard")
    num_rows: int = Field(description="completions")
    num_tokens: int = Field(description="completion tokens")
    dropped: dict[str, int] = Field(description="what was left out, by reason")
    provenance: Provenance = Field(description="who made it, when and how")


class RolloutManifest(_Manifest):
    """Commits a rollout shard."""

    kind: Literal["rollouts"] = Field("rollouts", description="what the shard holds")
    identity: RolloutIdentity | ImportIdentity = Field(description="preimage of the key")
    content: str = Field(description="hash of token ids, recorded ids and row order")
    num_prompt_tokens: int = Field(description="prompt tokens, each completion's counted")
    vocab_size: int = Field(description="ids are below this")
    task: str = Field(description="the one task of the shard's prompts")
    quality: dict[Quality, int] = Field(
        {}, description="completions that are truncated or repetitive; empty: nobody has counted"
    )


class ScoreManifest(_Manifest):
    """Commits a score shard."""

    kind: Literal["scores"] = Field("scores", description="what the shard holds")
    identity: ScoreIdentity = Field(description="preimage of the key")
    rollout_key: str = Field(description="key of the rollout shard that was scored")
    vocab_size: int = Field(description="ids are below this")
    clip_floor: float = Field(description="log-probs below this are stored as this, nats")


Manifest = Annotated[RolloutManifest | ScoreManifest, Field(discriminator="kind")]
