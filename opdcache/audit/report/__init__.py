"""The audit of a run as one HTML file that needs nothing else: gathered, drawn, put into a page."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import NotInstalled, UsageError
from ...runfolder import RunFolder
from ..targets import of_run


def report(
    run_file: Path,
    output: Path,
    *,
    rounds: Sequence[int] = (),
    k: int = 16,
    num_worst: int = 4,
    rows: Sequence[str] = (),
    png_folder: Path | None = None,
    verifier: str | None = None,
) -> Iterator[Path]:
    """Write a run's report; gives each file that is written.

    Args:
        rounds: to look at; every scored one by default.
        k: entries that the overlap is taken of.
        num_worst: completions, and tokens, shown of each kind of worst case.
        rows: completions to show besides, ``SHARD:ROW``.
        png_folder: where the charts go too.
        verifier: that labels completions; by default that of the run's evaluation.

    Raises:
        NotInstalled: a package of the extra ``report`` is not there.
        InputsMissing: the run has no scored round, or not one that was asked for.
        UsageError: a row is not of these rounds, or there is no folder for the file.
    """
    if not output.parent.is_dir():
        raise UsageError("no such folder", where=output.parent, remedy="make it, or name another")
    try:
        from .gather import gather
        from .page import page, pngs
    except ModuleNotFoundError as error:
        raise NotInstalled(
            f"{error.name} is not installed", remedy="pip install 'opdcache[report]'"
        ) from error
    target = of_run(run_file, rounds)
    assert target.config is not None
    folder = RunFolder(Path(str(target.config.output)), writes=False)
    contents = gather(
        target, folder, k=k, num_worst=num_worst, rows=rows, only=rounds, verifier=verifier
    )
    output.write_text(page(contents), encoding="utf-8")
    yield output
    if png_folder is not None:
        png_folder.mkdir(parents=True, exist_ok=True)
        for name, data in pngs(contents):
            file = png_folder / f"{name}.png"
            file.write_bytes(data)
            yield file
