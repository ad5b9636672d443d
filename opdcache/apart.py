"""Prompts that others are to be apart from: no copies of them, and none that means much the same.

Legend: N texts, M texts that they are held against, D width of an embedding.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ModelError, NotInstalled
from .identity import digest
from .prompts import Prompt, load_prompts
from .run_prompts import asked_text
from .runfile import load_run
from .schemas.prompts import JsonlSource, ParquetSource

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
    """Prompts of a file; of a run file, those of its source and of its evaluation's.

    Raises:
        PromptError: they cannot be read.
        ConfigError: it is no run file, for its suffix.
    """
    if named.suffix not in (".yaml", ".yml"):
        return load_prompts(file_source(named)).prompts
    config = load_run(named)
    sources = [config.prompts.source]
    if config.evaluation is not None and config.evaluation.source is not None:
        sources.append(config.evaluation.source)
    return [prompt for source in sources for prompt in load_prompts(source).prompts]


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
