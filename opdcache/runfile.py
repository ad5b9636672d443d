"""Loads a run file: YAML to a checked ``RunConfig`` with absolute paths, or one clear error."""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from .deepspeed_config import deepspeed_config
from .errors import ConfigError
from .schemas.base import Model
from .schemas.config import RunConfig
from .schemas.plan import Rates
from .schemas.prompts import (
    HuggingFaceSource,
    JsonlSource,
    ParquetSource,
    PromptsConfig,
    PromptSource,
    ReasoningGymSource,
)
from .schemas.teachers import STUDENT, HttpBackend, TeacherConfig
from .schemas.training import TrainConfig

AnyModel = TypeVar("AnyModel", bound=Model)


def load_run(path: Path) -> RunConfig:
    """The run file's configuration, its relative paths resolved against the file's folder, and
    DeepSpeed's in its place.

    Raises:
        ConfigError: the file is missing, not YAML, or not a valid run; names the key at fault.
    """
    remedy = "give the path of a run.yaml ('opdcache demo' writes one)"
    return _absolute(_load(path, RunConfig, "run file", remedy), path)


def load_rates(path: Path) -> Rates:
    """A file of rates, completion tokens a second of a stage.

    Raises:
        ConfigError: the file is missing, not YAML, or has other keys or values that are no rate.
    """
    return _load(path, Rates, "rates file", "a line is such as 'score: 850'")


def _load(path: Path, kind: type[AnyModel], what: str, remedy: str) -> AnyModel:
    """A YAML file that says what a model does."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{what} cannot be read: {error.strerror}", where=path, remedy=remedy
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError("not UTF-8 text", where=path) from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f":{place.line + 1}" if place else ""
        raise ConfigError(
            f"not YAML: {getattr(error, 'problem', error)}", where=f"{path}{line}"
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"a {what} is a mapping", where=path, got=type(raw).__name__)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, path, kind) from error


def _explain(error: ValidationError, path: Path, kind: type[Model]) -> ConfigError:
    """The first fault as one line; a misspelt key, with its near match, before what it left out."""
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    first, rest = faults[0], len(faults) - 1
    loc = [str(part) for part in first["loc"]]
    more = f" ({rest} more)" if rest else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(kind, loc[:-1])
        near = difflib.get_close_matches(loc[-1], known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return ConfigError(f"unknown key {'.'.join(loc)!r}{more}", where=path, remedy=remedy)
    message = first["msg"].removeprefix("Value error, ")
    place = f"{'.'.join(loc)}: " if loc else ""
    got = None
    if first["type"] not in {"value_error", "missing"} and not isinstance(first["input"], dict):
        got = repr(first["input"])
    return ConfigError(f"{place}{message}{more}", where=path, got=got)


def _known_keys(kind: type[Model], loc: Iterable[str]) -> list[str]:
    """Field names at a place of the file; unions are searched by their discriminator."""
    models: list[type[BaseModel]] = [kind]
    place = iter(loc)
    for part in place:
        named = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        if named:
            models = [m for annotation in named for m in _models(annotation)]
            if dict in map(get_origin, named):
                next(place, None)  # a name that is the user's own
        else:
            models = [m for m in models if _tag(m) == part] or models
    fields = (item for model in models for item in model.model_fields.items())
    return sorted({field.alias or name for name, field in fields})


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("type")
    return get_args(field.annotation)[0] if field is not None else None


def local_model(value: str, base: Path) -> str:
    """A folder below ``base`` if there is one, or if it reads like a path; else a hub id."""
    folder = base / Path(value).expanduser()
    is_path = value.startswith((".", "/", "~")) or value.count("/") != 1
    return str(folder) if is_path or folder.parent.exists() else value


def _absolute(config: RunConfig, path: Path) -> RunConfig:
    """Paths of a run file are relative to the file, wherever the command is run."""
    base = path.resolve().parent

    def local(value: str) -> str:
        return value if "://" in value else str(base / Path(value).expanduser())

    def model(value: str) -> str:
        return local_model(value, base)

    def teacher(value: TeacherConfig) -> TeacherConfig:
        if isinstance(value.backend, HttpBackend):
            home = {"tokenizer": model(value.backend.tokenizer)}
            return value.model_copy(update={"backend": value.backend.model_copy(update=home)})
        if value.model == STUDENT:
            return value
        return value.model_copy(update={"model": model(value.model)})

    def source(value: PromptSource) -> PromptSource:
        match value:
            case JsonlSource() | ParquetSource():
                return value.model_copy(update={"path": local(value.path)})
            case HuggingFaceSource():
                return value.model_copy(update={"dataset": model(value.dataset)})
            case ReasoningGymSource():
                return value

    def prompts(value: PromptsConfig) -> PromptsConfig:
        update: dict[str, Any] = {"source": source(value.source)}
        if value.chat_template is not None:
            update["chat_template"] = local(value.chat_template)
        return value.model_copy(update=update)

    update: dict[str, Any] = {
        "cache": local(config.cache),
        "output": local(config.output or path.stem),
        "student": config.student.model_copy(update={"model": model(config.student.model)}),
        "teacher": teacher(config.teacher),
        "teachers": {task: teacher(scorer) for task, scorer in config.teachers.items()},
        "references": {name: teacher(scorer) for name, scorer in config.references.items()},
        "prompts": prompts(config.prompts),
        "train": _with_deepspeed(config.train, path),
    }
    if config.launch.templates is not None:
        theirs = {"templates": local(config.launch.templates)}
        update["launch"] = config.launch.model_copy(update=theirs)
    if config.rollouts is not None:
        taken = {"from_": local(config.rollouts.from_)}
        update["rollouts"] = config.rollouts.model_copy(update=taken)
    if config.evaluation is not None and config.evaluation.source is not None:
        held_out = {"source": source(config.evaluation.source)}
        update["evaluation"] = config.evaluation.model_copy(update=held_out)
    return config.model_copy(update=update)


def _with_deepspeed(train: TrainConfig, path: Path) -> TrainConfig:
    """``train.deepspeed`` read, where it is a file, and held against what the run file decides."""
    given, where = train.deepspeed, path
    if isinstance(given, str):
        where = path.resolve().parent / Path(given).expanduser()
        try:
            given = json.loads(where.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"train.deepspeed: cannot be read: {error.strerror}", where=where
            ) from error
        except ValueError as error:
            raise ConfigError(f"train.deepspeed: not JSON: {error}", where=where) from error
        if not isinstance(given, dict):
            raise ConfigError("train.deepspeed: not a JSON object", where=where)
    train = train.model_copy(update={"deepspeed": given})
    deepspeed_config(train, where)
    return train
