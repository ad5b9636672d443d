"""Teachers' completions of the held-out prompts: what students are compared with.

They are rollout shards like any other, drawn with the students' sampling and seeds. Each task's
teacher answers its prompts, in bare form: a teacher with a rendering of its own reads its own
template and system message, but never its ``context``, which may give the answer away.
"""

import time
from dataclasses import dataclass, field
from itertools import groupby

from .. import documents
from ..errors import ConfigError
from ..identity import digest, model_config, model_vocab_size
from ..prompts import Request, Tokenizer, render
from ..resolve import load_tokenizer, model_arguments, model_folder, prompt_tokenizer
from ..run_prompts import RunPrompts
from ..runfolder import RunContext
from ..schemas.manifests import RolloutManifest
from ..schemas.rounds import TeacherHeldOut
from ..schemas.teachers import TeacherConfig, VllmBackend
from ..store.cache import as_listed
from ..store.upkeep import quarantining
from ..vllm_engine import RUNTIME_ARGUMENTS
from .generator import generate
from .tasks import EVALUATION_ROUND, Policy, RolloutTask, requests_of, tasks_of

FILE = "held_out.json"
_STUDENT_S = "rollout.engine"
_OF_THE_MACHINE = RUNTIME_ARGUMENTS | {"max_model_len"}


@dataclass(frozen=True, slots=True)
class _Part:
    """What one policy samples; several tasks may have the same teacher."""

    policy: Policy
    place: str
    tasks: list[RolloutTask] = field(default_factory=list)


def run(context: RunContext) -> TeacherHeldOut:
    """The teachers' completions of the held-out prompts, made where they are missing.

    Raises:
        ConfigError: vLLM would load another model than the teacher that scores.
        PromptError: a prompt cannot be rendered for a teacher, or leaves no room for an answer.
        EngineError: vLLM does not start.
        ShardsFailed: a shard failed again and again.
    """
    path = context.folder.teacher_path / FILE
    before = documents.read(TeacherHeldOut, path)
    if before is not None and context.folder.is_sound(before, context.cache):
        return before
    started = time.monotonic()
    with quarantining(context.cache):
        parts = plan(context)
        tasks = [task for part in parts for task in part.tasks]
        context.cache.pin(context.resolved.run_id, "rollouts", [task.key for task in tasks])
        found: dict[str, RolloutManifest] = {}
        for part in parts:
            found |= _made(context, part)
    made = TeacherHeldOut(
        teachers=tuple(context.resolved.teacher_of(task.task) for task in tasks),
        shards=tuple(
            as_listed(found[t.key], cached=_is_anothers(context, found[t.key])) for t in tasks
        ),
        elapsed_s=round(time.monotonic() - started, 3),
    )
    documents.create(path, made, anew=before is not None)
    return documents.read(TeacherHeldOut, path) or made


def plan(context: RunContext) -> list[_Part]:
    """The shard tasks of every teacher.

    Raises:
        ConfigError: vLLM would load another model than the teacher that scores.
        PromptError: a prompt cannot be rendered.
    """
    config, evaluation = context.config, context.config.evaluation
    assert evaluation is not None
    ours = prompt_tokenizer(model_folder(config.student), config.prompts)
    held_out = RunPrompts(config).held_out
    asked, _ = requests_of(held_out, evaluation.samples_per_prompt, config.prompts, ours)
    parts: dict[str, _Part] = {}
    for task, group in groupby(sorted(asked, key=_task_of), _task_of):
        teacher = config.teacher_of(task)
        theirs = load_tokenizer(model_folder(teacher))
        policy, place = _policy(context, task, theirs)
        of = policy.fingerprint, policy.eos_token_id, policy.dtype, policy.engine
        part = parts.setdefault(digest([str(policy.folder), *of]), _Part(policy, place))
        read = _as_read(list(group), teacher, theirs)
        part.tasks.extend(tasks_of(context, policy, read, evaluation.sampling, EVALUATION_ROUND))
    return list(parts.values())


def _task_of(request: Request) -> str:
    return request.rendered.prompt.task


def _policy(context: RunContext, task: str, tokenizer: Tokenizer) -> tuple[Policy, str]:
    """A task's teacher in vLLM, and where in the run file its engine's arguments are.

    It computes in the teacher's dtype. The arguments are its own where vLLM scores with it, else
    those of the student's that say what fits the machine: any other may make another model of it
    than the one that scores.
    """
    config, teacher = context.config, context.config.teacher_of(task)
    own, place = config.place_of(task), _STUDENT_S
    engine = {k: v for k, v in config.rollout.engine.items() if k in _OF_THE_MACHINE}
    if isinstance(teacher.backend, VllmBackend):
        engine, place = teacher.backend.engine, f"{own}.backend.engine"
    elif changed := model_arguments(teacher):
        raise ConfigError(
            f"{own}.backend.arguments: {min(changed)!r} may change the teacher, and vLLM samples "
            "its answers without it",
            remedy="set evaluation.teacher to false, or take backend vllm",
        )
    folder = model_folder(teacher)
    policy = Policy(
        folder=folder,
        fingerprint=context.resolved.teacher_of(task),
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=model_vocab_size(model_config(folder)),
        dtype=teacher.dtype,
        engine=engine,
        topk=0,
    )
    return policy, place


def _as_read(asked: list[Request], teacher: TeacherConfig, tokenizer: Tokenizer) -> list[Request]:
    """The same requests, as the teacher reads their prompts."""
    if teacher.prompt is None:
        return asked
    rendered = render([r.rendered.prompt for r in asked], teacher.prompt, tokenizer)
    return [Request(own, r.sample_index) for own, r in zip(rendered, asked, strict=True)]


def _made(context: RunContext, part: _Part) -> dict[str, RolloutManifest]:
    """A part's shards by key.

    Raises:
        ShardsFailed: one failed again and again.
    """
    tasks = {task.key: task for task in part.tasks}
    title = f"teacher {part.policy.folder.name} held out"
    left_out = sorted(context.config.rollout.engine.keys() - part.policy.engine)
    if left_out and part.place == _STUDENT_S:
        context.progress.say(f"{title}: without {_STUDENT_S}'s {', '.join(left_out)}")
    found, failed = generate(context, part.policy, tasks, title, part.place)
    # All are compared on the same held-out prompts: none of those may be left out.
    context.folder.failures.refuse(failed, 0, len(tasks), title)
    return found


def _is_anothers(context: RunContext, manifest: RolloutManifest) -> bool:
    return manifest.provenance.run_id != context.resolved.run_id
