"""The train stage's part of the run file."""

from typing import Literal

from pydantic import Field, JsonValue

from .base import Model
from .losses import LossConfig, TokensConfig
from .manifests import Quality

Layout = Literal["padded", "packed", "shared"]
"""A row a sequence; all of a micro-batch's in one row; a row a prompt with its completions."""


class OptimizerConfig(Model):
    """AdamW and its schedule."""

    lr: float = Field(1e-6, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of the two moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="after the warm-up; linear and cosine end at 0 with the run"
    )
    warmup_updates: int = Field(0, ge=0, description="updates of linear warm-up")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")


class LoraConfig(Model):
    """Low-rank adapters in the place of all weights."""

    rank: int = Field(16, ge=1, description="rank of the adapters")
    alpha: float = Field(32.0, gt=0, description="what they add is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before them")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description="ends of the names of the modules that get one; all-linear: every linear "
        "module but the LM head",
    )
    export_adapter: bool = Field(
        False, description="write each round's adapter too, below its student, in peft's format"
    )


class EndRound(Model):
    """When a round's rollouts are too old to go on with; an update's own means are compared."""

    ess: float | None = Field(
        None,
        gt=0,
        le=1,
        description="least effective sample size of p live / p sampling, as a share of the tokens; "
        "sampled at another temperature or top-p than 1 it begins below 1",
    )
    overlap: float | None = Field(
        None, gt=0, le=1, description="least overlap of the live student's top-k with the teacher's"
    )
    support_mass: float | None = Field(
        None,
        gt=0,
        le=1,
        description="least mass of the live student on the teacher's kept entries",
    )


class TrainConfig(Model):
    """The train stage."""

    loss: LossConfig = Field(LossConfig(), description="what the learner minimises")
    tokens: TokensConfig = Field(TokensConfig(), description="which tokens count, and how much")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="how it minimises")
    batch_samples: int = Field(64, ge=1, description="samples an update, over all ranks")
    micro_batch_tokens: int = Field(
        8192, ge=1, description="tokens of one forward and backward at most, padding included"
    )
    attention: str | None = Field(
        None,
        min_length=1,
        description="attention implementation of transformers, such as flash_attention_2; its "
        "default by default",
    )
    packing: bool | None = Field(
        None,
        description="sequences of a micro-batch stand in one row, told apart by their position "
        "ids, in place of padding; by default with flash attention, which looks at no pair of "
        "tokens of two sequences",
    )
    share_prompts: bool = Field(
        False,
        description="completions of one prompt come one after another in the training order, and "
        "are read behind one copy of it, which they all see, without seeing one another: the same "
        "gradient for fewer tokens read; needs full attention in every layer, not flash attention",
    )
    max_staleness: int = Field(
        0,
        ge=0,
        description="a round trains on the rollouts of so many rounds before it too; they must be "
        "in the cache",
    )
    end_round: EndRound = Field(
        EndRound(), description="the round ends after an update that is below one of these limits"
    )
    max_skipped: int = Field(
        10,
        ge=0,
        description="updates of a round whose gradient is not finite: so many are skipped, and "
        "counted; one more stops the run",
    )
    spike_factor: float = Field(
        3.0,
        gt=1,
        description="an update whose loss is above the median of the last ones times this is "
        "said aloud, with the sample that has the largest loss",
    )
    epochs: int = Field(1, ge=1, description="passes over a round's samples")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="weights in the forward pass; masters are always float32"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    offload_optimizer: bool = Field(
        False,
        description="keep masters and moments in the CPU's memory, and update there; needs "
        "zero_stage 1 or more",
    )
    lora: LoraConfig | None = Field(
        None,
        description="train adapters alone; students are exported with them merged, and the next "
        "round goes on with them on the student of round 0, or anew with fresh_optimizer",
    )
    deepspeed: dict[str, JsonValue] | str = Field(
        {},
        description="more of DeepSpeed's configuration, or the path of a JSON file that holds it: "
        "merged with what follows from the other keys, which it may not contradict; 'auto' is as "
        "if left out",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations")
    compile: bool = Field(
        False,
        description="torch.compile the student's body, for any length of its sequences; a first "
        "start takes minutes on a CPU",
    )
    head_chunk_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens of one LM-head chunk, whose logits are held; by default 512 on a CPU "
        "and 2048 on an accelerator, which waits for launches between smaller ones",
    )
    measure_every: int = Field(
        16,
        ge=1,
        description="of losses that are renormalised on a stored support, whose gradient needs no "
        "whole distributions: one token of so many is looked at whole, for the metrics",
    )
    checkpoint_every: int = Field(50, ge=1, description="updates between checkpoints")
    drop: tuple[Quality, ...] = Field(
        (), description="completions that are left out, counted; they stay in the cache"
    )
    fresh_optimizer: bool = Field(
        False, description="start each round's optimizer anew from the exported student"
    )
    trackio: str | None = Field(
        None, min_length=1, description="project to log metrics to with trackio as well"
    )

    @property
    def layout(self) -> Layout:
        """How the sequences of a micro-batch are laid out."""
        if self.share_prompts:
            return "shared"
        packs = self.packing
        if packs is None:
            packs = (self.attention or "").startswith("flash_attention")
        return "packed" if packs else "padded"

    def trained_rounds(self, round_index: int) -> range:
        """Rounds whose rollouts a round trains on."""
        return range(max(0, round_index - self.max_staleness), round_index + 1)
