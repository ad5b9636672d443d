"""Samples completions with vLLM.

Two log-probs of every sampled token are recorded: the raw one (the model's own distribution at
temperature 1) and the one under the distribution sampled from. At plain sampling they are the same.
Otherwise the engine reports the processed ones while it samples, and a second, prefill-only pass
over the finished completions gives the raw ones: vLLM's prompt log-probs are always raw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from ..errors import PromptError
from ..schemas.manifests import Sampling
from ..vllm_engine import Engine, Logprobs

if TYPE_CHECKING:
    from ..vllm_engine import RequestOutput


@dataclass(frozen=True, slots=True)
class Draw:
    """One completion to draw."""

    prompt_token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """One completion drawn. T tokens, S recorded entries a token.

    Attributes:
        behavior_logprobs: float32 [T], raw.
        sampling_logprobs: float32 [T], under the distribution sampled from.
        topk_ids: int32 [T, S], the policy's likeliest ids, in descending order.
        topk_logprobs: float32 [T, S], raw.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    behavior_logprobs: NDArray[np.float32]
    sampling_logprobs: NDArray[np.float32]
    topk_ids: NDArray[np.int32]
    topk_logprobs: NDArray[np.float32]


class Sampler:
    """A vLLM engine that samples from one policy.

    Args:
        folder: the policy, in Hugging Face format.
        dtype: dtype that it computes in.
        processed: whether any request will be drawn from a changed distribution (a temperature, a
            nucleus): it decides which log-probs the engine reports while it samples.
        topk: recorded entries a token; 0 records none.
        arguments: more engine arguments.
        place: where in the run file those are.

    Raises:
        ConfigError: vLLM does not know an argument, or it is one that this class decides.
        EngineError: the engine does not start.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        processed: bool,
        topk: int,
        arguments: dict[str, JsonValue],
        place: str = "rollout.engine",
    ) -> None:
        self.topk, self._place = topk, place
        own: dict[str, JsonValue] = {
            "model": str(folder),
            "dtype": dtype,
            "logprobs_mode": "processed_logprobs" if processed else "raw_logprobs",
            "max_logprobs": max(topk, 1),
        }
        self.engine = Engine(own, arguments, place)

    def sample(self, draws: Sequence[Draw], sampling: Sampling) -> list[Drawn]:
        """Draw every completion, as one batch of requests.

        A completion ends at the latest where the engine's ``max_model_len`` does. Prompts that
        begin alike share their keys and values within the batch, and none with earlier batches:
        what is drawn hangs on this batch alone.

        Raises:
            PromptError: a prompt leaves no room for a completion.
            EngineError: a request came back without its log-probs.
        """
        plain = sampling.is_plain
        shared = {
            **sampling.model_dump(exclude={"stop", "max_tokens"}),
            "stop": list(sampling.stop),
            "logprobs": self.topk if plain else 0,
        }
        # The raw pass reads a whole completion as a prompt, and vLLM wants room for a token after.
        room = self.engine.max_model_len - (0 if plain else 1)
        longest = max(len(draw.prompt_token_ids) for draw in draws)
        if longest >= room:
            raise PromptError(
                "a prompt fills the engine's context",
                expected=f"fewer than {room} tokens",
                got=longest,
                remedy=f"lower prompts.max_prompt_tokens or raise {self._place}.max_model_len",
            )
        self.engine.forget()
        limits = [min(sampling.max_tokens, room - len(d.prompt_token_ids)) for d in draws]
        outputs = self.engine.generate(
            [draw.prompt_token_ids for draw in draws],
            [
                {**shared, "max_tokens": limit, "seed": draw.seed}
                for draw, limit in zip(draws, limits, strict=True)
            ],
        )
        completions = [Logprobs.of(o.outputs[0].logprobs, o.outputs[0].token_ids) for o in outputs]
        raw = completions if plain else self._raw(outputs)
        return [
            Drawn(
                token_ids=tuple(output.outputs[0].token_ids),
                text=output.outputs[0].text,
                finish_reason=str(output.outputs[0].finish_reason),
                behavior_logprobs=own.sampled,
                sampling_logprobs=drawn.sampled,
                topk_ids=own.topk(self.topk)[0],
                topk_logprobs=own.topk(self.topk)[1],
            )
            for output, drawn, own in zip(outputs, completions, raw, strict=True)
        ]

    def _raw(self, outputs: Sequence["RequestOutput"]) -> list[Logprobs]:
        """Raw log-probs of finished completions, by prefill alone."""
        prompts = [o.prompt_token_ids or [] for o in outputs]
        whole = [[*p, *o.outputs[0].token_ids] for p, o in zip(prompts, outputs, strict=True)]
        ask = {"max_tokens": 1, "prompt_logprobs": self.topk, "detokenize": False}
        scored = self.engine.generate(whole, [ask] * len(whole))
        return [
            Logprobs.of(s.prompt_logprobs, o.outputs[0].token_ids, len(p))
            for s, o, p in zip(scored, outputs, prompts, strict=True)
        ]

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        self.engine.close()
