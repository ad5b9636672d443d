"""What runs a teacher: the backend that a run file names, loaded."""

from pydantic import JsonValue

from ..resolve import model_folder
from ..runfolder import RunContext
from ..schemas.teachers import HttpBackend, TeacherConfig, TransformersBackend, VllmBackend
from ..vllm_engine import RUNTIME_ARGUMENTS
from .http_scorer import HttpScorer
from .teacher import Teacher
from .transformers_scorer import TransformersScorer
from .vllm_scorer import VllmScorer

_PLACEMENT = frozenset({"attn_implementation", "device_map", "max_memory", "offload_folder"})
"""Arguments of transformers that cannot change distributions beyond rounding."""


def load_teacher(context: RunContext, config: TeacherConfig) -> Teacher:
    """A scoring model, ready to score.

    Raises:
        ModelError: it cannot be loaded.
        EngineError: its engine does not start, or its server does not serve it.
    """
    score, name = context.config.score, config.model
    match config.backend:
        case HttpBackend() as backend:
            context.progress.say(f"asking {backend.url} for {name}")
            return HttpScorer(config.model, backend, context.folder.sent_tokens_path)
        case VllmBackend() as backend:
            folder = model_folder(config)
            context.progress.say(f"starting vLLM for the teacher {folder.name}")
            return VllmScorer(
                folder,
                dtype=config.dtype,
                k=max(score.k, context.config.rollout.student_topk),
                batch_tokens=score.batch_tokens,
                arguments=backend.engine,
            )
        case TransformersBackend() as backend:
            folder = model_folder(config)
            context.progress.say(f"loading the teacher {folder.name}")
            return TransformersScorer(
                folder,
                dtype=config.dtype,
                batch_tokens=score.batch_tokens,
                arguments=backend.arguments,
                say=context.progress.say,
            )


def model_arguments(config: TeacherConfig) -> dict[str, JsonValue]:
    """Arguments that change a model's distributions; one not known to be harmless counts.

    So one score set serves whatever backend a run names, unless these differ.
    """
    match config.backend:
        case VllmBackend(engine=arguments):
            harmless = RUNTIME_ARGUMENTS | {"max_model_len"}
        case TransformersBackend(arguments=arguments):
            harmless = _PLACEMENT
        case _:
            return {}
    return {name: value for name, value in arguments.items() if name not in harmless}
