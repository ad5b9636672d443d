"""What runs a teacher: the backend that a run file names, loaded."""

from ..resolve import model_folder
from ..runfolder import RunContext
from ..schemas.teachers import HttpBackend, TeacherConfig, TransformersBackend, VllmBackend
from .http_scorer import HttpScorer
from .teacher import Teacher
from .transformers_scorer import TransformersScorer
from .vllm_scorer import VllmScorer


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
