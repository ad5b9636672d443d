"""Prompt sources, their rendering to token ids, and the schedule across rounds."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from .errors import PromptError
from .identity import digest
from .schemas.config import (
    JsonlSource,
    ParquetSource,
    PromptsConfig,
    PromptSource,
    ReasoningGymSource,
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a set.

    Attributes:
        prompt_id: the source's id, or the start of the content's digest.
        messages: a chat; a plain text prompt is one user message.
        task: name of the task; all of a shard's prompts share it.
        answer: reference answer, when the source has one.
        content: digest of what is asked, whatever the id.
    """

    prompt_id: str
    messages: tuple[tuple[str, str], ...]
    task: str
    answer: str | None
    content: str


@dataclass(frozen=True, slots=True)
class PromptSet:
    """A source's distinct prompts in its order, and counts of what was left out, by reason."""

    prompts: list[Prompt]
    dropped: dict[str, int]


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt as the student reads it."""

    prompt: Prompt
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to draw."""

    rendered: RenderedPrompt
    sample_index: int


class Look(Protocol):
    """How prompts become text: the student's way, or a teacher's own."""

    @property
    def template(self) -> Literal["chat", "raw"]: ...
    @property
    def system(self) -> str | None: ...


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: str | None
    eos_token_id: int | None

    def get_vocab(self) -> dict[str, int]: ...
    def encode(self, text: str) -> list[int]: ...
    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


def load_prompts(source: PromptSource) -> PromptSet:
    """The distinct prompts of a source; exact copies are dropped and counted.

    Raises:
        PromptError: nothing there, a malformed row, or one id for two prompts; names the place.
    """
    match source:
        case JsonlSource():
            listed = [_parse(row, place) for place, row in _jsonl(Path(source.path))]
        case ParquetSource():
            listed = [_parse(row, place) for place, row in _parquet(Path(source.path))]
        case ReasoningGymSource():
            listed = _reasoning_gym(source)
    where = getattr(source, "path", source.type)
    if not listed:
        raise PromptError("no prompts", where=where, remedy="give at least one row")
    distinct: dict[str, Prompt] = {}
    for prompt in listed:
        first = distinct.setdefault(prompt.prompt_id, prompt)
        if (first.content, first.answer) != (prompt.content, prompt.answer):
            raise PromptError(
                f"id {prompt.prompt_id!r} stands for two prompts, or for two answers",
                where=where,
                remedy="give rows ids of their own",
            )
    copies = len(listed) - len(distinct)
    return PromptSet(list(distinct.values()), {"copy of another prompt": copies} if copies else {})


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise PromptError(f"prompt file cannot be read: {reason}", where=path) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except ValueError as error:
            raise PromptError(
                f"not JSON: {error}", where=f"{path}:{number}", remedy="one JSON object a line"
            ) from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise PromptError(f"not a readable Parquet file: {error}", where=path) from error
    for number, row in enumerate(rows):
        yield f"{path} row {number}", row


def _parse(row: Any, place: str) -> Prompt:
    if not isinstance(row, dict):
        raise PromptError("a row is an object", where=place, got=type(row).__name__)
    text, messages = row.get("prompt"), row.get("messages")
    if (text is None) == (messages is None):
        raise PromptError("a row has either 'prompt' or 'messages'", where=place)
    if messages is None:
        messages = [{"role": "user", "content": text}]
    try:
        chat = tuple((m["role"], m["content"]) for m in messages)
    except (TypeError, KeyError, IndexError) as error:
        raise PromptError("messages are objects with role and content", where=place) from error
    if not chat or not all(isinstance(part, str) for message in chat for part in message):
        raise PromptError("role and content are text, and there is a message", where=place)
    answer = row.get("answer")
    try:
        return _prompt(
            chat,
            task=str(row.get("task") or "default"),
            answer=None if answer is None else str(answer),
            prompt_id=row.get("id"),
        )
    except UnicodeEncodeError as error:
        raise PromptError("the text is not Unicode: half a character", where=place) from error


def _prompt(
    chat: tuple[tuple[str, str], ...], *, task: str, answer: str | None, prompt_id: Any = None
) -> Prompt:
    content = digest([task, chat])
    name = content[:16] if prompt_id is None else str(prompt_id)
    return Prompt(name, chat, task, answer, content)


def _reasoning_gym(source: ReasoningGymSource) -> list[Prompt]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise PromptError(
            "reasoning-gym is not installed", remedy="pip install reasoning-gym"
        ) from error
    try:
        entries = reasoning_gym.create_dataset(
            source.dataset, size=source.size, seed=source.seed, **source.config
        )
        return [
            _prompt(
                (("user", entry["question"]),),
                task=source.dataset,
                answer=None if entry["answer"] is None else str(entry["answer"]),
            )
            for entry in entries
        ]
    except (ValueError, TypeError, AssertionError) as error:
        raise PromptError(f"reasoning-gym: {error}", where=source.dataset) from error


def render(prompts: Iterable[Prompt], config: Look, tokenizer: Tokenizer) -> list[RenderedPrompt]:
    """Prompts as token ids, by the tokenizer's chat template or as raw text.

    Raises:
        PromptError: the tokenizer has no chat template, or cannot take the messages.
    """
    if config.template == "chat" and not tokenizer.chat_template:
        raise PromptError(
            "the tokenizer has no chat template", remedy="set the prompts' template: raw"
        )
    rendered = [RenderedPrompt(p, _token_ids(p, config, tokenizer)) for p in prompts]
    empty = next((r.prompt.prompt_id for r in rendered if not r.token_ids), None)
    if empty is not None:
        raise PromptError("a prompt has no tokens", where=f"prompt {empty}", remedy="remove it")
    return rendered


def _token_ids(prompt: Prompt, config: Look, tokenizer: Tokenizer) -> tuple[int, ...]:
    chat = [{"role": role, "content": content} for role, content in prompt.messages]
    if config.template == "raw":
        return tuple(tokenizer.encode("".join(message["content"] for message in chat)))
    if config.system is not None:
        chat.insert(0, {"role": "system", "content": config.system})
    try:
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # templates raise what they like
        raise PromptError(
            f"the chat template refuses it: {error}", where=f"prompt {prompt.prompt_id}"
        ) from error
    return tuple(ids)


def scheduled(
    prompts: Sequence[Prompt], config: PromptsConfig, seed: int, round_index: int
) -> list[Prompt]:
    """Prompts of a round: the next ``per_round`` of an endless walk through the set.

    A shuffled walk takes a new order each time through; both are decided by the seed alone, so any
    round's prompts can be named without running the ones before.
    """
    start = round_index * config.per_round
    first_epoch, offset = divmod(start, len(prompts))
    walk = (p for epoch in _epochs(first_epoch) for p in _order(prompts, config, seed, epoch))
    return list(islice(walk, offset, offset + config.per_round))


def _epochs(first: int) -> Iterator[int]:
    while True:
        yield first
        first += 1


def _order(prompts: Sequence[Prompt], config: PromptsConfig, seed: int, epoch: int) -> list[Prompt]:
    if config.order == "listed":
        return list(prompts)
    salt = hashlib.sha256(f"prompt order {seed} {epoch}".encode()).digest()
    return random.Random(salt).sample(list(prompts), len(prompts))


def requests(prompts: Sequence[RenderedPrompt], samples_per_prompt: int) -> list[Request]:
    """One request a completion, prompt by prompt.

    A prompt that stands twice in a round gets sample indexes of its own, hence other seeds.
    """
    taken: Counter[str] = Counter()
    made = []
    for rendered in prompts:
        first = taken[rendered.prompt.prompt_id]
        taken[rendered.prompt.prompt_id] += samples_per_prompt
        made += [Request(rendered, first + i) for i in range(samples_per_prompt)]
    return made
