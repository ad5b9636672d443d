"""The one door to vLLM for sampling.

Two log-probs of every sampled token are recorded: the raw one (the model's own distribution at
temperature 1) and the one under the distribution sampled from. At plain sampling they are the same.
Otherwise the engine reports the processed ones while it samples, and a second, prefill-only pass
over the finished completions gives the raw ones: vLLM's prompt log-probs are always raw.
"""

import difflib
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, ValidationError

from ..errors import ConfigError, EngineError, PromptError
from ..schemas.manifests import Sampling

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput
    from vllm.logprobs import FlatLogprobs

CPU_KVCACHE_GIB = "4"


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
    ) -> None:
        self.topk = topk
        own: dict[str, JsonValue] = {
            "model": str(folder),
            "dtype": dtype,
            "logprobs_mode": "processed_logprobs" if processed else "raw_logprobs",
            "max_logprobs": max(topk, 1),
        }
        decided = sorted(own.keys() & arguments.keys())
        if decided:
            raise ConfigError(
                f"rollout.engine: {decided[0]!r} is not free",
                remedy="it follows from student, rollout.dtype and rollout.student_topk; remove it",
            )
        usual = {"disable_log_stats": True, "use_tqdm_on_load": False, **_cpu_arguments()}
        self._llm = _start({**usual, **arguments, **own})

    def sample(self, draws: Sequence[Draw], sampling: Sampling) -> list[Drawn]:
        """Draw every completion, as one batch of requests.

        A completion ends at the latest where the engine's ``max_model_len`` does.

        Raises:
            PromptError: a prompt leaves no room for a completion.
            EngineError: a request came back without its log-probs.
        """
        from vllm import SamplingParams, TokensPrompt

        plain = sampling.is_plain
        shared = {
            **sampling.model_dump(exclude={"stop", "max_tokens"}),
            "stop": list(sampling.stop),
            "logprobs": self.topk if plain else 0,
            "flat_logprobs": True,
        }
        # The raw pass reads a whole completion as a prompt, and vLLM wants room for a token after.
        room = int(self._llm.model_config.max_model_len) - (0 if plain else 1)
        longest = max(len(draw.prompt_token_ids) for draw in draws)
        if longest >= room:
            raise PromptError(
                "a prompt fills the engine's context",
                expected=f"fewer than {room} tokens",
                got=longest,
                remedy="lower prompts.max_prompt_tokens or raise rollout.engine.max_model_len",
            )
        limits = [min(sampling.max_tokens, room - len(d.prompt_token_ids)) for d in draws]
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=list(draw.prompt_token_ids)) for draw in draws],
            [
                SamplingParams(**shared, max_tokens=limit, seed=draw.seed)
                for draw, limit in zip(draws, limits, strict=True)
            ],
            use_tqdm=False,
        )
        completions = [_Columns.of(o.outputs[0].logprobs, o.outputs[0].token_ids) for o in outputs]
        raw = completions if plain else self._raw(outputs)
        return [
            Drawn(
                token_ids=tuple(output.outputs[0].token_ids),
                text=output.outputs[0].text,
                finish_reason=str(output.outputs[0].finish_reason),
                behavior_logprobs=own.sampled,
                sampling_logprobs=drawn.sampled,
                topk_ids=own.topk_ids(self.topk),
                topk_logprobs=own.topk_logprobs(self.topk),
            )
            for output, drawn, own in zip(outputs, completions, raw, strict=True)
        ]

    def _raw(self, outputs: Sequence["RequestOutput"]) -> list["_Columns"]:
        """Raw log-probs of finished completions, by prefill alone."""
        from vllm import SamplingParams, TokensPrompt

        whole = [[*(o.prompt_token_ids or ()), *o.outputs[0].token_ids] for o in outputs]
        ask = SamplingParams(
            max_tokens=1, prompt_logprobs=self.topk, flat_logprobs=True, detokenize=False
        )
        scored = self._llm.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in whole], ask, use_tqdm=False
        )
        return [
            _Columns.of(s.prompt_logprobs, o.outputs[0].token_ids, len(o.prompt_token_ids or ()))
            for s, o in zip(scored, outputs, strict=True)
        ]

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        self._llm.llm_engine.engine_core.shutdown()


@dataclass(frozen=True, slots=True)
class _Columns:
    """Log-probs of a completion as columns: the sampled token first, then the likeliest ones."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    @classmethod
    def of(cls, flat: Any, token_ids: Iterable[int], start: int = 0) -> "_Columns":
        """Read vLLM's flat log-probs from position ``start`` on.

        The sampled token comes first and may be one of the likeliest or an entry of its own.

        Raises:
            EngineError: a position is missing, or its first entry is another token.
        """
        sampled = np.asarray(list(token_ids), np.int32)
        logprobs: FlatLogprobs = flat
        if logprobs is None or len(logprobs) != start + len(sampled):
            got = 0 if logprobs is None else len(logprobs)
            raise EngineError(
                "vLLM gave no log-prob for a position", expected=start + len(sampled), got=got
            )
        if not len(sampled):
            return cls(np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32))
        begin, end = logprobs.start_indices[start], logprobs.end_indices[-1]
        width = (end - begin) // len(sampled)
        ids = np.asarray(logprobs.token_ids[begin:end], np.int32).reshape(len(sampled), width)
        values = np.asarray(logprobs.logprobs[begin:end], np.float32).reshape(ids.shape)
        if not (ids[:, 0] == sampled).all():
            raise EngineError("vLLM's log-probs are not aligned with the sampled tokens")
        return cls(ids, values)

    @property
    def sampled(self) -> NDArray[np.float32]:
        return self.logprobs[:, 0]

    def topk_ids(self, k: int) -> NDArray[np.int32]:
        return self.ids[:, 1 : k + 1]

    def topk_logprobs(self, k: int) -> NDArray[np.float32]:
        return self.logprobs[:, 1 : k + 1]


def _cpu_arguments() -> dict[str, JsonValue]:
    """What vLLM's CPU backend wants: per-request seeds fail there under chunked prefill."""
    import torch

    if torch.accelerator.is_available():
        return {}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_KVCACHE_GIB)
    return {"enforce_eager": True, "enable_chunked_prefill": False}


def _start(arguments: dict[str, Any]) -> "LLM":
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    if all(arguments.get(name, 1) == 1 for name in sizes):
        # One device: the engine runs in this process, which saves most of its start-up.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # vLLM looks at every attribute of torch, the deprecated ones too, when it is imported.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.triton_utils")
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = EngineArgs.__dataclass_fields__
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ConfigError(
            f"rollout.engine: vLLM has no engine argument {unknown[0]!r}",
            remedy=f"did you mean {near[0]!r}?" if near else "see vLLM's engine arguments",
        )
    try:
        return LLM(**arguments)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(["rollout.engine", *map(str, fault["loc"])])
        raise ConfigError(f"{place}: {fault['msg'].removeprefix('Value error, ')}") from error
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        raise EngineError(f"vLLM does not start: {reason}", where=arguments["model"]) from error
