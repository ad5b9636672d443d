"""Prompt sources, their rendering to token ids, and the schedule across rounds."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, islice
from typing import Any, Literal, Protocol

from .errors import PromptError
from .identity import digest
from .prompt_rows import rows
from .schemas.prompts import HuggingFaceSource, PromptsConfig, PromptSource, ReasoningGymSource


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
    all_special_ids: list[int]

    def get_vocab(self) -> dict[str, int]: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...
    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


def load_prompts(source: PromptSource) -> PromptSet:
    """The distinct prompts of a source; exact copies are dropped and counted.

    Raises:
        PromptError: nothing there, a malformed row, or one id for two prompts; names the place.
        NotInstalled: the source's library is not there.
    """
    where: str = source.type
    if isinstance(source, ReasoningGymSource):
        listed = _reasoning_gym(source)
    else:
        listed = [_parse(row, place, source.task) for place, row in rows(source)]
        where = source.dataset if isinstance(source, HuggingFaceSource) else source.path
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
    kept = {(prompt.content, prompt.answer): prompt for prompt in reversed(distinct.values())}
    prompts = [
        prompt for prompt in distinct.values() if kept[prompt.content, prompt.answer] is prompt
    ]
    copies = len(listed) - len(prompts)
    return PromptSet(prompts, {"copy of another prompt": copies} if copies else {})


def _parse(row: dict[str, Any], place: str, task: str | None) -> Prompt:
    text, messages = row.get("prompt"), row.get("messages")
    if (text is None) == (messages is None):
        raise PromptError("a row has either 'prompt' or 'messages'", where=place)
    if messages is None:
        messages = [{"role": "user", "content": text}]
    chat, answer = parse_chat(messages, place), row.get("answer")
    try:
        return _prompt(
            chat,
            task=str(row.get("task") or task or "default"),
            answer=None if answer is None else str(answer),
            prompt_id=row.get("id"),
        )
    except UnicodeEncodeError as error:
        raise PromptError("the text is not Unicode: half a character", where=place) from error


def parse_chat(messages: Any, place: str) -> tuple[tuple[str, str], ...]:
    """A chat as (role, content) pairs.

    Raises:
        PromptError: it is not a list of objects with both and nothing else, or an empty one; names
            the place.
    """
    try:
        chat = tuple((m["role"], m["content"]) for m in messages)
    except (TypeError, KeyError, IndexError) as error:
        raise PromptError("messages are objects with role and content", where=place) from error
    more = sorted(
        {n for m in messages for n, v in m.items() if v is not None} - {"role", "content"}
    )
    if more:
        raise PromptError(
            f"a message has {more[0]!r}, and only role and content are kept",
            where=place,
            remedy="write it into the content, as the chat template would, or leave it out",
        )
    if not chat or not all(isinstance(part, str) for message in chat for part in message):
        raise PromptError("role and content are text, and there is a message", where=place)
    return chat


def _prompt(
    chat: tuple[tuple[str, str], ...], *, task: str, answer: str | None, prompt_id: Any = None
) -> Prompt:
    content = digest([task, chat])
    name = content[:16] if prompt_id is None else str(prompt_id)
    return Prompt(name, chat, task, answer, content)


def gym_dataset(source: ReasoningGymSource) -> Any:
    """The source's dataset: reasoning-gym's own object, which makes its entries again and alike.

    Raises:
        PromptError: reasoning-gym is not installed, or refuses the arguments.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise PromptError(
            "reasoning-gym is not installed", remedy="pip install reasoning-gym"
        ) from error
    with _said_of(source):
        return reasoning_gym.create_dataset(
            source.dataset, size=source.size, seed=source.seed, **source.config
        )


def gym_prompt(source: ReasoningGymSource, entry: dict[str, Any]) -> Prompt:
    """The prompt that an entry of a dataset is."""
    return _prompt(
        (("user", entry["question"]),),
        task=source.dataset,
        answer=None if entry["answer"] is None else str(entry["answer"]),
    )


def _reasoning_gym(source: ReasoningGymSource) -> list[Prompt]:
    with _said_of(source):
        return [gym_prompt(source, entry) for entry in gym_dataset(source)]


@contextmanager
def _said_of(source: ReasoningGymSource) -> Iterator[None]:
    """What reasoning-gym raises of arguments, as an error of ours."""
    try:
        yield
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

    With ``shares``, each task has a walk of its own, and its part of ``per_round``. A shuffled walk
    takes a new order each time through; all are decided by the seed alone, so any round's prompts
    can be named without running the ones before.

    Raises:
        PromptError: a task with a share has no prompts, or its share is too small for any.
    """
    return [
        prompt
        for walk in _walks(prompts, config)
        for prompt in walk.of_round(config, seed, round_index)
    ]


def check_schedule(prompts: Sequence[Prompt], config: PromptsConfig, num_rounds: int) -> None:
    """Refuse a run whose rounds walk through the prompts more often than ``max_epochs``.

    Raises:
        PromptError: they do; or what ``scheduled`` raises.
    """
    if config.max_epochs is None:
        return
    for walk in _walks(prompts, config):
        asked, most = num_rounds * walk.per_round, config.max_epochs * len(walk.prompts)
        if asked > most:
            raise PromptError(
                f"{num_rounds} rounds walk through {walk.what} more than max_epochs times",
                where="prompts.max_epochs",
                expected=f"{most} prompts at most",
                got=asked,
                remedy="lower rounds or per_round, raise max_epochs, or give more prompts",
            )


@dataclass(frozen=True, slots=True)
class _Walk:
    """An endless walk through the set, or through one task of it."""

    prompts: Sequence[Prompt]
    per_round: int
    task: str | None = None

    @property
    def what(self) -> str:
        return "the set" if self.task is None else f"task {self.task!r}"

    def of_round(self, config: PromptsConfig, seed: int, round_index: int) -> list[Prompt]:
        first_epoch, offset = divmod(round_index * self.per_round, len(self.prompts))
        walk = (p for epoch in count(first_epoch) for p in self._order(config, seed, epoch))
        return list(islice(walk, offset, offset + self.per_round))

    def _order(self, config: PromptsConfig, seed: int, epoch: int) -> list[Prompt]:
        if config.order == "listed":
            return list(self.prompts)
        words = ["prompt order", seed, epoch, *([] if self.task is None else [self.task])]
        salt = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
        return random.Random(salt).sample(list(self.prompts), len(self.prompts))


def _walks(prompts: Sequence[Prompt], config: PromptsConfig) -> list[_Walk]:
    if not config.shares:
        return [_Walk(prompts, config.per_round)]
    walks = [
        _Walk([p for p in prompts if p.task == task], per_round, task)
        for task, per_round in apportioned(config.per_round, config.shares).items()
    ]
    for walk in walks:
        if not walk.prompts:
            raise PromptError(
                f"no prompt of task {walk.task!r} is left to train on",
                where="prompts.shares",
                remedy="take the task out, or give more prompts",
            )
        if not walk.per_round:
            raise PromptError(
                f"the share of task {walk.task!r} is no prompt a round",
                where="prompts.shares",
                remedy="raise it, or prompts.per_round, or take the task out",
            )
    return walks


def apportioned(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """A total in whole parts, in proportion to weights, by the largest remainder.

    Parts come by name, and the first name has the seat where remainders are equal: the order in
    which weights are written means nothing.
    """
    exact = {name: Fraction(str(weight)) for name, weight in sorted(weights.items())}
    whole = sum(exact.values())
    quotas = {name: total * weight / whole for name, weight in exact.items()}
    parts = {name: int(quota) for name, quota in quotas.items()}
    by_remainder = sorted(parts, key=lambda name: parts[name] - quotas[name])
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


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
