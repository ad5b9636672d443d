"""The models of a run file: the student, and those that score, with what runs them."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import Field, JsonValue, model_validator

from .base import Model
from .columns import ScoreColumn

Dtype = Literal["bfloat16", "float16", "float32"]


class ModelRef(Model):
    """A model in Hugging Face format."""

    model: str = Field(description="folder (relative to the run file) or hub id")
    revision: str | None = Field(None, description="hub revision; not used for a folder")


class TransformersBackend(Model):
    """A teacher in transformers, in the worker's own process: gives every column."""

    type: Literal["transformers"] = Field("transformers", description="kind of backend")
    arguments: dict[str, JsonValue] = Field(
        {}, description="more arguments of from_pretrained: device_map, max_memory, …"
    )

    @model_validator(mode="after")
    def _a_worker_is_one_process(self) -> Self:
        ranked = sorted({"tp_plan", "tp_size", "distributed_config"} & self.arguments.keys())
        if ranked:
            raise ValueError(
                f"backend.arguments: {ranked[0]!r} needs several processes, and a worker is one; "
                "split the model with device_map, or take backend vllm with "
                "engine.tensor_parallel_size"
            )
        return self


class VllmBackend(Model):
    """A teacher in vLLM, in the worker's own process: gives the sampled token and top-k."""

    type: Literal["vllm"] = Field(description="kind of backend")
    engine: dict[str, JsonValue] = Field({}, description="more vLLM engine arguments")
    gathers_ids: bool = Field(
        False,
        description="the engine looks up any id (vLLM's V2 model runner): student_topk is given",
    )


class HttpBackend(Model):
    """A teacher that a vLLM server serves; ``teacher.model`` is its name there, and
    ``teacher.revision`` the declared version. Gives the sampled token and top-k."""

    type: Literal["http"] = Field(description="kind of backend")
    url: str = Field(description="root of the server, such as http://teacher:8000")
    tokenizer: str = Field(description="folder or hub id of the served model's tokenizer")
    budget_tokens: int = Field(
        ge=1, description="prompt and completion tokens that the run may ever send, retries too"
    )
    concurrency: int = Field(8, ge=1, description="requests under way at once")
    timeout_s: float = Field(600.0, gt=0, description="longest wait for one answer")
    retries: int = Field(5, ge=0, description="tries again after a fault that may pass")
    api_key_variable: str | None = Field(
        None, description="environment variable that holds the server's API key"
    )


Backend = TransformersBackend | VllmBackend | HttpBackend
BACKEND_COLUMNS: Mapping[str, frozenset[ScoreColumn]] = {
    "transformers": frozenset(get_args(ScoreColumn)),
    "vllm": frozenset({"sampled", "topk"}),
    "http": frozenset({"sampled", "topk"}),
}
"""Columns that each kind of backend can give."""


class TeacherPrompt(Model):
    """Another rendering of the task for the teacher, from the prompt's messages."""

    template: Literal["chat", "raw"] = Field(
        "chat", description="chat: the teacher's own chat template; raw: the text as it is"
    )
    system: str | None = Field(None, description="system message put before every chat")
    context: str | None = Field(
        None,
        description="text in place of the last message; {prompt} stands for that message, {answer} "
        "for the reference answer, which every prompt then needs",
    )

    @model_validator(mode="after")
    def _context_keeps_the_prompt(self) -> Self:
        if self.context is not None and "{prompt}" not in self.context:
            raise ValueError("teacher.prompt.context: say where the prompt goes, with {prompt}")
        return self

    @model_validator(mode="after")
    def _a_system_message_is_of_a_chat(self) -> Self:
        if self.system is not None and self.template == "raw":
            raise ValueError("teacher.prompt.system: a raw prompt has no system message")
        return self


STUDENT = "@student"
"""As a reference's model: the policy that sampled the round."""


class TeacherConfig(ModelRef):
    """A scoring model."""

    dtype: Dtype = Field("bfloat16", description="dtype that the teacher computes in")
    backend: Annotated[Backend, Field(discriminator="type")] = Field(
        TransformersBackend(), description="what runs the model"
    )
    prompt: TeacherPrompt | None = Field(
        None, description="how the teacher's prompt is made; none: it reads the student's tokens"
    )

    @model_validator(mode="after")
    def _a_url_has_a_scheme_and_nothing_secret(self) -> Self:
        if not isinstance(self.backend, HttpBackend):
            return self
        if not self.backend.url.startswith(("http://", "https://")):
            raise ValueError("teacher.backend.url: it begins with http:// or https://")
        try:
            parts = urlsplit(self.backend.url)
            sound = bool(parts.hostname) and parts.port != 0
        except ValueError:  # urlsplit's own texts do not say where
            sound = False
        if not sound:
            raise ValueError("teacher.backend.url: it has no host, or a port that cannot be one")
        if "@" in self.backend.url:
            raise ValueError(
                "teacher.backend.url: no credentials in it; name the variable that holds the key "
                "in api_key_variable"
            )
        return self

    @property
    def can_give(self) -> frozenset[ScoreColumn]:
        """Columns that the backend gives."""
        gathered: set[ScoreColumn] = set()
        if isinstance(self.backend, VllmBackend) and self.backend.gathers_ids:
            gathered.add("student_topk")
        return BACKEND_COLUMNS[self.backend.type] | gathered

    @model_validator(mode="after")
    def _a_served_model_has_a_version(self) -> Self:
        if isinstance(self.backend, HttpBackend) and self.revision is None:
            raise ValueError(
                "teacher.revision: a served model needs a declared version, since its weights "
                "cannot be seen"
            )
        return self
