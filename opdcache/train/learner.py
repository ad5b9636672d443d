"""The one door to DeepSpeed: the student, its optimizer, its checkpoints, its export.

Legend: B sequences, L padded length, T completion tokens, K support.
"""

import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..deepspeed_config import deepspeed_config
from ..errors import ConfigError, ModelError
from ..heads import StudentView, split_head, support_logits, support_loss, support_view
from ..identity import tokenizer_files
from ..models import default_device, load_model
from ..schemas.training import OptimizerConfig, TrainConfig
from .branches import branch_mask, refuse_leaks
from .drafts import space, whole
from .lora import add_adapters, save_merged
from .objective import Objective
from .saved import Position, Saved, make_universal


class SupportHead(nn.Module):
    """The LM head as a module of its own, so that ZeRO-3 gathers its weight around the call."""

    def __init__(self, weight: Tensor, chunk_tokens: int) -> None:
        super().__init__()
        self.weight = weight
        self._chunk_tokens = chunk_tokens

    def forward(self, hidden_TD: Tensor, objective: Objective) -> Tensor:
        """The objective, a scalar; the hidden states predict its batch's tokens."""
        ids_TK, chunk = objective.ids_TK, self._chunk_tokens
        if objective.is_local:
            few = objective.measured
            objective.measure(self._seen(hidden_TD[few], ids_TK[few], objective))
            logits_TK = support_logits(hidden_TD, self.weight, ids_TK, chunk_tokens=chunk)
            return objective.of_logits(logits_TK)
        if objective.selects:
            objective.select(self._seen(hidden_TD, ids_TK, objective))
        return support_loss(
            hidden_TD,
            self.weight,
            ids_TK,
            objective,
            within_TK=objective.within_TK,
            topk=objective.topk,
            chunk_tokens=chunk,
        )

    @torch.no_grad()
    def _seen(self, hidden_TD: Tensor, ids_TK: Tensor, objective: Objective) -> StudentView:
        return support_view(
            hidden_TD,
            self.weight,
            ids_TK,
            within_TK=objective.within_TK,
            topk=objective.topk,
            chunk_tokens=self._chunk_tokens,
        )


class Student(nn.Module):
    """A causal LM that gives the objective of a micro-batch instead of logits."""

    def __init__(self, model: nn.Module, head: nn.Linear, chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.head = SupportHead(head.weight, chunk_tokens)

    def forward(self, objective: Objective) -> Tensor:
        """The objective, a scalar; the head is applied at the supervised positions alone."""
        batch, mask = objective.batch, None
        if batch.branches_BL is not None:
            mask = branch_mask(self.model, batch.branches_BL)
        body = self.model.base_model(  # type: ignore[operator]
            input_ids=batch.input_ids_BL,
            attention_mask=mask,
            position_ids=batch.position_ids_BL,
            use_cache=False,
        )
        found: Tensor = self.head(body.last_hidden_state[batch.rows_T, batch.columns_T], objective)
        return found


class Learner:
    """A student under DeepSpeed.

    Args:
        folder: the policy to start from, in Hugging Face format.
        total_updates: updates of the whole run, for the schedule's end.

    Raises:
        ModelError: the model cannot be loaded, or its head is not a plain linear map.
    """

    def __init__(self, folder: Path, config: TrainConfig, *, total_updates: int) -> None:
        self._folder, self._config = folder, config
        self.device = default_device()
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)
        import deepspeed

        _init_distributed()
        if self.device.type != "cpu":
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        attention = {"attn_implementation": config.attention} if config.attention else None
        model = load_model(folder, config.dtype, self.device, attention)
        _, head = split_head(model, folder)
        refuse_leaks(model, config.layout, folder)
        if config.lora is not None:
            add_adapters(model, config.lora, folder)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        if config.compile:
            model.base_model.compile(dynamic=True)  # type: ignore[union-attr]
        student = Student(model, head, head_chunk_tokens(config, self.device)).train()
        self._model = model
        optimizer = torch.optim.AdamW(
            [weight for weight in student.parameters() if weight.requires_grad],
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: lr_factor(config.optimizer, done, total_updates)
        )
        self._optimizer = optimizer
        self._saved: Saved | None = None
        try:
            self._engine: Any = deepspeed.initialize(
                model=student,
                optimizer=optimizer,
                lr_scheduler=scheduler,
                config=deepspeed_config(config),
            )[0]
        except (ValueError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
            if not config.deepspeed:
                raise
            raise ConfigError(f"train.deepspeed: DeepSpeed refuses it: {error}") from error
        self.rank, self.world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
        if config.zero_stage == 0 and self.world_size == 1:
            # Nothing to reduce: flattening all gradients and copying them back costs a second of a
            # small model's update on a CPU.
            self._engine.enable_backward_allreduce = False
        self._seed()

    def loss(self, objective: Objective) -> Tensor:
        """The live student's objective, a scalar with its graph; it adds up its own sums."""
        found: Tensor = self._engine(objective)
        return found

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a rank's share of the loss; shares add up over ranks and calls."""
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self) -> float | None:
        """Clip, update, advance the schedule; the gradient's norm before clipping.

        None where the gradient is not finite: it is thrown away, and nothing is updated.
        """
        norm = self._plain_norm() if self._config.zero_stage == 0 else None
        if norm is not None and not norm.isfinite():
            self._engine.zero_grad()
            return None
        self._engine.step()
        self._seed()
        found = float(self._engine.get_global_grad_norm() if norm is None else norm)
        return found if math.isfinite(found) else None

    def gathered(self, values: Tensor) -> Tensor:
        """The ranks' tensors, one after another along a new first axis."""
        rows = values.new_zeros((self.world_size, *values.shape))
        rows[self.rank] = values
        return self.sum(rows)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the ranks."""
        if self.world_size > 1:
            import deepspeed

            deepspeed.comm.all_reduce(values)
        return values

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return float(self._engine.get_lr()[0])

    def save(self, checkpoints: Path, position: Position) -> None:
        """Save weights, float32 masters, moments, schedule and position; older saves go after."""
        state = Saved(position.round, position.num_updates, self.world_size)
        if self._saved == state:
            return  # writing over the only saved state could lose it
        self._saved = state
        tag = state.tag
        with space(checkpoints):
            self._engine.save_checkpoint(
                str(checkpoints),
                tag=tag,
                save_latest=False,
                client_state={"position": asdict(position)},
                exclude_frozen_parameters=self._config.lora is not None,
            )
            if self.rank == 0:
                state.become_newest(checkpoints)
        if self.rank == 0:
            for old in checkpoints.iterdir():
                if old.is_dir() and old.name != tag:
                    shutil.rmtree(old)
        self.barrier()  # a launcher takes the first rank that ends for a sign to end all

    def load(self, checkpoints: Path) -> Position:
        """Take up the newest saved state, of however many ranks.

        Without ZeRO every rank holds all of it. With ZeRO each holds a part, and another number of
        ranks takes it from DeepSpeed's universal format, which is made for the moment.
        """
        saved = self._saved = Saved.newest(checkpoints)
        assert saved is not None
        is_whole = self._config.lora is None
        if self._config.zero_stage == 0 or saved.num_ranks == self.world_size:
            _, state = self._engine.load_checkpoint(str(checkpoints), load_module_strict=is_whole)
        else:
            state = self._load_others(checkpoints, saved)
        self._seed()
        return Position(**state["position"])

    def _load_others(self, checkpoints: Path, saved: Saved) -> dict[str, Any]:
        """What another number of ranks saved."""
        universal = checkpoints / "universal"
        if self.rank == 0:
            with space(checkpoints):
                make_universal(checkpoints / saved.tag, universal)
        self.barrier()
        self._engine._config.load_universal_checkpoint = True
        _, state = self._engine.load_checkpoint(str(universal), tag=saved.tag)
        for weight, moments in self._optimizer.state.items():
            # DeepSpeed gives all parts of the weights one count, on the CPU.
            moments["step"] = moments["step"].to(weight.device, copy=True)
        self.barrier()
        if self.rank == 0:
            shutil.rmtree(universal)
        return dict(state)

    def export(self, folder: Path) -> None:
        """Write the student in Hugging Face format, whole or not at all.

        The weights are a view of the float32 masters in the training dtype. The tokenizer's files
        are carried over as they are, so that token ids keep their meaning.
        """
        lora, state = self._config.lora, None
        if lora is not None:
            state = self._adapters()
        elif self._config.zero_stage == 3:
            state = self._engine._zero3_consolidated_16bit_state_dict()
        if self.rank == 0:
            with space(folder), whole(folder) as draft:
                if lora is not None and state is not None:
                    save_merged(draft, self._folder, lora, state, self._config.dtype)
                else:
                    weights = None if state is None else _model_state(state)
                    self._model.save_pretrained(draft, state_dict=weights)  # type: ignore[operator]
                for file in tokenizer_files(self._folder):
                    shutil.copy2(file, draft / file.name)
        self.barrier()

    def barrier(self) -> None:
        """Wait for every rank."""
        import deepspeed

        deepspeed.comm.barrier()

    def _adapters(self) -> dict[str, Tensor]:
        """Float32 weights of the adapters on the CPU, by their names in the Hugging Face model."""
        import deepspeed

        return {
            name: (deepspeed.utils.safe_get_full_fp32_param(w) if self._config.zero_stage else w)
            .detach()
            .cpu()
            for name, w in self._model.named_parameters()
            if w.requires_grad
        }

    def _seed(self) -> None:
        """Dropout follows from the update and the rank: a resumed run draws the same."""
        torch.manual_seed(self._engine.global_steps * self.world_size + self.rank)

    def _plain_norm(self) -> Tensor:
        """Norm of the ranks' mean gradient. Without ZeRO nothing keeps it, and the ranks' gradients
        are averaged only within ``step``."""
        grads = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        if self.world_size > 1:
            grads = [self.sum(grad.clone()) / self.world_size for grad in grads]
        return torch.nn.utils.get_total_norm(grads)


def lr_factor(optimizer: OptimizerConfig, done: int, total: int) -> float:
    """Share of the peak learning rate at the update that follows ``done`` others.

    The warm-up's first update is not at 0, as it is elsewhere: it would throw a batch of teacher
    tokens away.
    """
    warmup = optimizer.warmup_updates
    if done < warmup:
        return (done + 1) / (warmup + 1)
    if optimizer.schedule == "constant":
        return 1.0
    left = 1 - min(1.0, (done - warmup) / max(1, total - warmup))
    return left if optimizer.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


def head_chunk_tokens(config: TrainConfig, device: torch.device) -> int:
    """Tokens of one LM-head chunk on a device."""
    return config.head_chunk_tokens or (512 if device.type == "cpu" else 2048)


def _init_distributed() -> None:
    """Join the ranks that a launcher announced, or be the only one."""
    import deepspeed

    if deepspeed.comm.is_initialized():
        return
    if "RANK" in os.environ:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        return
    os.environ.setdefault("LOCAL_RANK", "0")
    # Reductions over shared memory, which DeepSpeed would compile for half a minute on a CPU, are
    # of no use to a single rank.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.distributed.init_process_group(
        deepspeed.accelerator.get_accelerator().communication_backend_name(),
        store=torch.distributed.HashStore(),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
    )
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _model_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of the Hugging Face model among those of ``Student``."""
    prefix = "model."
    found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not found:
        raise ModelError("the consolidated state holds no weights")
    return found
