"""What a run file means: its models found and fingerprinted, their token ids compared."""

import copy
import secrets
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from pydantic import JsonValue

from .errors import ModelError, PromptError, TokenizerMismatch
from .identity import (
    FileHashes,
    digest,
    model_config,
    model_fingerprint,
    model_vocab_size,
    tokenizer_files,
    vocabulary_difference,
    vocabulary_fingerprint,
)
from .prompts import Tokenizer
from .schemas.config import RunConfig
from .schemas.prompts import PromptsConfig
from .schemas.rounds import Resolved
from .schemas.teachers import (
    STUDENT,
    HttpBackend,
    ModelRef,
    TeacherConfig,
    TransformersBackend,
    VllmBackend,
)
from .vllm_engine import RUNTIME_ARGUMENTS

_PLACEMENT = frozenset({"attn_implementation", "device_map", "max_memory", "offload_folder"})
"""Arguments of transformers that cannot change distributions beyond rounding."""


def resolve(config: RunConfig, hashes: FileHashes, began: Resolved | None) -> Resolved:
    """What the run file means now.

    Args:
        hashes: of files, remembered.
        began: what it meant before; saves reading tokenizers whose files are the same.

    Raises:
        ModelError: a model is missing or incomplete.
        TokenizerMismatch: a teacher and the student do not share token ids.
        PromptError: there is no chat template where the prompts' is said to be.
    """
    student = model_folder(config.student)
    scoring = {
        "teacher": config.teacher,
        **{f"teachers.{task}": teacher for task, teacher in config.teachers.items()},
        **{f"references.{n}": m for n, m in config.references.items() if m.model != STUDENT},
    }
    homes = {name: tokenizer_folder(teacher) for name, teacher in scoring.items()}
    files = [file for path in (student, *homes.values()) for file in tokenizer_files(path)]
    tokenizers = digest(hashes.of(files))
    known = began is not None and began.tokenizers == tokenizers
    vocabulary = began.vocabulary if began and known else _shared_vocabulary(student, homes)
    prints = {name: teacher_fingerprint(teacher, hashes) for name, teacher in scoring.items()}
    if began is None and config.prompts.chat_template is not None:
        read_chat_template(Path(config.prompts.chat_template))  # refused before anything is made
    ours = model_vocab_size(model_config(student))
    sizes = {name: _vocab_size(teacher, homes[name]) for name, teacher in scoring.items()}
    return Resolved(
        run_id=began.run_id if began else secrets.token_hex(8),
        opdcache=version("opdcache"),
        config=config,
        student=model_fingerprint(student, hashes),
        teacher=prints["teacher"],
        teachers={task: prints[f"teachers.{task}"] for task in config.teachers},
        references={n: prints[f"references.{n}"] for n in config.references if _fixed(config, n)},
        vocabulary=vocabulary,
        tokenizers=tokenizers,
        chat_template=_template_print(config.prompts, hashes),
        vocab_size=ours,
        shared_ids={name: min(ours, size) for name, size in sizes.items()},
    )


def _fixed(config: RunConfig, reference: str) -> bool:
    return config.references[reference].model != STUDENT


def teacher_fingerprint(teacher: TeacherConfig, hashes: FileHashes) -> str:
    """Fingerprint of a scoring model; of a served one, what is declared of it.

    Raises:
        ModelError: the model is missing or incomplete.
    """
    if isinstance(teacher.backend, HttpBackend):
        return digest({"served": teacher.model, "version": teacher.revision})
    return model_fingerprint(model_folder(teacher), hashes)


def tokenizer_folder(teacher: TeacherConfig) -> Path:
    """Where a scoring model's tokenizer is.

    Raises:
        ModelError: neither a folder nor a model of the hub.
    """
    if isinstance(teacher.backend, HttpBackend):
        return model_folder(ModelRef(model=teacher.backend.tokenizer, revision=None))
    return model_folder(teacher)


def _vocab_size(teacher: TeacherConfig, tokenizer: Path) -> int:
    """Ids that the model can produce; of a served one, those that its tokenizer knows."""
    if isinstance(teacher.backend, HttpBackend):
        return max(load_tokenizer(tokenizer).get_vocab().values()) + 1
    return model_vocab_size(model_config(model_folder(teacher)))


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


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer beside a model, loaded once while its files are the same: it takes a second.

    Raises:
        ModelError: there is none.
    """
    state = ((file, file.stat()) for file in tokenizer_files(folder))
    return _loaded(folder, tuple((file, found.st_size, found.st_mtime_ns) for file, found in state))


@lru_cache(maxsize=4)
def _loaded(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "no tokenizer beside the model",
            where=folder,
            remedy="save it there with tokenizer.save_pretrained",
        ) from error
    return tokenizer


def prompt_tokenizer(student: Path, prompts: PromptsConfig) -> Tokenizer:
    """The tokenizer beside the student, with the chat template that its prompts are rendered by.

    Raises:
        ModelError: there is no tokenizer.
        PromptError: there is no chat template where the prompts' is said to be.
    """
    tokenizer = load_tokenizer(student)
    if prompts.chat_template is None:
        return tokenizer
    tokenizer = copy.copy(tokenizer)  # the loaded one is shared
    tokenizer.chat_template = read_chat_template(Path(prompts.chat_template))
    return tokenizer


def read_chat_template(place: Path) -> str:
    """The text of a Jinja file, or the chat template of a model folder's tokenizer.

    Raises:
        PromptError: there is none.
    """
    if place.is_dir():
        text = load_tokenizer(place).chat_template
    else:
        (file,) = _template_files(place)
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise PromptError("a chat template is UTF-8 text", where=place) from error
    if not text:
        raise PromptError(
            "there is no chat template",
            where=place,
            remedy="let prompts.chat_template name a Jinja file, or a model that chats",
        )
    return text


def _template_print(prompts: PromptsConfig, hashes: FileHashes) -> str | None:
    if prompts.chat_template is None:
        return None
    return digest(hashes.of(_template_files(Path(prompts.chat_template))))


def _template_files(place: Path) -> list[Path]:
    """What a chat template is read from: the file, or the tokenizer's files in the folder."""
    files = tokenizer_files(place) if place.is_dir() else [place] if place.is_file() else []
    if not files:
        raise PromptError(
            "neither a file nor a folder with a tokenizer",
            where=place,
            remedy="check prompts.chat_template, which is relative to the run file",
        )
    return files


def special_ids(folder: Path) -> tuple[int, ...]:
    """Ids that the tokenizer beside a model marks as special, EOS among them.

    Raises:
        ModelError: there is no tokenizer.
    """
    return tuple(sorted(load_tokenizer(folder).all_special_ids))


def model_folder(ref: ModelRef, only: list[str] | None = None) -> Path:
    """The model's folder; a hub id is downloaded, or found in the hub's cache.

    Args:
        only: patterns of the files that are needed; all by default.

    Raises:
        ModelError: neither a folder nor a model of the hub.
    """
    if Path(ref.model).is_absolute():
        return Path(ref.model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(ref.model, revision=ref.revision, allow_patterns=only))
    except (OSError, ValueError) as error:
        raise ModelError(
            "neither a model folder nor a model that the hub gives",
            where=ref.model,
            remedy="check the path, relative to the run file",
        ) from error


def _shared_vocabulary(student: Path, teachers: Mapping[str, Path]) -> str:
    """Fingerprint of the token ids that all models share.

    Raises:
        TokenizerMismatch: they do not.
    """
    ours = load_tokenizer(student).get_vocab()
    for name, folder in teachers.items():
        difference = vocabulary_difference(ours, load_tokenizer(folder).get_vocab())
        if difference is not None:
            raise TokenizerMismatch(
                f"{name} and student do not share token ids: {difference}",
                where=folder,
                remedy="choose a teacher with the student's tokenizer",
            )
    return vocabulary_fingerprint(ours)
