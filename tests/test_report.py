"""The report: what is in the file, and what a real browser makes of it."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from opdcache import documents
from opdcache.audit.report import report
from opdcache.audit.report.gather import Contents, gather
from opdcache.audit.report.page import page
from opdcache.audit.report.sets import MOST_LISTED, sets_of
from opdcache.audit.report.views import MOST_TOKENS, visible
from opdcache.audit.targets import of_run
from opdcache.cli.main import cli
from opdcache.errors import NotInstalled, UsageError
from opdcache.schemas.rounds import (
    AccuracyRound,
    EvaluationRound,
    PromptScores,
    ScoreRound,
    ServedColumns,
    TeacherAccuracy,
    TrainRound,
)
from opdcache.store.scores import Scores

from .audited import Made, add_own, add_round, make_run
from .dense import distributions, rows_of, scores_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).parent.parent
NUM_IDS = 60
HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    '"><b onmouseover=window.hacked=1>',
    "{{ 7 * 7 }}",
    "\n",
    "\x1b[31m",
    "\u202e",
    "&amp;",
)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer whose first ids are texts that would break a page."""
    from tokenizers import Tokenizer, decoders, models

    texts = [*HOSTILE, *(f" word{i}" for i in range(len(HOSTILE), NUM_IDS))]
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, texts[-1]))
    tokenizer.decoder = decoders.Fuse()
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def make_rounds(folder: Path, *lengths: int, num_rounds: int = 3) -> Made:
    """A trained run with a tokenizer, and texts that would break a page."""
    made = make_run(folder)
    write_tokenizer(folder / "models/student")
    for index in range(num_rounds):
        given = [distributions(*lengths, seed=9 * index + i, apart=2 - 0.5 * index) for i in (0, 1)]
        texts = tuple(HOSTILE[i % len(HOSTILE)] for i in range(len(lengths)))
        tables = [rows_of(one, 16, texts=texts, answers=texts) for one in given]
        add_round(made, index, given, tables=tables)
        made.folder.write(
            TrainRound(
                round=index,
                student="s",
                num_updates=4,
                num_samples=8,
                num_tokens=99,
                dropped={},
                elapsed_s=1.5,
            )
        )
        made.folder.write(evaluation(index))
    return made


def evaluation(index: int) -> EvaluationRound:
    return EvaluationRound(
        round=index,
        student="s",
        teachers=("t",),
        contents=("c",),
        reverse_kl=1 / (1 + index),
        overlap=0.5,
        entropy_gap=0.5,
        student_entropy=2,
        teacher_entropy=2,
        tokens=100,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_rounds(tmp_path_factory.mktemp("made"), 40, 9, 300, 1, 0)


@pytest.fixture(scope="module")
def report_file(made: Made) -> Path:
    file = made.path.with_suffix(".html")
    done = write_report(made, "-o", str(file))
    assert done.exit_code == 0, done.output
    return file


@pytest.fixture(scope="module")
def html(report_file: Path) -> str:
    return report_file.read_text()


def write_report(made: Made, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["report", str(made.path), *arguments])


class Parsed(HTMLParser):
    """Elements of a page with their attributes, and all text outside scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found[-1:] and self.found[-1][0] != "script":
            self.text += data


def test_the_file_refers_to_nothing_outside_itself(html: str) -> None:
    for tag, attributes in Parsed(html).found:
        for name in ("src", "srcset", "action", "data"):
            assert name not in attributes, (tag, attributes)
        href = attributes.get("href") or "#"
        assert href.startswith(("#", "data:,"))
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_texts_of_models_do_not_become_markup(html: str, made: Made) -> None:
    found = Parsed(html).found
    assert not any(tag in ("img", "b") or "onerror" in given for tag, given in found)
    # Of two charts and a view no script can end early: as many begin as the template has.
    figures = sum(tag == "figure" for tag, _ in found)
    views = sum(given.get("role") == "listbox" for _, given in found)
    assert figures == 12
    assert sum(tag == "script" for tag, _ in found) == figures + views + 2
    assert html.count("window.hacked=1</script>") == 0
    assert "{{ 7 * 7 }}" in html
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_what_cannot_be_seen_is_made_visible() -> None:
    assert visible("\n") == "↵\n"
    assert visible("\x1b[31m") == "\\u{1b}[31m"
    assert visible("a\u202eb") == "a\\u{202e}b"
    assert visible("") == "∅"
    assert visible(" é好") == " é好"


def test_every_link_leads_somewhere_in_the_file(html: str) -> None:
    found = Parsed(html).found
    ids = [given["id"] for _, given in found if "id" in given]
    assert len(set(ids)) == len(ids)
    links = {(given.get("href") or "#").removeprefix("#") for tag, given in found if tag == "a"}
    assert links
    assert links <= set(ids)


def test_every_section_is_there(html: str) -> None:
    titles = re.findall(r"<h2 [^>]*>(.*?)</h2>", html)
    assert titles == [
        *("Verdict", "Rounds over time", "By position", "Mass by k", "Completions"),
        *("Worst cases", "Token by token", "Provenance", "Cost"),
    ]


@pytest.fixture(scope="module")
def contents(made: Made) -> Contents:
    return contents_of(made)


def contents_of(made: Made, **options: Any) -> Contents:
    return gather(of_run(made.path), made.folder, **options)


def test_a_long_completion_is_shown_around_the_token_that_it_is_shown_for(
    contents: Contents,
) -> None:
    assert any(view.num_tokens > MOST_TOKENS and view.first for view in contents.views)
    for view in contents.views:
        assert len(view.tokens) == min(view.num_tokens, MOST_TOKENS)
        at_the_end = view.num_tokens - view.first == len(view.tokens)
        assert view.focus == MOST_TOKENS // 2 or view.first == 0 or at_the_end
        assert 0 <= view.focus < max(1, len(view.tokens))
        positions = [token.position for token in view.tokens]
        assert positions == list(range(view.first, view.first + len(view.tokens)))


def test_a_row_that_is_asked_for_is_shown_and_how_much_of_it(made: Made) -> None:
    contents = contents_of(made, num_worst=0, rows=[f"{first_key(made)}:2"])
    (view,) = contents.views
    assert (view.num_tokens, view.first, len(view.tokens)) == (300, 0, MOST_TOKENS)
    assert "300, of which 0 to 255 are shown" in page(contents)


def first_key(made: Made) -> str:
    return of_run(made.path).parts[0].shards[0].name


def test_every_worst_case_has_a_view_that_holds_its_token(contents: Contents) -> None:
    for measure in ("advantage", "disagreement"):
        for found, place in contents.worst.tokens(measure):
            held = [
                view.tokens[place.position - view.first]
                for view in contents.views
                if (view.key, view.row.row) == (found.shard.scored.rollouts.key, found.row)
                and view.first <= place.position < view.first + len(view.tokens)
            ]
            assert {token.position for token in held} == {place.position}
            if measure == "advantage":
                assert held[0].advantage == pytest.approx(place.value)


@pytest.mark.parametrize("row", ["nothing", "abc:x", ":3", "zzz:0"])
def test_a_row_that_is_none_is_refused(made: Made, row: str) -> None:
    with pytest.raises(UsageError):
        contents_of(made, rows=[row])


def test_a_row_past_the_shard_s_last_is_refused_with_how_many_there_are(made: Made) -> None:
    with pytest.raises(UsageError, match="0 to 4"):
        contents_of(made, rows=[f"{first_key(made)}:5"])


def test_a_folder_that_is_not_there_is_told_before_anything_is_read(made: Made) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        list(report(made.path, made.path.parent / "none/r.html", rows=["zzz:0"]))


def test_a_no_go_is_no_failure_of_the_report(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    apart = distributions(30, apart=40)
    add_round(made, 0, [apart])
    file = tmp_path / "r.html"
    done = write_report(made, "-o", str(file), "--rows", "1")
    assert done.exit_code == 0
    assert "✗ no-go" in file.read_text()


def test_a_run_that_stores_little_still_has_a_report(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    one = distributions(12)
    scores = scores_of(one.q, one, 16, 16)
    bare = Scores(one.offsets, sampled_logprobs=scores.sampled_logprobs)
    add_round(made, 0, [one], [bare])
    text = page(contents_of(made, num_worst=1))
    assert "Overlap and its masses" not in text
    assert "Advantage of the sampled tokens" in text


def test_rounds_can_be_chosen(made: Made, tmp_path: Path) -> None:
    file = tmp_path / "r.html"
    assert write_report(made, "-o", str(file), "--round", "1", "--rows", "1").exit_code == 0
    text = file.read_text()
    assert "round 1, " in text
    assert "round 0, " not in text


def test_charts_are_written_as_png(made: Made, tmp_path: Path) -> None:
    where = "-o", str(tmp_path / "r.html"), "--png", str(tmp_path / "p")
    done = write_report(made, *where, "--round", "0", "--rows", "0")
    assert done.exit_code == 0, done.output
    files = sorted((tmp_path / "p").iterdir())
    assert len(files) == 12
    assert all(file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for file in files)


@pytest.mark.parametrize("package", ["altair", "jinja2", "vl_convert"])
def test_without_its_packages_a_report_says_how_to_get_them(
    made: Made, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in [n for n in sys.modules if n.startswith("opdcache.audit.report.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NotInstalled, match=re.escape("pip install 'opdcache[report]'")):
        CliRunner().invoke(cli, ["report", str(made.path)], catch_exceptions=False)


def test_costs_and_provenance_are_those_of_the_manifests(made: Made) -> None:
    sets = sets_of(made.folder, of_run(made.path), range(3))
    found = of_run(made.path)
    shards = [shard for part in found.parts for shard in part.shards]
    manifests = [made.cache.need_rollouts(shard.scored.rollouts) for shard in shards]
    rollouts = [cost for cost in sets.costs if cost.stage == "rollout"]
    assert sum(cost.num_tokens for cost in rollouts) == sum(m.num_tokens for m in manifests)
    stored = sum(entry.size_bytes for m in manifests for entry in m.objects)
    assert sum(cost.size_bytes for cost in rollouts) == stored
    read = [cost.teacher_tokens for cost in sets.costs if cost.stage == "score"]
    told = sum(m.num_tokens + m.num_prompt_tokens for m in manifests)
    assert sum(num or 0 for num in read) == told
    assert [cost.wall_s for cost in sets.costs if cost.stage == "train"] == [1.5] * 3
    assert sets.num == len(sets.listed) == 2 * len(shards)


def accuracy(index: int | None, verifier: str, *scores: float) -> AccuracyRound | TeacherAccuracy:
    said: dict[str, Any] = {
        "verifier": verifier,
        "version": "1",
        "contents": (),
        "prompts": tuple(
            PromptScores(prompt_id=str(i), task="t", scores=(score,), num_truncated=0)
            for i, score in enumerate(scores)
        ),
    }
    if index is None:
        return TeacherAccuracy(teachers=("t",), **said)
    return AccuracyRound(round=index, student="s", **said)


def test_accuracies_are_those_that_the_run_file_asks_for(tmp_path: Path) -> None:
    asked = {"verifier": "math", "source": {"type": "jsonl", "path": "held-out.jsonl"}}
    told = dict[str, list[tuple[int | None, float]]]()
    for name, evaluation in (
        ("both", asked),
        ("students", asked | {"teacher": False}),
        ("another", asked | {"verifier": "module:function"}),
    ):
        made = make_run(tmp_path, name, evaluation=evaluation)
        add_round(made, 0, [distributions(4, seed=len(told))])
        for index, scores in ((0, (0.0, 1.0)), (1, (1.0, 1.0))):
            made.folder.write(accuracy(index, "math", *scores))
        teacher = made.folder.teacher_path / "accuracy.json"
        documents.create(teacher, accuracy(None, "math", 1.0, 0.0))
        found = contents_of(made).accuracies
        told[name] = [(one.round, one.mean_score.value) for one in found]
    students: list[tuple[int | None, float]] = [(0, 0.5), (1, 1.0)]
    assert told == {"both": [*students, (None, 0.5)], "students": students, "another": []}


def test_the_policy_s_own_scores_are_among_the_sets(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    given = [distributions(4)]
    add_round(made, 0, given)
    (own,) = add_own(made, 0, given)
    html = page(contents_of(made))
    assert "the student&#39;s own scores" in html
    assert own.key[:12] in html
    file = made.folder.need(ScoreRound, 0)
    shard = file.shards[0].model_copy(
        update={
            "teacher": own.identity.teacher,
            "served": (ServedColumns(key=own.key, columns=own.identity.columns),),
        }
    )
    named = file.model_copy(update={"references": {"self": (shard,)}})
    made.folder.write(named, anew=True)
    kinds = [group.kind for _, group, _ in contents_of(made).sets.listed]
    assert sorted(kinds) == ["reference scores", "rollouts", "scores"]


def test_very_many_sets_are_grouped_and_none_is_lost(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    num = MOST_LISTED // 2 + 1
    add_round(made, 0, [distributions(2, seed=i) for i in range(num)])
    contents = contents_of(made, num_worst=0)
    assert contents.sets.num == 2 * num
    by_kind = [(group.kind, counts.num) for group, counts in contents.sets.groups.items()]
    assert ("scores", num) in by_kind
    # Each of these shards is of a student of its own.
    assert by_kind.count(("rollouts", 1)) == num
    assert f"{2 * num} shard sets" in page(contents)
    assert "They are many" in page(contents)


def test_what_was_sent_to_a_served_teacher_is_told(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    add_round(made, 0, [distributions(5)])
    made.folder.sent_tokens_path.write_text("1000\n-10\n244\n")
    assert "1,234 tokens were sent" in page(contents_of(made))


# A real browser.

browser_test = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert path is not None, "no chromium here: 'make chromium' installs it, or set CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["1280", "390"])
def opened(
    request: pytest.FixtureRequest, chromium: "Browser", report_file: Path
) -> Iterator["Page"]:
    """The report in a browser without a network, all charts drawn; its complaints are failures."""
    width, height = request.param
    said, asked = list[str](), list[str]()
    context = chromium.new_context(viewport={"width": width, "height": height}, offline=True)
    page = context.new_page()
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda one: asked.append(one.url))
    page.goto(report_file.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    yield page
    context.close()
    assert said == []
    assert asked == [report_file.as_uri()]


@browser_test
def test_every_figure_is_drawn(opened: "Page") -> None:
    sizes = opened.eval_on_selector_all(
        "figure",
        """figures => figures.map(figure => {
          const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
          const marks = svg.querySelectorAll(".mark-line path, .mark-rect path, .mark-symbol path");
          return [figure.id, box.width, box.height, marks.length, figure.textContent.length];
        })""",
    )
    assert len(sizes) == 12
    for name, width, height, num_marks, _ in sizes:
        assert width > 250, name
        assert height > 80, name
        assert num_marks > 0, name


@browser_test
def test_nothing_is_wider_than_the_screen_and_no_text_is_tiny(opened: "Page") -> None:
    viewport = opened.viewport_size
    assert viewport is not None
    assert opened.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    smallest = opened.evaluate(
        """Math.min(...[...document.querySelectorAll("body *")]
          .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
          .filter(e => e.getClientRects().length)
          .map(e => parseFloat(getComputedStyle(e).fontSize)))"""
    )
    assert smallest >= 12


@browser_test
def test_the_keyboard_reaches_everything(opened: "Page") -> None:
    reached = []
    for _ in range(400):
        opened.keyboard.press("Tab")
        here = opened.evaluate(
            """(() => { const e = document.activeElement;
              return e === document.body ? null : [e.tagName, e.className, e.getAttribute("href")];
            })()"""
        )
        if here is None:
            break
        reached.append(here)
    count = opened.evaluate("s => document.querySelectorAll(s).length", ".tokens")
    assert sum("t " in name for tag, name, _ in reached if tag == "SPAN") == count > 0
    regions = opened.evaluate(
        "[...document.querySelectorAll('.scroll')].filter(e => e.checkVisibility()).length"
    )
    assert sum(name == "scroll" for _, name, _ in reached) == regions
    assert reached[0][2] == "#main"
    assert [href for _, _, href in reached].count("#worst") == 1


@browser_test
def test_arrow_keys_move_in_a_completion_and_the_panel_follows(opened: "Page") -> None:
    view = a_long_view(opened)
    panel, tokens = view.locator(".panel"), view.locator("[role=option]")
    tokens.first.click()
    said = panel.inner_text()
    assert said.startswith("token ")
    assert view.locator("[role=option][tabindex='0']").count() == 1
    for key, place in [("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("Home", 0)]:
        opened.keyboard.press(key)
        assert focused(view) == place
        assert panel.inner_text().startswith(f"token {first_position(view) + place}:")
    opened.evaluate("document.activeElement.scrollIntoView({block: 'center'})")
    before = opened.evaluate("scrollY")
    opened.keyboard.press("ArrowDown")
    below = focused(view)
    assert below > 1
    opened.wait_for_timeout(300)  # what a key does of itself is to scroll, softly
    assert opened.evaluate("scrollY") == before
    opened.keyboard.press("ArrowUp")
    assert focused(view) < below
    opened.keyboard.press("End")
    assert focused(view) == tokens.count() - 1
    assert "overlap" in panel.inner_text()


def a_long_view(opened: "Page") -> Any:
    return opened.locator("article", has=opened.locator("[role=option]:nth-child(100)")).first


def focused(view: Any) -> int:
    place = view.locator(".tokens").evaluate("e => [...e.children].indexOf(document.activeElement)")
    return int(place)


def first_position(view: Any) -> int:
    return int(view.locator(".packed").evaluate("e => JSON.parse(e.textContent)[0][0]"))


@browser_test
def test_pointing_at_a_token_shows_both_models_lists(opened: "Page") -> None:
    view = a_long_view(opened)
    view.locator("[role=option]").nth(3).hover()
    panel = view.locator(".panel")
    assert panel.inner_text().startswith(f"token {first_position(view) + 3}:")
    ranks = panel.locator("tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    for column in (2, 4):
        listed = [int(row[column]) for row in ranks if row[column] != "-"]
        assert sorted(listed) == list(range(1, 17))
    opened.mouse.move(0, 0)
    assert not panel.inner_text().startswith(f"token {first_position(view) + 3}:")


@browser_test
def test_no_text_of_a_model_runs(opened: "Page") -> None:
    for panel in opened.locator("article .tokens").all():
        for option in panel.locator("[role=option]").all()[:20]:
            option.dispatch_event("pointerover")
    assert opened.evaluate("window.hacked") is None
    assert opened.locator("img, .panel b").count() == 0


@browser_test
def test_the_charts_numbers_are_in_a_table(opened: "Page") -> None:
    figure = opened.locator("#held-out")
    figure.locator("summary").click()
    rows = figure.locator("tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    assert [float(row[2]) for row in rows] == pytest.approx([1, 0.5, 1 / 3], abs=1e-3)


@browser_test
def test_screenshots(opened: "Page") -> None:
    """For people to look at; CI keeps what is in build/report."""
    viewport = opened.viewport_size
    assert viewport is not None
    file = ROOT / "build/report" / f"{viewport['width']}.png"
    opened.screenshot(path=file, full_page=True)
    assert file.stat().st_size > 50_000


def test_distributions_have_the_hostile_texts(made: Made) -> None:
    """What the tests above are worth: hostile ids are among those sampled."""
    given = distributions(300, seed=0)
    assert set(range(len(HOSTILE))) <= set(np.unique(given.ids).tolist())
