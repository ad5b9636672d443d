"""Cached samples as torch datasets: a dictionary of tensors a completion, and batches of them.

They go into any ``DataLoader`` and into trainers that take one; ``docs/data.md`` has a plain loop
and Hugging Face's ``Trainer``.

Legend: P prompt tokens, T completion tokens, K teacher entries, B sequences, L padded length.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .data import Sample, Samples
from .errors import InputsMissing

Tensors = dict[str, Tensor]


class TorchSamples(Dataset[Tensors]):
    """Map-style: sample by index, in any order; ``as_tensors`` of each."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Tensors:
        return as_tensors(self._samples[index])


class StreamedSamples(IterableDataset[Tensors]):
    """Iterable: every shard is read once an epoch, in a seeded order, its samples shuffled within.

    Shards are dealt out to ranks, and then to a ``DataLoader``'s workers; no two read the same.

    Args:
        seed: of the order; with the epoch it decides everything.
        rank, world_size: which part of the shards to read.
    """

    def __init__(
        self, samples: Samples, *, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self._samples, self._seed = samples, seed
        self._rank, self._world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take another order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensors]:
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        rng = np.random.default_rng([self._seed, self.epoch])
        order = rng.permutation(self._samples.num_shards)
        mine = order[self._rank * count + index :: self._world_size * count]
        for number, shard in zip(mine, self._samples.shards(map(int, mine)), strict=True):
            held = list(shard.samples())
            within = np.random.default_rng([self._seed, self.epoch, int(number)])
            for row in within.permutation(len(held)):
                yield as_tensors(held[row])


def as_tensors(sample: Sample) -> Tensors:
    """A sample's tensors; absent columns are absent.

    Returns:
        ``input_ids`` int64 [P + T]; ``predicts`` int64 [T], the positions whose logits predict the
        completion tokens; ``sampled_ids`` int64 [T]; ``loss_mask`` bool [T], the tokens that a loss
        may look at; ``sampling_logprobs`` [T]; of the teacher
        ``teacher_sampled_logprobs`` [T], ``teacher_entropy`` [T], ``topk_ids`` int64 [T, K],
        ``topk_logprobs`` [T, K], ``topk_kept`` bool [T, K], ``tail_logprobs`` [T], ``draw_ids`` and
        ``draw_counts`` int64 [T, D]. float32, nats.
    """
    prompt, completion = sample.prompt_token_ids, sample.completion_token_ids
    scores, topk = sample.scores, sample.scores.topk
    arrays: dict[str, NDArray[Any] | None] = {
        "input_ids": np.concatenate([prompt, completion]).astype(np.int64),
        "predicts": len(prompt) - 1 + np.arange(len(completion)),
        "sampled_ids": completion.astype(np.int64),
        "loss_mask": sample.loss_mask,
        "sampling_logprobs": sample.sampling_logprobs,
        "teacher_sampled_logprobs": scores.sampled_logprobs,
        "teacher_entropy": scores.entropy,
    }
    if topk is not None:
        arrays |= {
            "topk_ids": topk.ids.astype(np.int64),
            "topk_logprobs": topk.logprobs,
            "topk_kept": topk.kept,
            "tail_logprobs": topk.tail_logprobs,
        }
    if scores.draws is not None:
        arrays["draw_ids"] = scores.draws.ids.astype(np.int64)
        arrays["draw_counts"] = scores.draws.counts.astype(np.int64)
    return {
        name: torch.from_numpy(np.array(values))  # of its own: shards are shared, and read-only
        for name, values in arrays.items()
        if values is not None
    }


def collate(batch: Sequence[Tensors]) -> Tensors:
    """A batch: sequences padded on the right, everything of completion tokens on one token axis.

    Returns:
        ``input_ids`` and ``attention_mask`` int64 [B, L]; ``rows`` and ``columns`` int64 [T]:
        ``logits[rows, columns]`` predict the T completion tokens of the batch; the other tensors
        of ``as_tensors``, joined.

    Raises:
        InputsMissing: the samples do not have the same columns.
    """
    names = set(batch[0])
    differing = {name for tensors in batch for name in set(tensors) ^ names}
    if differing:
        raise InputsMissing(
            "samples with different score columns are in one batch",
            got=f"{', '.join(sorted(differing))} in some alone",
            remedy="open the cache with the columns that all of them have",
        )
    ids = [tensors["input_ids"] for tensors in batch]
    rows = [torch.full_like(tensors["predicts"], i) for i, tensors in enumerate(batch)]
    joined = {
        name: torch.cat(_alike([tensors[name] for tensors in batch]))
        for name in sorted(names - {"input_ids", "predicts"})
    }
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "rows": torch.cat(rows),
        "columns": torch.cat([tensors["predicts"] for tensors in batch]),
        **joined,
    }


def _alike(entries: Sequence[Tensor]) -> list[Tensor]:
    """Entries of equal width: sets of different k may stand in one batch; more are not kept."""
    if entries[0].dim() == 1:
        return list(entries)
    width = max(e.shape[1] for e in entries)
    return [torch.nn.functional.pad(e, (0, width - e.shape[1])) for e in entries]
