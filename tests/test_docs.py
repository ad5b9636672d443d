"""Docs that cannot rot: every command, run-file key, column and loss is in them."""

import re
from functools import reduce
from pathlib import Path

import click
import pytest

from opdcache.cli.main import cli
from opdcache.schemas.audit import AuditLimits
from opdcache.schemas.columns import ROLLOUT_COLUMNS, SCORE_ARRAYS
from opdcache.schemas.config import EvaluationConfig, RunConfig
from opdcache.schemas.launch import (
    KubernetesLaunch,
    LaunchConfig,
    SlurmLaunch,
    TrainLaunch,
    WorkersLaunch,
)
from opdcache.schemas.losses import CELLS, LossConfig, TokensConfig

ROOT = Path(__file__).parent.parent
GUIDES = ("docs/running.md", "docs/inspect.md", "docs/prompts.md")


def text(*names: str) -> str:
    return "\n".join((ROOT / name).read_text() for name in names)


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_is_in_the_docs(command: str) -> None:
    assert f"opdcache {command}" in text("docs/running.md")


@pytest.mark.parametrize("group_name", ["cache", "recipes"])
def test_every_command_of_a_group_is_in_the_docs(group_name: str) -> None:
    group = cli.commands[group_name]
    assert isinstance(group, click.Group)
    for name in group.commands:
        assert re.search(rf"`opdcache {group_name} {name}[ `]", text("docs/running.md"))


def test_every_command_in_the_docs_exists() -> None:
    said = set(re.findall(r"`opdcache ([a-z]+)", text("README.md", *GUIDES)))
    assert said
    assert said <= set(cli.commands)


@pytest.mark.parametrize("command", ["inspect", "prompts"])
def test_every_option_of_a_command_is_in_its_docs(command: str) -> None:
    options = [option for p in cli.commands[command].params for option in p.opts]
    flags = [option for option in options if option.startswith("-") and option != "--help"]
    said = text(f"docs/{command}.md")
    assert [flag for flag in flags if not re.search(rf"`?{flag}\b", said)] == []


def test_every_stored_column_is_in_the_format() -> None:
    names = [c.name for c in ROLLOUT_COLUMNS] + [a.name for a in SCORE_ARRAYS]
    assert [name for name in names if f"`{name}`" not in text("docs/format.md")] == []


def test_every_part_of_a_run_file_is_in_the_docs() -> None:
    parts = [name for name in RunConfig.model_fields if f"`{name}`" not in text("docs/running.md")]
    assert not set(parts) - {"student"}  # shown in the example


def test_every_key_of_a_launch_is_in_the_docs() -> None:
    kinds = (LaunchConfig, WorkersLaunch, TrainLaunch, SlurmLaunch, KubernetesLaunch)
    names = {name for kind in kinds for name in kind.model_fields}
    assert {name for name in names if f"`{name}`" not in text("docs/clusters.md")} == set()


def test_every_limit_of_an_audit_is_in_the_docs_with_its_default() -> None:
    lines = text("docs/audit.md").splitlines()
    for name, field in AuditLimits.model_fields.items():
        (line,) = (line for line in lines if line.startswith("| `") and f"`{name}`" in line)
        names, defaults = (cell.split(", ") for cell in line.strip("| ").split(" | ")[:2])
        assert float(defaults[names.index(f"`{name}`")]) == field.default


def test_every_key_of_an_evaluation_is_in_the_docs() -> None:
    keys = EvaluationConfig.model_fields
    assert [name for name in keys if f"`{name}`" not in text("docs/evaluation.md")] == []


def test_every_default_with_a_reason_is_the_schema_s() -> None:
    whole = RunConfig.model_validate(
        {
            "student": {"model": "s"},
            "teacher": {"model": "t"},
            "prompts": {"source": {"type": "jsonl", "path": "p"}},
        }
    )
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| (.+) \|$", text("docs/defaults.md"), re.M)
    assert len(rows) > 20
    for key, default, _ in rows:
        assert default == str(reduce(getattr, key.split("."), whole)), key


def test_every_choice_of_a_loss_is_in_the_docs() -> None:
    choices = {choice for cell in CELLS for choice in cell}
    choices |= LossConfig.model_fields.keys() | TokensConfig.model_fields.keys()
    assert {c for c in choices if f"`{c}`" not in text("docs/running.md")} == set()


def test_the_readme_is_short() -> None:
    assert len(text("README.md").splitlines()) < 200
