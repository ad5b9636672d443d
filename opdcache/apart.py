"""Prompts that others are to be apart from: no copies of them, and none that means much the same.

Legend: N texts, M texts that they are held against, D width of an embedding.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .errors import ModelError, NotInstalled, PromptError
from .identity import digest
from .prompts import Prompt, load_prompts
from .run_prompts import asked_text
from .runfile import load_run
from .runfolder import RunFolder
from .schemas.config import RunConfig
from .schemas.prompts import JsonlSource, ParquetSource
from .schemas.rounds import RolloutRound
from .store.cache import Cache

PROMPT_COLUMNS = ("prompt_id", "messages", "task", "answer")
"""Of a rollout shard, that a prompt is made of."""
BLOCK = 1024
"""Texts whose embeddings, and whose cosines, are held at a time."""
_ROUNDING = 1e-6
"""What float32 makes of a cosine of 1."""

_TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}

Vectors = NDArray[np.float32]


def file_source(path: Path) -> JsonlSource | ParquetSource:
    """A file of prompts as a source: Parquet by its suffix, else JSON Lines."""
    if path.suffix == ".parquet":
        return ParquetSource(type="parquet", path=str(path))
    return JsonlSource(type="jsonl", path=str(path))


def prompts_of(named: Path) -> list[Prompt]:
    """Prompts of a file; of a run file, those of its source, or of the rollouts that it takes, and
    those of its evaluation's source.

    Raises:
        PromptError: they cannot be read, or are not recorded.
        ConfigError: it is no run file, for its suffix.
        InputsMissing: the rollouts that it takes are not there.
    """
    if named.suffix not in (".yaml", ".yml"):
        return load_prompts(file_source(named)).prompts
    config = load_run(named)
    taken = [] if config.rollouts is None else _taken(config, Path(config.rollouts.from_))
    sources = [] if config.rollouts is not None else [config.prompts.source]
    if config.evaluation is not None and config.evaluation.source is not None:
        sources.append(config.evaluation.source)
    return [*taken, *(prompt for source in sources for prompt in load_prompts(source).prompts)]


def _taken(config: RunConfig, other: Path) -> list[Prompt]:
    """The prompts of the rollouts that a run takes from another."""
    folder, cache = RunFolder(other, writes=False), Cache.there(config.cache)
    found = dict[str, Prompt]()
    for index in range(config.rounds):
        for shard in folder.need(RolloutRound, index).shards:
            table = cache.read_rollouts(cache.need_rollouts(shard), PROMPT_COLUMNS)
            for key, prompt in recorded_prompts(table):
                if prompt is None:
                    raise PromptError(
                        "its prompts' texts are not recorded, so nothing can be kept apart from "
                        "them",
                        where=f"rollout shard {shard.key[:12]} of {other}",
                        remedy="name the file that they came from",
                    )
                found.setdefault(key, prompt)
    return list(found.values())


def recorded_prompts(
    table: pa.Table, task: str | None = None
) -> Iterator[tuple[str, Prompt | None]]:
    """Key and prompt of every row; None where the chat is not recorded.

    The key is a digest of text, task and answer, whatever the id, so that rounds and runs agree.
    """
    columns = [name for name in PROMPT_COLUMNS if name in table.column_names]
    for number, row in enumerate(table.select(columns).to_pylist()):
        its_task, answer = str(task or row["task"]), row.get("answer")
        if row.get("messages") is None:
            token_ids = table.column("prompt_token_ids")[number].as_py()
            yield digest([its_task, token_ids, answer]), None
            continue
        chat = tuple((role, content) for role, content in json.loads(row["messages"]))
        content = digest([its_task, chat])
        prompt = Prompt(row["prompt_id"], chat, its_task, answer, content)
        yield digest([content, answer]), prompt


class Apart:
    """What prompts are to be apart from.

    Args:
        named: files of prompts, or run files.
        embedder: folder of a model whose embeddings tell which texts are near; None looks for
            copies alone.
        cosine: of two embeddings, from which their texts are near.

    Raises:
        PromptError, ConfigError: what is named cannot be read.
        ModelError, NotInstalled: no embeddings can be made.
    """

    def __init__(self, named: Sequence[Path], embedder: Path | None, cosine: float) -> None:
        listed = [(str(path), asked_text(p)) for path in named for p in prompts_of(path)]
        self._in = {digest(text): name for name, text in reversed(listed)}
        self._cosine = cosine
        self._embedder = None if embedder is None else Embedder(embedder)
        if self._embedder is not None:
            self._theirs = self._embedder.vectors(list(dict.fromkeys(text for _, text in listed)))

    @property
    def has_embedder(self) -> bool:
        """Whether ``are_near`` tells anything."""
        return self._embedder is not None

    def copied_from(self, text: str) -> str | None:
        """The first of what was named that has the text; None when none has."""
        return self._in.get(digest(text))

    def are_near(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text is near any of theirs, by its embedding."""
        if self._embedder is None:
            return [False] * len(texts)
        near = [
            are_near(
                self._embedder.vectors(texts[start : start + BLOCK]), self._theirs, self._cosine
            )
            for start in range(0, len(texts), BLOCK)
        ]
        return [bool(one) for block in near for one in block]


def are_near(ours_ND: Vectors, theirs_MD: Vectors, cosine: float) -> NDArray[np.bool_]:
    """Bool [N]: whether any of theirs is at that cosine or above; rows have length 1."""
    near_N = np.zeros(len(ours_ND), np.bool_)
    for start in range(0, len(theirs_MD), BLOCK):
        cosines = ours_ND @ theirs_MD[start : start + BLOCK].T
        near_N |= cosines.max(axis=1, initial=-1) >= cosine - _ROUNDING
    return near_N


class Embedder:
    """A model of the sentence-transformers format, or a plain causal LM with its last hidden states
    averaged.

    Raises:
        NotInstalled: sentence-transformers is not there.
        ModelError: it cannot load the folder.
    """

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        if not folder.is_dir():
            raise ModelError("no such model folder", where=folder, remedy="check the path")
        try:
            self._model = _loaded(folder)
        except ModuleNotFoundError as error:
            raise NotInstalled(
                f"{error.name} is not installed", remedy="pip install 'opdcache[embeddings]'"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ModelError(f"no embedding model: {reason}", where=folder) from error

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Float32 [N, D], of length 1; the library cuts texts at what its model takes."""
        made: Vectors = self._model.encode(
            list(texts), normalize_embeddings=True, show_progress_bar=False
        )
        return made


def _loaded(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if (folder / "modules.json").is_file():
        return SentenceTransformer(str(folder))
    # The library would put a chat template around the text, and take the last token alone.
    body = Transformer(str(folder), modality_config=_TEXT, module_output_name="token_embeddings")
    tokenizer = body.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension(), "mean")])
