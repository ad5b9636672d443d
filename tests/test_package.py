"""The layers, the light start of the command line, and what a wheel holds."""

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from opdcache.cli.main import cli

ROOT = Path(__file__).parent.parent
FOLDERS = ("opdcache", "cli", "jobs", "schemas")
ENGINES = ("torch", "vllm", "deepspeed", "transformers")
STAGES = ("rollout", "score", "train")


def modules() -> dict[str, Path]:
    """Import name to file, the top-level folders mapped into the package."""
    found = {}
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            parts = list(file.relative_to(ROOT).with_suffix("").parts)
            if folder != "opdcache":
                parts.insert(0, "opdcache")
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts)] = file
    return found


def imports(name: str, file: Path, *, at_start: bool = False) -> Iterator[str]:
    """Absolute names of all that a module imports; ``at_start``: when it is itself imported."""
    tree = ast.parse(file.read_text())
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in _executed(tree) if at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes outside functions and outside ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if lazy or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            continue
        yield node
        yield from _executed(node)


def importers(*packages: str) -> set[str]:
    """Modules that import one of the packages, or anything below it."""
    return {
        name
        for name, file in modules().items()
        for imported in imports(name, file)
        if any(imported == p or imported.startswith(f"{p}.") for p in packages)
    }


def below(*packages: str) -> set[str]:
    return {
        name for name in modules() if any(name == p or name.startswith(f"{p}.") for p in packages)
    }


def test_the_search_for_imports_sees_all_forms(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text(
        "import a.b\nfrom . import c\nfrom ..d import e\nfrom f import g\n"
        "def h():\n    import i\nif TYPE_CHECKING:\n    import j\n"
    )

    everything = set(imports("opdcache.x.m", file))

    assert {"a.b", "opdcache.x.c", "opdcache.d.e", "f.g", "i", "j"} <= everything
    assert everything - set(imports("opdcache.x.m", file, at_start=True)) == {"i", "j"}


def test_vllm_has_one_door() -> None:
    assert importers("vllm") == {"opdcache.vllm_engine"}


def test_deepspeed_has_one_door() -> None:
    assert importers("deepspeed") == {"opdcache.train.learner"}


def test_peft_has_one_door() -> None:
    assert importers("peft") == {"opdcache.train.lora"}


def test_embeddings_have_one_door() -> None:
    assert importers("sentence_transformers") == {"opdcache.apart"}


@pytest.mark.parametrize("package", ["zarr", "numcodecs", "obstore"])
def test_storage_libraries_are_behind_the_store(package: str) -> None:
    assert importers(package) <= below("opdcache.store")


def test_zarr_and_obstore_are_each_imported_somewhere() -> None:
    assert importers("zarr")
    assert importers("obstore")


def test_parquet_is_read_and_written_in_the_store_and_where_tables_come_in_and_go_out() -> None:
    doors = {"opdcache.store.rollouts", "opdcache.store.index"}
    assert importers("pyarrow.parquet") == {*doors, "opdcache.prompt_rows", "opdcache.export"}


@pytest.mark.parametrize("stage", [*STAGES, "audit"])
def test_a_stage_imports_no_other_stage(stage: str) -> None:
    others = [f"opdcache.{other}" for other in (*STAGES, "audit") if other != stage]

    assert importers(*others) & below(f"opdcache.{stage}") == set()


def test_the_contract_imports_nothing_outside_itself() -> None:
    outside = {
        (name, imported)
        for name in below("opdcache.schemas")
        for imported in imports(name, modules()[name])
        if imported.split(".")[0] == "opdcache"
        and imported not in below("opdcache.schemas")
        # a name of a module, not a module
        and imported.rpartition(".")[0] not in below("opdcache.schemas")
    }

    assert outside == set()


@pytest.mark.parametrize(
    ("layer", "above"),
    [
        (
            (
                "opdcache.costs",
                "opdcache.errors",
                "opdcache.identity",
                "opdcache.judging",
                "opdcache.near_copies",
                "opdcache.prompt_rows",
                "opdcache.prompts",
                "opdcache.run_prompts",
                "opdcache.user_code",
                "opdcache.verifiers",
                "opdcache.accuracy",
            ),
            ("store", "rollout", "score", "train", "stage", "runfolder", "rounds", "cli", "jobs"),
        ),
        (
            ("opdcache.store",),
            ("rollout", "score", "train", "stage", "runfolder", "rounds", "cli", "jobs", "heads"),
        ),
        (
            ("opdcache.apart", "opdcache.stage", "opdcache.heads", "opdcache.runfile"),
            ("rollout", "score", "train", "rounds", "cli", "jobs"),
        ),
        (
            ("opdcache.rollout", "opdcache.score", "opdcache.train", "opdcache.audit"),
            ("rounds", "planner", "planned", "measured", "disk", "cli", "jobs"),
        ),
        (
            (
                "opdcache.rounds",
                "opdcache.evaluation",
            ),
            ("planner", "disk", "cli", "jobs"),
        ),
        (
            ("opdcache.planner", "opdcache.planned", "opdcache.measured", "opdcache.disk"),
            ("cli", "jobs"),
        ),
        (
            (
                "opdcache.agreement",
                "opdcache.data",
                "opdcache.torch_data",
                "opdcache.export",
                "opdcache.importing",
                "opdcache.quality",
                "opdcache.selection",
                "opdcache.served",
            ),
            ("rollout", "score", "train", "cli", "jobs"),
        ),
        (("opdcache.jobs",), ("cli",)),
    ],
)
def test_a_layer_imports_only_downward(layer: tuple[str, ...], above: tuple[str, ...]) -> None:
    assert below(*layer)
    assert importers(*(f"opdcache.{name}" for name in above)) & below(*layer) == set()


@pytest.mark.parametrize(
    "layer",
    [
        "opdcache.schemas",
        "opdcache.store",
        "opdcache.agreement",
        "opdcache.apart",
        "opdcache.audit",
        "opdcache.export",
        "opdcache.importing",
        "opdcache.judging",
        "opdcache.quality",
        "opdcache.selection",
        "opdcache.verifiers",
        "opdcache.evaluation.run",
        "opdcache.evaluation.verified",
        "opdcache.cli",
    ],
)
def test_no_engine_is_imported_with_a_light_layer(layer: str) -> None:
    heavy = {
        (name, imported)
        for name in below(layer)
        for imported in imports(name, modules()[name], at_start=True)
        if imported.split(".")[0] in ENGINES
    }

    assert heavy == set()


WITHOUT_ENGINES = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "vllm", "deepspeed", "transformers"):
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

sys.meta_path.insert(0, Absent())
from opdcache.cli.main import main
sys.argv[0] = "opdcache"
main()
"""


def opdcache(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """The console script where no engine can be imported."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_ENGINES, *arguments], capture_output=True, text=True
    )


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "student: {model: ./s}\nteacher: {model: ./t}\nrounds: 2\n"
        "prompts: {source: {type: jsonl, path: p.jsonl}}\n"
    )
    return path


def test_help_needs_no_engine() -> None:
    done = opdcache("--help")

    assert (done.returncode, done.stderr) == (0, "")
    for command in (
        *("run", "plan", "rollout", "score", "train", "evaluate", "status", "cache", "demo"),
    ):
        assert f"\n  {command} " in done.stdout


def test_help_starts_without_the_storage_libraries() -> None:
    script = WITHOUT_ENGINES.replace('("torch", ', '("zarr", "pyarrow", "obstore", "torch", ')
    assert script != WITHOUT_ENGINES

    done = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr.splitlines()[-1]


def test_no_command_s_help_needs_an_engine() -> None:
    script = WITHOUT_ENGINES.replace(
        "main()\n",
        """from opdcache.cli.main import cli
for name in cli.commands:
    cli.main([name, "--help"], standalone_mode=False)
""",
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Usage: ") == len(cli.commands)


def test_status_needs_no_engine(run_yaml: Path) -> None:
    done = opdcache("status", str(run_yaml))

    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split()[:3] for line in done.stdout.splitlines()]
    for round_index in "01":
        for stage in STAGES:
            assert [round_index, stage, "waiting"] in rows


def test_a_faulty_run_file_is_one_line_with_code_and_exit_code(run_yaml: Path) -> None:
    run_yaml.write_text(run_yaml.read_text() + "sead: 1\n")

    done = opdcache("status", str(run_yaml))

    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "did you mean 'seed'?" in done.stderr
    assert done.stderr.rstrip().endswith("[OPD101]")


def test_a_package_that_is_not_installed_is_one_line_that_says_how_to_get_it(
    tmp_path: Path,
) -> None:
    done = opdcache("demo", str(tmp_path))

    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "torch is not installed; pip install 'opdcache[cpu]'" in done.stderr


def test_a_stage_that_a_signal_ended_is_named_with_the_signal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from opdcache.errors import StageError
    from opdcache.jobs import local

    killer = tmp_path / "python"
    killer.write_text("#!/bin/sh\nkill -KILL $$\n")
    killer.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killer))
    with pytest.raises(StageError, match=r"'opdcache score' was ended by SIGKILL.*memory"):
        local.run_command("score", "run.yaml")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built of a copy, so that the build leaves nothing in the working tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in (*FOLDERS, "tests"):
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *build, str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.whl")
    return zipfile.ZipFile(file)


def test_a_wheel_holds_opdcache_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}

    (metadata,) = {top for top in tops if top.endswith(".dist-info")}
    assert tops == {"opdcache", metadata}


def test_a_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    built = {name for name in wheel.namelist() if name.endswith(".py")}

    expected = {
        name.replace(".", "/") + ("/__init__.py" if file.name == "__init__.py" else ".py")
        for name, file in modules().items()
    }
    assert built == expected


def test_a_wheel_holds_the_recipes_the_templates_the_contract_and_the_type_marker(
    wheel: zipfile.ZipFile,
) -> None:
    built = set(wheel.namelist())

    assert "opdcache/py.typed" in built
    recipes = {f.relative_to(ROOT) for f in (ROOT / "jobs/recipes").rglob("*") if f.is_file()}
    assert len(recipes) > 10
    assert {f"opdcache/{path}" for path in recipes} <= built
    templates = {f.name for f in (ROOT / "opdcache/audit/report/templates").iterdir()}
    assert {f"opdcache/audit/report/templates/{name}" for name in templates} <= built
    rendered = {f"opdcache/schemas/{f.name}" for f in (ROOT / "schemas").glob("*.json")}
    assert rendered
    assert rendered <= built


def test_the_rendered_contract_is_what_the_models_say() -> None:
    from opdcache.schemas.render import render

    on_disk = {file.name: file.read_text() for file in (ROOT / "schemas").glob("*.json")}

    assert on_disk == render()
    assert all(json.loads(text)["description"] for text in on_disk.values())
