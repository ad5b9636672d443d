"""A teacher in transformers: every column, of whole distributions at completion positions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import Tensor

from ..errors import EngineError
from ..heads import split_head
from ..models import default_device, free_memory, is_out_of_memory, load_model
from ..store.scores import Draws, Scores, StudentTopK, TopK
from .forwards import Forwards
from .statistics import TeacherStats, teacher_statistics
from .teacher import Ask, Batch, Sequences


class TransformersScorer:
    """Scores completions with a causal LM.

    Args:
        folder: the model, in Hugging Face format.
        dtype: dtype that its body computes in; the head is computed in float32.
        batch_tokens: padded tokens of one forward at most (one sequence at least).
        arguments: more of ``from_pretrained``, such as ``device_map``.
        say: told when a batch does not fit into the memory.

    Raises:
        ModelError: the model cannot be loaded, or its head is not a plain linear map.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        batch_tokens: int,
        arguments: Mapping[str, JsonValue] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        model = load_model(folder, dtype, default_device(), arguments)
        body, self._head = split_head(model, folder)
        self._device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        self._say = say
        self._forwards = Forwards(body, self._device, batch_tokens)

    def score(self, sequences: Sequences, ask: Ask) -> Iterator[Batch]:
        """See ``Teacher``. Where memory runs out, what is left is scored in batches half as large.

        Raises:
            EngineError: memory runs out for a single sequence.
        """
        left = list(range(len(sequences.completions)))
        while left:
            done, fits = set[int](), True
            whole = len(left) == len(sequences.completions)
            part = sequences if whole else sequences.only(left)
            try:
                for batch in self._scored(part, ask if whole else _only(ask, sequences, left)):
                    done.update(batch.rows)
                    yield Batch([left[row] for row in batch.rows], batch.scores)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                fits = False  # the error holds tensors until the block is left
            left = [row for place, row in enumerate(left) if place not in done]
            if not fits:
                self._halve(int(sequences.lengths[left].max()))

    def _halve(self, longest: int) -> None:
        """Take smaller batches from now on.

        Raises:
            EngineError: one sequence was the batch.
        """
        size, self._forwards.batch_tokens = (
            self._forwards.batch_tokens,
            self._forwards.batch_tokens // 2,
        )
        if size <= longest:
            raise EngineError(
                f"out of memory with a single sequence of up to {longest} tokens",
                where=str(self._device),
                remedy="give the teacher more devices (teacher.backend), or a smaller dtype",
            )
        self._say(
            f"out of memory: score.batch_tokens {size} is too much here, {size // 2} from now on"
        )
        free_memory()

    @torch.no_grad()
    def _scored(self, sequences: Sequences, ask: Ask) -> Iterator[Batch]:
        sampled_T = torch.from_numpy(sequences.sampled_T)
        uniforms_TN = None if ask.uniforms_TN is None else torch.from_numpy(ask.uniforms_TN)
        sequences.need_ids_below(self._head.weight.shape[0])
        device = self.head_weight.device
        for rows, hidden_TD in self._forwards.each(sequences):
            at_T = sequences.places(rows)
            stats = teacher_statistics(
                hidden_TD.to(device),
                self.head_weight,
                sampled_T[at_T].to(device),
                torch.from_numpy(sequences.recorded_TS[at_T]).to(device, torch.int64),
                k=ask.k,
                mass=ask.mass,
                num_ids=ask.num_ids,
                uniforms_TN=None if uniforms_TN is None else uniforms_TN[at_T].to(device),
            )
            yield Batch(rows, _as_scores(stats, sequences.num_tokens[rows], ask))

    def details(self) -> dict[str, JsonValue]:
        """See ``Teacher``."""
        return {
            "backend": "transformers",
            "batch_tokens": self._forwards.batch_tokens,
            "device": str(self._device),
            "continues": self._forwards.continues,
        }

    def close(self) -> None:
        """See ``Teacher``."""
        del self._forwards, self._head

    @property
    def head_weight(self) -> Tensor:
        """The LM head, [V, D]."""
        return self._head.weight

    def hidden(self, sequences: Sequences, rows: Sequence[int]) -> Tensor:
        """Hidden states that predict the rows' completion tokens, one row after the other, [T, D],
        from one forward."""
        return self._forwards.alone(sequences, rows).to(self.head_weight.device)


def _only(ask: Ask, sequences: Sequences, rows: Sequence[int]) -> Ask:
    """What is asked of some of the sequences."""
    if ask.uniforms_TN is None:
        return ask
    return replace(ask, uniforms_TN=ask.uniforms_TN[sequences.places(rows)])


def _as_scores(stats: TeacherStats, num_tokens: NDArray[np.int64], ask: Ask) -> Scores:
    """The columns asked for, on the CPU."""
    topk = TopK(
        ids=stats.topk_ids_TK.cpu().numpy().astype(np.int32),
        logprobs=stats.topk_TK.cpu().numpy(),
        num_kept=stats.num_kept_T.cpu().numpy().astype(np.uint16),
        tail_logprobs=stats.tail_T.cpu().numpy(),
    )
    student = StudentTopK(stats.gathered_TS.cpu().numpy(), stats.gathered_tail_T.cpu().numpy())
    return Scores(
        token_offsets=np.concatenate([[0], np.cumsum(num_tokens)]),
        sampled_logprobs=stats.sampled_T.cpu().numpy() if "sampled" in ask.columns else None,
        entropy=stats.entropy_T.cpu().numpy() if "entropy" in ask.columns else None,
        topk=topk if "topk" in ask.columns else None,
        student_topk=student if "student_topk" in ask.columns else None,
        draws=Draws.of(stats.drawn_TN.cpu().numpy()) if "draws" in ask.columns else None,
    )
