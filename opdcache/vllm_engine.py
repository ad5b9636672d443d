"""The one door to vLLM: an engine that takes token ids, and its log-probs as columns.

Stages say what they ask of it with vLLM's own argument names; what no stage may leave to chance
(prefix caching, the log-probs' mode) each sets for itself.
"""

import difflib
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, ValidationError

from .errors import ConfigError, EngineError

if TYPE_CHECKING:
    from vllm import LLM
    from vllm import RequestOutput as RequestOutput
    from vllm.logprobs import FlatLogprobs

CPU_KVCACHE_BYTES = 4 * 2**30
RUNTIME_ARGUMENTS = frozenset(
    {
        "block_size",
        "data_parallel_size",
        "disable_log_stats",
        "distributed_executor_backend",
        "download_dir",
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "pipeline_parallel_size",
        "tensor_parallel_size",
    }
)
"""Engine arguments that cannot change distributions. Any other is part of a shard's key."""


class Engine:
    """A vLLM engine.

    Args:
        own: engine arguments that the stage decides.
        free: more of them, as the run file gives them.
        place: where in the run file those are, such as ``rollout.engine``.

    Attributes:
        llm: the engine itself.

    Raises:
        ConfigError: vLLM does not know an argument, or it is one that the stage decides.
        EngineError: the engine does not start.
    """

    def __init__(
        self, own: Mapping[str, JsonValue], free: Mapping[str, JsonValue], place: str
    ) -> None:
        decided = sorted(own.keys() & free.keys())
        if decided:
            raise ConfigError(
                f"{place}: {decided[0]!r} is not free",
                remedy="it follows from the run file's other keys; remove it",
            )
        usual = {"disable_log_stats": True, "use_tqdm_on_load": False, **_cpu_arguments()}
        self.llm = _start({**usual, **free, **own}, place)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence, prompt and completion."""
        return int(self.llm.model_config.max_model_len)

    def generate(
        self, prompts: Sequence[Sequence[int]], parameters: Sequence[Mapping[str, Any]]
    ) -> "list[RequestOutput]":
        """One batch of requests, each with its sampling parameters; log-probs come flat.

        Raises:
            EngineError: vLLM refuses a request.
        """
        from vllm import SamplingParams, TokensPrompt

        try:
            with _uncompiled():
                outputs: list[RequestOutput] = self.llm.generate(
                    [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts],
                    [SamplingParams(**one, flat_logprobs=True) for one in parameters],
                    use_tqdm=False,
                )
        except _faults() as error:
            raise EngineError(f"vLLM refuses a request: {_reason(error)}") from error
        return outputs

    def forget(self) -> None:
        """Drop what is kept of earlier requests: the next batch is computed as the first would."""
        self.llm.reset_prefix_cache()

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        from .models import free_memory

        self.llm.llm_engine.engine_core.shutdown()
        free_memory()


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probs of consecutive tokens as columns. T tokens, W entries a token.

    The token itself comes first, then the likeliest ones, of which it may be one.

    Attributes:
        ids: int32 [T, W].
        logprobs: float32 [T, W], nats.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    @classmethod
    def of(cls, flat: Any, token_ids: Iterable[int], start: int = 0) -> "Logprobs":
        """Read vLLM's flat log-probs from position ``start`` on.

        Raises:
            EngineError: a position is missing, or its first entry is another token.
        """
        tokens = np.asarray(list(token_ids), np.int32)
        logprobs: FlatLogprobs = flat
        if logprobs is None or len(logprobs) != start + len(tokens):
            got = 0 if logprobs is None else len(logprobs)
            raise EngineError(
                "vLLM gave no log-prob for a position", expected=start + len(tokens), got=got
            )
        if not len(tokens):
            return cls(np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32))
        begin, end = logprobs.start_indices[start], logprobs.end_indices[-1]
        widths = np.subtract(logprobs.end_indices, logprobs.start_indices)[start:]
        width = int(widths[0])
        if not width or not (widths == width).all():
            raise EngineError(
                "vLLM gave no log-prob, or fewer than of another, for a position",
                got=f"{widths.min()} to {widths.max()} entries",
            )
        ids = np.asarray(logprobs.token_ids[begin:end], np.int32).reshape(len(tokens), width)
        values = np.asarray(logprobs.logprobs[begin:end], np.float32).reshape(ids.shape)
        if not (ids[:, 0] == tokens).all():
            raise EngineError("vLLM's log-probs are not aligned with the tokens")
        return cls(ids, values)

    @property
    def sampled(self) -> NDArray[np.float32]:
        """[T], of the tokens themselves."""
        return self.logprobs[:, 0]

    def topk(self, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ids and log-probs [T, k] of the likeliest, likeliest first."""
        return self.ids[:, 1 : k + 1], self.logprobs[:, 1 : k + 1]


def _cpu_arguments() -> dict[str, JsonValue]:
    """What vLLM's CPU backend wants: per-request seeds fail there under chunked prefill, and its
    own blocks of 128 tokens are longer than many prompts that completions could share."""
    import torch

    if torch.accelerator.is_available():
        return {}
    return {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "block_size": 32,
        "kv_cache_memory_bytes": CPU_KVCACHE_BYTES,
    }


def _uncompiled() -> AbstractContextManager[object]:
    """On a CPU: what vLLM compiles of its sampler there takes longer to compile than to run."""
    import torch

    if torch.accelerator.is_available():
        return nullcontext()
    uncompiled: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return uncompiled


def import_vllm() -> None:
    """Import vLLM, silently: seconds, which processes that are forked afterwards save."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # vLLM looks at every attribute of torch, the deprecated ones too, when it is imported.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.triton_utils")
    import vllm.entrypoints.llm  # noqa: F401


def _start(arguments: dict[str, Any], place: str) -> "LLM":
    import_vllm()
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    if all(arguments.get(name, 1) == 1 for name in sizes):
        # One device: the engine runs in this process, which saves most of its start-up.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = EngineArgs.__dataclass_fields__
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ConfigError(
            f"{place}: vLLM has no engine argument {unknown[0]!r}",
            remedy=f"did you mean {near[0]!r}?" if near else "see vLLM's engine arguments",
        )
    faults: tuple[type[Exception], ...] = (*_faults(), RuntimeError, OSError)
    try:
        return LLM(**arguments)
    except ValidationError as error:
        fault = error.errors()[0]
        at = ".".join([place, *map(str, fault["loc"])])
        raise ConfigError(f"{at}: {fault['msg'].removeprefix('Value error, ')}") from error
    except faults as error:
        raise EngineError(
            f"vLLM does not start: {_reason(error)}", where=arguments["model"]
        ) from error


def _faults() -> tuple[type[Exception], ...]:
    """What vLLM raises of arguments and requests; its own tree is new."""
    from vllm import exceptions

    return ValueError, getattr(exceptions, "VLLMError", ValueError)


def _reason(error: Exception) -> str:
    """What an error says last."""
    return str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
