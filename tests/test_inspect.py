"""``opdcache inspect``: what it prints, finds and refuses."""

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from opdcache import documents
from opdcache.cli import screen
from opdcache.cli.main import main
from opdcache.cli.tables import as_text
from opdcache.runfile import load_run
from opdcache.runfolder import RunFolder
from opdcache.schemas.columns import ScoreColumn
from opdcache.schemas.inspection import Listing, Row
from opdcache.schemas.rounds import Resolved, RolloutRound, ScoredShard, ScoreRound
from opdcache.store.cache import Cache, as_listed

from . import two_models as dense
from .shards import TEACHER
from .test_package import opdcache
from .two_models import Completion, completion

EVERY: tuple[ScoreColumn, ...] = ("sampled", "entropy", "topk", "student_topk")
ESCAPES = "\x1b]0;owned\x07 \x1b[31mred\x1b[0m \x9b31m \u202eback \r\b"
Said = tuple[int, str, str]
Inspect = Callable[..., Said]


def completions(first: int, num: int) -> list[Completion]:
    """Some of two prompts, of 3 to 6 visible characters each."""
    rng = np.random.default_rng(first)
    return [
        completion(
            f"prompt-{(first + i) // 2}",
            rng.integers(ord("a"), ord("z"), size=3 + i % 4).tolist(),
            100 * first + i + 50,
            answer="42",
        )
        for i in range(num)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds, the first of two shards, with the student's tokenizer."""
    home = tmp_path_factory.mktemp("made")
    cache = Cache(str(home / "cache"))
    dense.byte_tokenizer(home / "student")
    (home / "student" / "config.json").write_text("{}")
    (home / "run.yaml").write_text(
        "student: {model: student}\nteacher: {model: ./t}\nrounds: 2\ncache: cache\noutput: run\n"
        "prompts: {source: {type: jsonl, path: p.jsonl}}\n"
    )
    config, folder = load_run(home / "run.yaml"), RunFolder(home / "run")
    listed = []
    for number, some in enumerate(SHARDS):
        rollout = dense.commit(cache, some, name=str(number))
        served = dense.score(cache, rollout, some, *EVERY)
        listed.append((as_listed(rollout, cached=False), served))
    for index, shards in enumerate((listed[:2], listed[2:])):
        rollouts = tuple(shard for shard, _ in shards)
        scored = tuple(
            ScoredShard(content=shard.content, teacher=TEACHER, served=(served,), cached=False)
            for shard, served in shards
        )
        student = str(index)
        folder.write(
            RolloutRound(round=index, student=student, shards=rollouts, dropped={}, elapsed_s=0)
        )
        folder.write(ScoreRound(round=index, shards=scored, elapsed_s=0))
    resolved = Resolved(
        run_id="run",
        opdcache="0",
        config=config,
        student="0",
        teacher=TEACHER,
        vocabulary="v",
        tokenizers="t",
        vocab_size=dense.V,
    )
    documents.create(home / "run" / "resolved.json", resolved)
    return home


SHARDS = [completions(0, 4), completions(4, 3), completions(7, 2)]


@pytest.fixture
def inspect(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Inspect:
    """The command on that run, or on ``of``: exit code, output, errors."""

    def command(*arguments: object, of: object = made / "run.yaml") -> Said:
        monkeypatch.setattr(sys, "argv", ["opdcache", "inspect", str(of), *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            main()
        return int(str(done.value.code)), *capsys.readouterr()

    return command


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def names(made: Path) -> list[str]:
    """How each shard's rows begin."""
    folder = RunFolder(made / "run")
    return [shard.key[:12] for index in (0, 1) for shard in folder.need(RolloutRound, index).shards]


def every(made: Path) -> Iterator[tuple[str, Completion]]:
    """All completions of the run by row, in order."""
    for name, some in zip(names(made), SHARDS, strict=True):
        for row, one in enumerate(some):
            yield f"{name}:{row}", one


def mean_advantage(one: Completion) -> float:
    return float(np.mean([one.advantage(t) for t in range(len(one.ids))]))


def text(one: Completion) -> str:
    return bytes(one.ids).decode("latin-1")


def table(out: str, first: str) -> list[list[str]]:
    """Cells of the lines below the heading that begins so."""
    lines = out.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.split()[:2] == first.split())
    rest = lines[start + 2 :]
    end = next((i for i, line in enumerate(rest) if line.startswith("'--")), len(rest))
    return [line.split() for line in rest[:end]]


def test_a_list_names_the_first_completions_with_their_worst_token(
    inspect: Inspect, made: Path
) -> None:
    code, out, _ = inspect("-n", 8)

    assert code == 0
    rows = table(out, "row of")
    expected = list(every(made))[:8]
    assert [cells[0] for cells in rows] == [name for name, _ in expected]
    for cells, (_, one) in zip(rows, expected, strict=True):
        worst = min(range(len(one.ids)), key=one.advantage)
        index = "1" if cells[0].startswith(names(made)[2]) else "0"
        assert cells[1:4] == ["round", index, str(len(one.ids))]
        assert float(cells[4]) == pytest.approx(mean_advantage(one), abs=0.02)
        assert cells[6:8] == [chr(one.ids[worst]), str(worst)]
        assert float(cells[8]) == pytest.approx(one.advantage(worst), abs=0.04)
        assert cells[-1].startswith(one.prompt_id)


def test_the_worst_by_advantage_come_first_over_all_rounds(inspect: Inspect, made: Path) -> None:
    _, out, _ = inspect("--worst", "advantage", "-n", 8)

    expected = sorted(every(made), key=lambda item: mean_advantage(item[1]))[:8]
    assert [cells[0] for cells in table(out, "row of")] == [name for name, _ in expected]


def test_the_worst_by_disagreement_come_first(inspect: Inspect, made: Path) -> None:
    listing = Listing.model_validate_json(inspect("--worst", "disagreement", "--json")[1])

    found = [row.disagreement for row in listing.rows]
    assert found == sorted(found, key=lambda value: -(value or 0))
    assert len(found) == 9
    by_row = dict(every(made))
    for row in listing.rows:
        p, q = (np.exp(v) for v in (by_row[row.row].p_TV, by_row[row.row].q_TV))
        assert row.disagreement is not None
        assert 0 < row.disagreement <= float((np.abs(p - q).sum(axis=1) / 2).mean()) + 0.01


def test_a_round_can_be_chosen_for_a_search(inspect: Inspect, made: Path) -> None:
    _, out, _ = inspect("--round", 1, "--worst", "advantage")

    found = [cells[0] for cells in table(out, "row tokens")]
    assert sorted(found) == [f"{names(made)[2]}:{row}" for row in (0, 1)]


def test_a_prompt_s_completions_are_listed(inspect: Inspect, made: Path) -> None:
    _, out, _ = inspect("--prompt", "prompt-1", "-n", 1)

    expected = [name for name, one in every(made) if one.prompt_id == "prompt-1"]
    assert len(expected) == 2
    assert [cells[0] for cells in table(out, "row tokens")] == expected


def test_a_prompt_s_only_completion_is_shown(inspect: Inspect, made: Path) -> None:
    _, out, _ = inspect("--round", 1, "--prompt", "prompt-3")

    (shown,) = [
        n for n, one in every(made) if one.prompt_id == "prompt-3" and n[:12] == names(made)[2]
    ]
    assert f"row         {shown}, of round 1\n" in out


def test_a_row_shows_every_token_with_its_numbers(inspect: Inspect, made: Path) -> None:
    name, one = list(every(made))[5]

    code, out, err = inspect("--row", name)

    assert (code, err) == (0, "")
    assert "prompt\n  Hi\n" in out
    assert "answer      42\n" in out
    assert "teacher 777777777777\n" in out
    rows = table(out, "# token")
    assert [cells[:2] for cells in rows] == [[str(t), c] for t, c in enumerate(text(one))]
    for t, cells in enumerate(rows):
        said = [float(cell) for cell in (*cells[2:5], cells[6])]
        p, q = one.p_TV[t, one.ids[t]], one.q_TV[t, one.ids[t]]
        assert said == pytest.approx([p, q, q - p, dense.entropy(one.q_TV)[t]], abs=0.04)


def test_the_n_th_row_of_a_round_counts_over_its_shards(inspect: Inspect, made: Path) -> None:
    assert f"row         {names(made)[1]}:1, of round 0\n" in inspect("--round", 0, "--row", 5)[1]


def test_a_row_of_a_key_is_the_shard_s(inspect: Inspect, made: Path) -> None:
    key = names(made)[1]

    _, out, err = inspect("--cache", made / "cache", "--row", 2, of=key)

    assert f"row         {key}:2, of {key}\n" in out
    assert "its text" not in out  # nothing was stored as it
    assert "--tokenizer" in err
    assert [cells[1] for cells in table(out, "# token")] == [f"<{id}>" for id in SHARDS[1][2].ids]


def test_a_tokenizer_gives_a_key_its_texts(inspect: Inspect, made: Path) -> None:
    arguments = ("--cache", made / "cache", "--row", 2, "--tokenizer")

    _, out, err = inspect(*arguments, made / "student", of=names(made)[1])
    same = inspect(*arguments, made / "student" / "tokenizer.json", of=names(made)[1])

    assert [cells[1] for cells in table(out, "# token")] == list(text(SHARDS[1][2]))
    assert "another vocabulary" in err  # the shards say that theirs is "v"
    assert same == (0, out, err)


def test_both_models_entries_stand_side_by_side(inspect: Inspect, made: Path) -> None:
    name, one = next(every(made))

    _, out, _ = inspect("--row", name, "--at", 1, "-k", 4)

    lines = [line for line in out.splitlines() if re.match(r"[1-4] ", line)]
    ours, theirs = (one.largest(v, 4)[1].tolist() for v in (one.p_TV, one.q_TV))
    assert len(lines) == 4
    for rank, line in enumerate(lines):
        left, right = re.split(r" {3,}(?=[1-4] )", line)
        for half, ids, first, second in (
            (left, ours, one.p_TV[1], one.q_TV[1]),
            (right, theirs, one.q_TV[1], one.p_TV[1]),
        ):
            cells = half.split()
            assert cells[0] == str(rank + 1)
            assert ("*" in cells[1:-3]) == (ids[rank] in set(ours) & set(theirs))
            assert float(cells[-2]) == pytest.approx(first[ids[rank]], abs=0.04)
            if cells[-1] != "-":
                assert float(cells[-1]) == pytest.approx(second[ids[rank]], abs=0.04)
    tails = [1 - float(np.exp(v[1][i]).sum()) for v, i in ((one.p_TV, ours), (one.q_TV, theirs))]
    said = [float(value) for value in re.findall(r"mass of all others: (\S+)", out)]
    assert said == pytest.approx(tails, abs=0.01)


def test_json_is_the_record(inspect: Inspect, made: Path) -> None:
    name, one = list(every(made))[2]

    row = Row.model_validate_json(inspect("--row", name, "--json")[1])

    assert [token.id for token in row.tokens] == one.ids
    assert row.reward == pytest.approx(mean_advantage(one), abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--row", "9"], "row 9 of which round?.*round 0, round 1.*--round"),
        (["--row", "9", "--round", "0"], r"no row 9 \(expected 0 to 6\)"),
        (["--row", "{}:4"], r"no row \w+:4 \(expected 0 to 3\)"),
        (["--row", "ffffffffffff:0"], "0 shards start with ffffffffffff"),
        (["--row", "last"], "'last' names no row.*SHARD:ROW"),
        (["--row", "{}:0", "--at", "3"], r"no token 3 \(expected 0 to 2\)"),
        (["--prompt", "promt-1"], "no completion is of a prompt 'promt-1'; near.*'prompt-1'"),
        (["--prompt", "prompt-"], "no completion is of a prompt 'prompt-'; near"),
        (["--prompt", "prompt-1", "--at", "0"], "--at is of one completion"),
        (["--at", "0"], "--at is of one completion"),
        (["--row", "0", "--worst", "advantage"], "one of --row, --prompt and --worst"),
        (["--reference", "base"], "no scores of a reference 'base'"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    inspect: Inspect, made: Path, arguments: list[str], words: str
) -> None:
    code, out, err = inspect(*(a.format(names(made)[0]) for a in arguments))

    assert (code, out) == (2, "")
    assert re.search(words, err.splitlines()[-1])


def test_several_teachers_of_a_key_are_asked_to_be_told_apart(
    inspect: Inspect, tmp_path: Path
) -> None:
    cache, some = Cache(str(tmp_path / "cache")), completions(0, 2)
    rollout = dense.commit(cache, some)
    sets = [
        dense.score(cache, rollout, some, "sampled", teacher=teacher).key
        for teacher in (TEACHER, "8" * 64)
    ]

    code, _, err = inspect("--cache", tmp_path / "cache", of=rollout.key)

    assert code == 2
    assert "2 teachers scored" in err
    for key in sets:
        assert key[:12] in err
        assert inspect("--cache", tmp_path / "cache", "--row", 0, of=key)[0] == 0


def test_a_search_by_what_is_not_stored_says_so(inspect: Inspect, tmp_path: Path) -> None:
    cache, some = Cache(str(tmp_path / "cache")), completions(0, 2)
    rollout = dense.commit(cache, some)
    dense.score(cache, rollout, some, "entropy")
    arguments = ("--cache", tmp_path / "cache")

    for measure in ("advantage", "disagreement"):
        code, _, err = inspect(*arguments, "--worst", measure, of=rollout.key)
        assert (code, len(err.splitlines())) == (2, 1)
        assert f"nothing that is stored tells the {measure}" in err
    assert [cells[2] for cells in table(inspect(*arguments, of=rollout.key)[1], "row tokens")] == [
        "-",
        "-",
    ]


def hostile(tmp_path: Path) -> str:
    """A cache with a shard whose texts are made to take a terminal over; its key."""
    cache = Cache(str(tmp_path / "cache"))
    raw = ESCAPES.encode()
    some = [
        completion(
            f"id{ESCAPES}",
            list(raw),
            0,
            text=ESCAPES,
            answer=ESCAPES,
            prompt=tuple(raw),
            masked=(0, 1),
        ),
        completion("[/INST][red]:smile:", list(b"[/INST][red]:smile:"), 1),
    ]
    rollout = dense.commit(cache, some)
    dense.score(cache, rollout, some, *EVERY)
    dense.byte_tokenizer(tmp_path)
    return rollout.key


def is_safe(out: str) -> bool:
    """Whether a terminal shows it, and acts on nothing but line ends."""
    return all(character == "\n" or character.isprintable() for character in out)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--row", "0"],
        ["--row", "0", "--at", "0"],
        ["--worst", "advantage"],
        ["--json"],
        ["--row", "0", "--json"],
        ["--prompt", "none"],
    ],
)
@pytest.mark.parametrize("with_texts", [True, False])
def test_nothing_that_is_stored_reaches_the_terminal_as_a_command(
    inspect: Inspect, tmp_path: Path, arguments: list[str], with_texts: bool
) -> None:
    key = hostile(tmp_path)
    texts = ["--tokenizer", str(tmp_path)] if with_texts else []

    _, out, err = inspect("--cache", tmp_path / "cache", *arguments, *texts, of=key)

    assert is_safe(out)
    assert is_safe(err)
    if with_texts:
        assert "\\x1b" in out + err or "\\u001b" in out + err


def test_texts_are_shown_as_they_are_where_they_look_like_markup(
    inspect: Inspect, tmp_path: Path
) -> None:
    key = hostile(tmp_path)

    _, out, _ = inspect("--cache", tmp_path / "cache", "--row", 1, "--tokenizer", tmp_path, of=key)

    shown = re.sub(r"⟦(.)\|[-+.0-9]+⟧", r"\1", out)
    assert "\n  [/INST][red]:smile:\n" in shown
    assert "completion  [/INST][red]:smile:/1\n" in shown


def test_tables_show_what_looks_like_markup_as_it_is() -> None:
    table = Table("token")
    table.add_row("[/INST] :smile:")

    assert "[/INST] :smile:" in as_text(table)


def test_without_colours_far_and_masked_tokens_are_marked(inspect: Inspect, tmp_path: Path) -> None:
    cache = Cache(str(tmp_path / "cache"))
    one = completion("a", list(b"a b\nc"), 5, masked=(2,))
    rollout = dense.commit(cache, [one])
    dense.score(cache, rollout, [one], "sampled")
    dense.byte_tokenizer(tmp_path)

    _, out, _ = inspect(
        "--cache", tmp_path / "cache", "--row", 0, "--tokenizer", tmp_path, of=rollout.key
    )

    far = [abs(one.advantage(t)) >= 1 for t in range(5)]
    assert True in far
    assert False in far
    expected = ""
    for t, shown in enumerate(["a", "␣", "b", "↵", "c"]):
        plain = " " if shown == "␣" else shown
        marked = f"⟦{shown}|{one.advantage(t):+.1f}⟧" if far[t] else plain
        expected += "⟨b⟩" if t == 2 else marked
        expected += "\n  " if shown == "↵" else ""
    assert f"completion\n  {expected}\n" in out
    assert [cells[2] for cells in table(out, "# token")].count("masked") == 1


@pytest.mark.parametrize("arguments", [["--row", "{}:3"], ["--row", "{}:3", "--at", "2"], []])
def test_colours_add_nothing_but_colours(
    inspect: Inspect, made: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    arguments = [a.format(names(made)[0]) for a in arguments]
    without = inspect(*arguments)[1]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("COLUMNS", "150")

    colours = inspect(*arguments)[1]

    assert "\x1b[" in colours
    seen = re.sub(r"\x1b\[[0-9;]*m", "", colours)
    assert is_safe(seen)
    bare = re.sub(r"⟦(.)\|[-+.0-9]+⟧", r"\1", without)
    key = re.compile(r"^  (advantage, nats: .*|⟦token.*)$", flags=re.MULTILINE)
    assert key.sub("", seen) == key.sub("", bare)


def test_with_colours_masked_tokens_are_struck_through(
    inspect: Inspect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(str(tmp_path / "cache"))
    one = completion("a", list(b"abc"), 5, masked=(1,))
    rollout = dense.commit(cache, [one])
    dense.score(cache, rollout, [one], "sampled")
    dense.byte_tokenizer(tmp_path)
    monkeypatch.setenv("FORCE_COLOR", "1")

    arguments = ("--cache", tmp_path / "cache", "--row", 0, "--tokenizer", tmp_path)
    _, out, _ = inspect(*arguments, of=rollout.key)

    struck = re.findall(r"\x1b\[2;9m([^\x1b]*)", out)
    assert [text.strip() for text in struck] == ["b", "masked", "b"]


def test_no_color_leaves_no_colour_and_marks_instead(
    inspect: Inspect, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")

    out = inspect("--row", f"{names(made)[0]}:3")[1]

    assert set(re.findall(r"\x1b\[([0-9;]*)m", out)) == {"0", "1"}  # bold headings
    assert "⟦" in out


@pytest.mark.parametrize("system", ["standard", "256", "truecolor"])
def test_every_step_of_the_scale_is_told_apart(system: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=system)  # type: ignore[arg-type]
    scale = screen.Scale(console)
    seen = []
    for advantage in (-9.0, -2.0, -0.5, 0.0, 0.5, 2.0, 9.0):
        with console.capture() as capture:
            console.print("x", style=scale.style(advantage), end="")
        seen.append(capture.get())

    assert len(set(seen)) == 7


@pytest.mark.parametrize("width", [40, 60, 80])
@pytest.mark.parametrize("arguments", [["--row", "{}:3"], ["--row", "{}:3", "--at", "2"], []])
def test_a_narrow_terminal_gets_whole_columns_and_is_told_which_are_left_out(
    inspect: Inspect, made: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], width: int
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))

    out = inspect(*(a.format(names(made)[0]) for a in arguments))[1]

    out = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert max(map(cell_len, out.splitlines())) <= width
    if "--at" in arguments:
        assert out.count("log q") == 3  # in each table, and in the line above them
    else:
        assert ("too narrow for: " in out) == (width < 80 or not arguments)
    assert "…" not in out.replace("… ", "").replace(" …", "")


def test_a_pipe_gets_every_column_of_any_length(inspect: Inspect, tmp_path: Path) -> None:
    cache = Cache(str(tmp_path / "cache"))
    one = completion("p" * 300, list(b"abc"), 5)
    rollout = dense.commit(cache, [one])
    dense.score(cache, rollout, [one], *EVERY)

    _, out, _ = inspect("--cache", tmp_path / "cache", of=rollout.key)

    assert f"{'p' * 300}/0\n" in out
    assert "too narrow" not in out


def test_a_closed_pipe_is_no_error(made: Path) -> None:
    import subprocess

    command = f"{sys.executable} -m opdcache.cli.main inspect {made}/run.yaml --round 0 --row 0"
    done = subprocess.run(
        ["bash", "-c", f"{command} --json | head -1"], capture_output=True, text=True
    )

    assert (done.stdout, done.stderr) == ("{\n", "")


def test_no_engine_is_needed(made: Path) -> None:
    done = opdcache("inspect", str(made / "run.yaml"), "--round", "0", "--row", "1")

    assert (done.returncode, done.stderr) == (0, "")
    assert [cells[1] for cells in table(done.stdout, "# token")] == list(text(SHARDS[0][1]))


def test_without_the_package_that_reads_tokenizers_a_run_shows_ids_and_says_why(
    inspect: Inspect, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)

    code, out, err = inspect("--round", 0, "--row", 1)
    refused = inspect("--tokenizer", made / "student")

    assert code == 0
    assert [cells[1] for cells in table(out, "# token")] == [f"<{id}>" for id in SHARDS[0][1].ids]
    assert "pip install tokenizers" in err
    assert (refused[0], refused[1]) == (2, "")
    assert refused[2].startswith("error: texts of tokens need the package tokenizers")


def test_json_is_read_back_the_same_where_texts_are_hostile(
    inspect: Inspect, tmp_path: Path
) -> None:
    key = hostile(tmp_path)

    _, out, _ = inspect("--cache", tmp_path / "cache", "--row", 0, "--json", of=key)

    assert json.loads(out)["text"] == ESCAPES
