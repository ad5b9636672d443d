"""Processes of this machine that begin with the large libraries imported.

They are forked from one process, which imports torch, transformers and vLLM once for all workers of
all stages, and is gone with the launcher.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess

_PR_SET_PDEATHSIG = 1
_TRIES, _PAUSE_S = 10, 0.5
_WITH_VLLM = "OPDCACHE_PRELOAD_VLLM"


class Processes:
    """Starts ``opdcache`` commands.

    Args:
        with_vllm: import vLLM ahead. It takes longest, so only where more than one process will
            need it.
    """

    def __init__(self, *, with_vllm: bool) -> None:
        self._context: ForkServerContext = get_context("forkserver")
        self._context.set_forkserver_preload([f"{__package__}.preloaded"])
        self._ahead = {
            # Nothing may ask the driver of a device before the fork.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            _WITH_VLLM: "1" if with_vllm else "",
        }

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> BaseProcess:
        """One command in a process of its own, which stops when this one is gone."""
        for _ in range(_TRIES - 1):
            with suppress(EOFError, ConnectionError):  # what forks was killed, and is ending
                return self._start(arguments, environment)
            time.sleep(_PAUSE_S)
        return self._start(arguments, environment)

    def _start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> BaseProcess:
        process = self._context.Process(target=_run, args=(list(arguments), dict(environment)))
        with _variables(self._ahead):
            process.start()
        return process


def stop_with_parent() -> None:
    """Get a SIGTERM when the process that started this one ends, as far as the system can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


_KEPT_BACK = (signal.SIGTERM, signal.SIGUSR1)


def preload() -> None:
    """Import what takes long, in the process that all others are forked from.

    Signals to a whole group of processes do not end it: it alone sees how the others end.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _KEPT_BACK)
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    if os.environ.get(_WITH_VLLM):
        from ..vllm_engine import import_vllm

        import_vllm()


def _run(arguments: list[str], environment: dict[str, str]) -> None:
    stop_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _KEPT_BACK)
    os.environ.update(environment)
    if "torch" in sys.modules:  # it read the variable when it was imported
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.argv = ["opdcache", *arguments]
    import_module("opdcache.cli.main").main()


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
