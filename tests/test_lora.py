"""Training low-rank adapters, against a plain loop over the same adapters by peft alone."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opdcache.errors import ConfigError, NotInstalled
from opdcache.runfolder import RunFolder
from opdcache.schemas.config import RunConfig
from opdcache.schemas.training import LoraConfig
from opdcache.store.cache import Cache
from opdcache.train.lora import add_adapters
from opdcache.train.samples import RoundSamples

from .conftest import make_tiny_model
from .test_learner import (
    BATCH,
    BETAS,
    CLIP,
    DECAY,
    EPOCHS,
    EPS,
    LR,
    ROUNDS,
    SAMPLES,
    TIGHT,
    K,
    _files,
    carry_out,
    exact_bytes,
    job,
    load,
    run_config,
    token_losses,
    weights,
    write_rounds,
)
from .test_other_ranks import error, joined

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_thread")]

RANK, ALPHA = 4, 16.0
LORA: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}
STAGES = (0, 1, 2, 3)
SINGLE = {f"zero{stage}": {"zero_stage": stage} for stage in STAGES}
FEWER = {f"fewer-zero{stage}": {"zero_stage": stage} for stage in STAGES}
DROPOUT = {f"dropout-zero{stage}": {"zero_stage": stage} for stage in (1, 3)}
LONG, BF16, FRESH = "long", "bf16", "fresh"


@dataclass(frozen=True)
class Runs:
    """Run folders by name, the student, and the plain loop's weights after each round."""

    base: Path
    student: Path
    plain: list[Tensor]

    def folder(self, name: str, round_index: int = 1) -> Path:
        return self.base / name / "students" / f"{round_index:03d}"

    def student_of(self, name: str, round_index: int = 1) -> Tensor:
        return joined(weights(self.folder(name, round_index)))

    def losses(self, name: str) -> list[float]:
        lines = (self.base / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path, one_thread: None
) -> Runs:
    """Every run of this file; what is interrupted goes on in another process."""
    base = tmp_path_factory.mktemp("lora")
    student = make_tiny_model(base / "student", tiny_tokenizer_folder, seed=1)

    def config(name: str, lora: dict[str, Any] = LORA, **train: Any) -> dict[str, Any]:
        return run_config(name, base, student, lora=lora, micro_batch_tokens=TIGHT, **train)

    dropout = {**LORA, "dropout": 0.3}
    configs = {
        **{name: config(name, **train) for name, train in {**SINGLE, **FEWER}.items()},
        **{name: config(name, dropout, **train) for name, train in DROPOUT.items()},
        **{f"whole-{name}": config(f"whole-{name}", dropout, **t) for name, t in DROPOUT.items()},
        LONG: config(LONG, epochs=12, lr=1e-2),
        FRESH: config(FRESH, fresh_optimizer=True),
        BF16: config(BF16, {**LORA, "export_adapter": True}, zero_stage=2, dtype="bfloat16"),
    }
    write_rounds(str(base / "cache"), [base / name for name in configs])
    whole = [job(configs[n], r) for n in (*SINGLE, FRESH) for r in range(ROUNDS)]
    whole += [job(configs[name]) for name in (LONG, BF16, *(f"whole-{n}" for n in DROPOUT))]
    carry_out(base, "one", [*whole, *(job(configs[name], stop_after=2) for name in DROPOUT)])
    carry_out(base, "two", [job(configs[name], stop_after=2) for name in FEWER], ranks=2)
    carry_out(base, "on", [job(configs[name]) for name in (*FEWER, *DROPOUT)])
    return Runs(base, student, plain_loop(base, student, configs["zero1"]))


def plain_loop(base: Path, student: Path, config: dict[str, Any]) -> list[Tensor]:
    """Dense logits, a sequence at a time, AdamW on the adapters; W + alpha / r B A by hand."""
    seed = RunConfig.model_validate_json(json.dumps(config)).seed
    model = load(student)
    add_adapters(model, LoraConfig(**LORA), student)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    samples = RoundSamples(Cache(str(base / "cache")), *_files(RunFolder(base / "zero1")), K)
    per_round, done, made = -(-len(SAMPLES) // BATCH), 0, []
    for round_index in range(ROUNDS):
        order = samples.order(seed, round_index, EPOCHS)
        for update in range(per_round):
            batch = [SAMPLES[i] for i in order[update * BATCH : (update + 1) * BATCH]]
            optimizer.zero_grad()
            losses = [loss for sample in batch for loss in token_losses(model, sample)]
            (sum(losses[1:], losses[0]) / len(losses)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.param_groups[0]["lr"] = LR * (1 - done / (per_round * ROUNDS))
            optimizer.step()
            done += 1
        made.append(joined(merged(dict(model.named_parameters()))))
    return made


def merged(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + alpha / r B A of every adapted module, in float64."""
    exact = {name: p.detach().double() for name, p in parameters.items()}
    whole = {name.replace(".base_layer", ""): p for name, p in exact.items() if "lora_" not in name}
    for name in [name for name in exact if ".lora_A." in name]:
        module = name.split(".lora_A.")[0]
        b = exact[name.replace(".lora_A.", ".lora_B.")]
        whole[f"{module}.weight"] = whole[f"{module}.weight"] + ALPHA / RANK * b @ exact[name]
    return whole


@pytest.mark.parametrize("name", [*SINGLE, *FEWER])
def test_adapters_are_trained_as_by_a_plain_loop_and_exported_merged(runs: Runs, name: str) -> None:
    """On one rank; and begun on two, ended on one."""
    start = joined(weights(runs.student))
    assert error(runs.student_of(name), runs.plain[0]) <= 1e-5
    assert error(runs.student_of(name) - start, runs.plain[0] - start) <= 1e-3


@pytest.mark.parametrize("name", SINGLE)
def test_the_next_round_goes_on_with_the_adapters_and_their_moments(runs: Runs, name: str) -> None:
    first, second = runs.plain
    assert error(runs.student_of(name, 2), second) <= 1e-5
    assert error(runs.student_of(name, 2) - first, second - first) <= 1e-3


def test_a_fresh_optimizer_begins_new_adapters_on_the_student_of_the_round(runs: Runs) -> None:
    """What a round adds to a weight has the adapter's rank; what two such rounds add, twice."""
    name = "model.layers.0.self_attn.q_proj.weight"
    start = weights(runs.student)[name]
    first, second = (weights(runs.folder(FRESH, r))[name] for r in (1, 2))

    def relative(added: Tensor) -> Tensor:
        sizes = torch.linalg.svdvals(added)
        return sizes / sizes[0]

    assert relative(second - first)[RANK] < 1e-5
    assert relative(second - start)[2 * RANK] < 1e-5
    assert relative(second - start)[RANK] > 1e-3


def test_nothing_but_the_adapted_modules_changes(runs: Runs) -> None:
    before, after = exact_bytes(runs.student), exact_bytes(runs.folder("zero3"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj." in name}


def test_a_checkpoint_holds_the_adapters_and_not_the_student(runs: Runs) -> None:
    for name in SINGLE:
        (state,) = (p for p in (runs.base / name / "checkpoints").iterdir() if p.is_dir())
        held = torch.load(next(state.glob("*model_states.pt")), weights_only=False)["module"]
        tied = {"model.lm_head.weight", "head.weight"}  # DeepSpeed leaves out one name a weight
        assert all(".lora_" in weight for weight in held.keys() - tied)


def test_the_loss_falls(runs: Runs) -> None:
    losses = runs.losses(LONG)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_the_exported_adapter_is_what_peft_loads_and_merges_to_the_student(runs: Runs) -> None:
    from peft import PeftModel

    folder = runs.folder(BF16)
    adapted = PeftModel.from_pretrained(load(runs.student), str(folder / "adapter"))
    named = {n.removeprefix("base_model.model."): p for n, p in adapted.named_parameters()}
    exact, ours = merged(named), exact_bytes(folder)
    assert any(p.abs().max() > 0 for name, p in named.items() if ".lora_B." in name)
    for name, weight in ours.items():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.double(), exact[name], rtol=2**-8, atol=1e-9)


def test_no_adapter_is_exported_unless_asked_for(runs: Runs) -> None:
    assert not (runs.folder("zero1") / "adapter").exists()


@pytest.mark.parametrize("name", DROPOUT)
def test_a_resumed_round_drops_out_the_same_and_ends_in_the_same_bits(
    runs: Runs, name: str
) -> None:
    whole, resumed, without = (
        exact_bytes(runs.folder(n)) for n in (f"whole-{name}", name, name.replace("dropout-", ""))
    )
    assert all(torch.equal(whole[tensor], resumed[tensor]) for tensor in whole)
    assert any(not torch.equal(whole[tensor], without[tensor]) for tensor in whole)


def test_peft_that_is_not_installed_is_one_line_that_says_how_to_get_it(
    tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(NotInstalled, match=r"pip install 'opdcache\[lora\]'"):
        add_adapters(load(tiny_student), LoraConfig(), tiny_student)


@pytest.mark.parametrize(
    ("targets", "said"),
    [(("no_such",), "no_such"), (("lm_head",), "LM head"), (("embed_tokens",), "LM head")],
)
def test_modules_that_are_not_there_or_not_for_adapters_are_refused(
    tiny_student: Path, targets: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=rf"train\.lora\.target_modules: .*{said}"):
        add_adapters(load(tiny_student), LoraConfig(target_modules=targets), tiny_student)
