"""What a teacher reads in the place of the student's prompt.

Usually exactly the student's prompt tokens. A teacher may also see the same task in its own chat
template, behind a system prompt, or with privileged context such as the reference answer
(self-distillation); the completion's tokens stay the same. A rendering's key is the digest of the
token ids that it makes, so nothing that changes them goes unnoticed.
"""

import json
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import PromptError
from ..identity import digest
from ..prompts import Prompt, Tokenizer, render
from ..resolve import load_tokenizer, tokenizer_folder
from ..schemas.manifests import AS_SAMPLED
from ..schemas.rounds import RolloutShard
from ..schemas.teachers import TeacherConfig, TeacherPrompt
from ..store import rollouts as shards
from ..store.cache import Cache


class Rendering:
    """How a scoring model reads a shard's prompts.

    Attributes:
        COLUMNS: of a shard that a prompt is made of, beside its token ids.
    """

    COLUMNS = ("rollout_id", "messages", "answer", "task")

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config

    def key(self, cache: Cache, rollout: RolloutShard) -> str:
        """Identity of what the model reads in the place of a shard's prompts.

        Raises:
            PromptError: see ``prompts``.
        """
        if self._config.prompt is None:
            return AS_SAMPLED
        table = cache.read_rollouts(cache.need_rollouts(rollout), self.COLUMNS)
        return digest([ids.tolist() for ids in self.prompts(table)])

    def prompts(self, table: pa.Table) -> list[NDArray[np.int32]]:
        """Token ids of each row's prompt, int32.

        Raises:
            PromptError: a row has no messages, or no answer that the context asks for; or the
                chat template refuses the messages.
        """
        own = self._config.prompt
        if own is None:
            return shards.token_lists(table, "prompt_token_ids")
        rows = table.select([n for n in self.COLUMNS if n in table.column_names]).to_pylist()
        distinct: dict[tuple[str | None, str | None], dict[str, str | None]] = {}
        for row in rows:
            distinct.setdefault(_asked(row), row)
        made = render([_prompt(row, own) for row in distinct.values()], own, self._tokenizer)
        ids = [np.asarray(one.token_ids, np.int32) for one in made]
        rendered = dict(zip(distinct, ids, strict=True))
        return [rendered[_asked(row)] for row in rows]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(tokenizer_folder(self._config))


def _asked(row: dict[str, str | None]) -> tuple[str | None, str | None]:
    """What a row's prompt is made of: alike for a prompt's completions."""
    return row.get("messages"), row.get("answer")


def _prompt(row: dict[str, str | None], own: TeacherPrompt) -> Prompt:
    """A row's prompt as the teacher is to see it; its id is the row's."""
    place, answer = f"rollout {row['rollout_id']}", row.get("answer")
    if row.get("messages") is None:
        raise PromptError(
            "the rollout has no messages, so its prompt cannot be made anew for the teacher",
            where=place,
            remedy="remove teacher.prompt, so that the teacher reads the student's tokens",
        )
    messages = [(role, content) for role, content in json.loads(row["messages"] or "")]
    if own.context is not None:
        if answer is None and "{answer}" in own.context:
            raise PromptError(
                "teacher.prompt.context asks for the answer, and the prompt has none",
                where=place,
                remedy="give every prompt an answer, or leave {answer} out",
            )
        role, content = messages[-1]
        parts = {"{prompt}": content, "{answer}": answer or ""}
        messages[-1] = (role, _filled(own.context, parts))
    return Prompt(
        str(row["rollout_id"]), tuple(messages), str(row["task"]), answer, digest(messages)
    )


def _filled(text: str, parts: dict[str, str]) -> str:
    """The text with its marks replaced; what they are replaced by is left as it is."""
    for mark, value in parts.items():
        head, *rest = text.split(mark)
        if rest:
            others = {m: v for m, v in parts.items() if m != mark}
            return value.join(_filled(piece, others) for piece in (head, *rest))
    return text
