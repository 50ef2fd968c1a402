"""The HTML report: what stands in it, that nothing in it acts, and what a browser shows of it."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cropi
from cropi.data.records import PromptGroup
from cropi.errors import CropiError
from cropi.options import Influence, Selecting
from cropi.ranking.pairwise import Neighbour, Pairwise
from cropi.ranking.resampling import uncertainty
from cropi.ranking.scores import Scores
from cropi.ranking.selection import select
from cropi.report.browser import shown_in_full
from cropi.report.charts import BOTTOM, HEIGHT, LEFT, WIDTH, density
from cropi.report.html import ReportInput, render, write_report
from cropi.report.policy import is_close, policy_text
from cropi.report.snippets import Snippets, snippet
from cropi.store.rows import RowInfo

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
EVIL = '<script>document.title="taken"</script><img src=x onerror=alert(1)> \x1b[31mred\x00 \u202eright to left 😀'


def make_input(prompts: int = 60, sets: int = 2, **changes: Any) -> ReportInput:
    rng = np.random.default_rng(0)
    common = rng.normal(size=16)
    train = rng.normal(size=(prompts, 16)) + 0.6 * common
    valid = rng.normal(size=(12 * sets, 16)) + common
    rows = [
        RowInfo(
            f"p{i:05d}", task=f"task{i % 3}", pass_rate=(i % 5) / 4, tokens=10 + i % 90,
            norm=float(np.linalg.norm(train[i])), extra={"ratio": 1.0 + 0.01 * (i % 7), "ess": 0.97, "clipped": 0.0},
        )
        for i in range(prompts)
    ]  # fmt: skip
    rows[1] = RowInfo("p00001", "skipped", "equal rewards", task="task1", pass_rate=1.0)
    rows[2] = RowInfo("p00002", "failed", "NaN or infinity in its gradient", task="task2", pass_rate=0.5)
    train[1:3] = np.nan
    names = [f"set{i // 12}" for i in range(len(valid))]
    columns = [RowInfo(f"v{i:02d}", set=name) for i, name in enumerate(names)]
    pairs = Pairwise(rows, columns, train @ valid.T, np.linalg.norm(train, axis=1), valid @ valid.T)
    means = np.stack([valid[pairs.members(name)].mean(axis=0) for name in pairs.sets])
    scores = Scores(
        rows,
        pairs.sets,
        train @ means.T / pairs.norms[:, None] / np.linalg.norm(means, axis=1),
        {"metric": "cosine", "train": {"stage": "0", "model": {"weights": "ab" * 16}}},
    )
    groups = [
        PromptGroup(
            row.id, f"What is {i} + {i}? {EVIL if i == 5 else ''}", [str(2 * i), "no " + EVIL], [1.0, 0.0]
        )
        for i, row in enumerate(rows)
    ]
    given = ReportInput(
        scores,
        select(scores, fraction=0.2),
        groups,
        uncertainty=uncertainty(pairs, Influence(draws=20), Selecting(fraction=0.2)),
        neighbours={"v00": ([Neighbour("p00005", 0.5)], [Neighbour("p00007", -0.25)])},
        validation_texts={"v00": "A <b>validation</b> prompt"},
        run=[("command", "cropi run --config <x>"), ("time", "12 s")],
        command="cropi run --config out/config.toml",
    )
    for name, value in changes.items():
        setattr(given, name, value)
    return given


def data_of(page: str) -> dict[str, Any]:
    packed = re.search(r'<script type="text/plain" id="data">(.*?)</script>', page, re.DOTALL)
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))  # type: ignore[no-any-return]


def test_a_choice_made_in_python_has_the_same_page(tmp_path: Path) -> None:
    given = make_input(uncertainty=None, check=None)
    records = list(given.groups)
    near = {"v00": ([Neighbour("p00007", 0.5)], [Neighbour("p00009", -0.5)])}
    cropi.write_report(given.selection, tmp_path / "a.html", records, neighbours=near)
    page = (tmp_path / "a.html").read_text("utf-8")
    assert data_of(page) == data_of(render(given)) and "p00007" in page.split('id="neighbours"')[1]
    cropi.write_report(given.selection, tmp_path / "b.html")
    details = data_of((tmp_path / "b.html").read_text("utf-8"))["details"].values()
    assert not any(one["responses"] for one in details), "no records, no texts"


def test_numbers_of_the_page_are_those_of_the_selection() -> None:
    given = make_input()
    page = render(given)
    data, scores, chosen = data_of(page), given.scores, given.selection.chosen
    columns = data["columns"]
    assert [columns["id"][i] for i in np.argsort([r or 10**9 for r in columns["rank"]])[: len(chosen)]] == [
        scores.rows[i].id for i in chosen
    ]
    usable = np.flatnonzero(scores.usable)
    for v in range(2):
        np.testing.assert_allclose(
            [columns[f"score{v}"][i] for i in usable], scores.table[usable, v], rtol=1e-4, atol=1e-9
        )
    assert columns["score0"][1] is None and data["statuses"][columns["status"][2]].startswith("failed: NaN")
    assert given.uncertainty is not None
    assert columns["p"][chosen[0]] == pytest.approx(given.uncertainty.p_selected[chosen[0]], rel=1e-4)
    text = html.unescape(re.sub(r"<[^>]+>", "", page.split("</style>")[1]))
    assert (
        f"{len(chosen)} of {len(usable)} prompts with a gradient chosen (60 read)" in text
        and "by fused ranks (rrf)" in text
    )
    assert f"{given.uncertainty.overlap:.0%} of the chosen prompts would stay" in text
    assert "<bdi>standard error" in page, "advice, without the name that its row begins with"
    assert "ratio 1.03" in text and "1 failed" in text and "not measured on this model" in text
    ratios = page.split("mean ratio of a prompt")[1].split("</svg>")[0]
    for kind, rows in (("pool", usable.tolist()), ("chosen", chosen)):
        # Each of the seven ratios that occur falls into a bin of its own.
        assert ratios.count(f'class="{kind}"') == len({scores.rows[i].extra["ratio"] for i in rows})
    detail = data["details"][scores.rows[chosen[0]].id]
    assert [r["reward"] for r in detail["responses"]] == [1.0, 0.0]
    assert detail["responses"][0]["advantage"] == pytest.approx(0.7071, abs=1e-3)


def test_labels_of_an_axis_differ() -> None:
    """Of ratios that are 1 but for rounding each label was "1", and the rounding looked like a distribution."""
    ratios = np.array([0.99999, 1.0, 1.00001])
    svg = density(ratios, ratios)
    assert len(set(re.findall(r"<text[^>]*>([^<]*)", svg))) == 3 and svg.count('class="pool"') <= 2
    assert re.findall(r"<text[^>]*>([^<]*)", density(ratios / 2, ratios / 2, ends=(0.0, 1.0))) == [
        "0",
        "0.5",
        "1",
    ]


@pytest.mark.parametrize(
    ("ratio", "ess", "words"),
    [
        (1.0, 0.9, "this policy's or close"),
        (1.0, 0.3, "few of their tokens carry"),
        (3.0, 0.9, "are far from 1"),
    ],
)
def test_the_words_on_the_policy_agree_with_their_level(ratio: float, ess: float, words: str) -> None:
    assert words in policy_text(ratio, ess) and is_close(ratio, ess) == ("close" in words)


def test_a_ratio_that_was_taken_for_1_says_nothing_of_the_policy() -> None:
    for said in ({"estimator": {"ratio": False}}, {"behaviour": {"source": "current"}}):
        given = make_input()
        given.scores.meta["train"].update(
            {"estimator": {"ratio": True}, "behaviour": {"source": "file"}} | said
        )
        page = render(given)
        assert page.count("ratio 1 is taken: no log-probs of the policy") == 2
        assert "this policy&#39;s or close" not in page and "mean ratio of a prompt" not in page
    given.scores.meta["train"].update({"estimator": {"ratio": True}, "behaviour": {"source": "file"}})
    assert render(given).count("this policy&#39;s or close") == 2


def test_text_of_users_is_never_markup() -> None:
    evil = make_input()
    evil.validation_texts = {"v00": EVIL}
    evil.run = [("note", EVIL)]
    evil.command = EVIL
    object.__setattr__(evil.scores, "sets", ["<b>bold</b>", "plain"])
    assert evil.uncertainty is not None
    evil.uncertainty.sets[0] = replace(evil.uncertainty.sets[0], name="grade`4", signal=0.1)
    evil.uncertainty.overlap_of_set["grade`4"] = 0.5
    page = render(evil)
    assert page.count("grade`4: 12 prompts") == 1 and "<bdi>grade`4</bdi>" in page and "<code>4" not in page
    assert page.count("<script") == 2 and "<img" not in page and "<b>bold" not in page
    body = page.split("</style>")[1].split('<script type="text/plain"')[0]
    assert "\x00" not in page and "\x1b" not in data_of(page)["details"]["p00005"]["text"]
    assert "onerror" in body and "&lt;img" in body, "it is shown, as text"
    assert "https://" not in page and "http://" not in page and "default-src 'none'" in page


@pytest.mark.long
def test_a_large_page_stays_small(tmp_path: Path) -> None:
    given = make_input(20000, sets=4)
    write_report(tmp_path / "r.html", given)
    assert (tmp_path / "r.html").stat().st_size < 3_000_000
    data = data_of((tmp_path / "r.html").read_text("utf-8"))
    assert len(data["columns"]["id"]) == 20000 and 200 < len(data["details"]) < 700


def test_a_table_too_large_for_a_browser_lists_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of a million prompts would have 80 MB: beyond a size its table lists the prompts in equal steps."""
    given = make_input(2000)
    given.groups = []
    monkeypatch.setattr("cropi.report.browser.MOST_VALUES", 900 * (12 + 2 * 2))
    page = render(given)
    columns, order = data_of(page)["columns"], given.selection.order
    full = {given.scores.rows[i].id for i in shown_in_full(given.scores, given.selection)}
    near = {one.id for pair in given.neighbours.values() for side in pair for one in side}
    assert near and full | near <= set(columns["id"]) and len(full) < len(columns["id"]) <= 900
    assert f"lists {len(columns['id'])} of 2000 prompts" in page and "2000 read" in page
    ranks = np.array(sorted(rank for rank in columns["rank"] if rank is not None))
    assert (
        ranks[0] == 1
        and ranks[-1] == len(order)
        and np.diff(ranks).max() <= 2000 / (900 - len(full | near)) + 1
    )
    for name, rank, score in zip(columns["id"], columns["rank"], columns["score1"]):
        row = int(name[1:])
        assert rank is None or (
            order[rank - 1] == row and score == pytest.approx(given.scores.table[row, 1], rel=1e-4)
        )
    monkeypatch.setattr("cropi.report.browser.MOST_VALUES", 2000 * (12 + 2 * 2))
    page = render(given)
    assert len(data_of(page)["columns"]["id"]) == 2000 and "of 2000 prompts:" not in page


def test_the_table_shows_what_is_asked_not_what_stands_before_it() -> None:
    given = make_input()
    before = [
        {"role": "user", "content": "Is 6 even or odd?"},
        {"role": "assistant", "content": "Even. " * 20},
    ]
    ids = given.selection.ids[:2]
    given.groups = [
        PromptGroup(name, [*before, {"role": "user", "content": f"Is {i} even?"}], ["a", "b"], [1.0, 0.0])
        for i, name in enumerate(ids)
    ]
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    given.groups[1] = replace(given.groups[1], prompt=[{"role": "user", "content": "Call f"}, call])
    columns = data_of(render(given))["columns"]
    text = dict(zip(columns["id"], columns["text"]))
    assert [text[name] for name in ids] == ["Is 0 even?", "[user] Call f [assistant]"]


def test_the_table_shows_the_question_behind_an_example_that_all_prompts_begin_with() -> None:
    """It showed the example's beginning, the same in every row."""
    given, example = make_input(), "Answer as here.\n\nQ: how many legs have two dogs and a bird?\nA: 10\n\n"
    texts = [f"{example}Q: what is {i} + {i}?\nA:" for i in range(len(given.selection.ids))]
    given.groups = [
        PromptGroup(name, text, ["a", "b"], [1.0, 0.0])
        for name, text in zip(given.selection.ids, texts, strict=True)
    ]
    given.validation_texts = dict(zip(given.neighbours, texts))
    page = render(given)
    columns = data_of(page)["columns"]
    shown = dict(zip(columns["id"], columns["text"]))
    assert [shown[name] for name in given.selection.ids[:2]] == ["…what is 0 + 0? A:", "…what is 1 + 1? A:"]
    # Alike, short, without a blank (it lost its first letter), or one that ends where the others go on: whole.
    for some, lines in (
        ([example, example], [" ".join(example.split())] * 2),
        (["Is 1 even?", "Is 2 even?"], ["Is 1 even?", "Is 2 even?"]),
        ([texts[0], texts[0] + " 0"], [snippet(" ".join(texts[0].split()))] * 2),
        ([example + "b" * 99, example + "c"], ["…10 " + "b" * 65 + "…", "…10 c"]),
        (["x" * 35 + "1", "x" * 35 + "2"], ["x" * 35 + "1", "x" * 35 + "2"]),
    ):
        made = Snippets()
        for i, text in enumerate(some):
            made.add(str(i), None, text)
        assert list(made.lines().values()) == lines


def test_texts_have_room_beside_a_table_that_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    given, text = make_input(1000), 1000 * "word "
    given.groups = [PromptGroup(given.selection.ids[0], text, ["a", "b"], [1.0, 0.0])]
    monkeypatch.setattr("cropi.report.browser.MOST_BYTES", 5000)
    data = data_of(render(given))
    assert len(gzip.compress(json.dumps(data["columns"]).encode())) > 5000
    assert data["details"][given.selection.ids[0]]["text"] == text


def test_long_texts_are_begun_and_the_page_stays_small() -> None:
    """100,000 characters a text, which compress badly, or well: the page has as much of each as there is room for."""
    given, rng = make_input(), np.random.default_rng(0)
    for kind in ("random letters", "one word"):
        text = (
            "".join(map(chr, rng.integers(0x4E00, 0x9F00, 100_000)))
            if kind == "random letters"
            else 12_500 * "response"
        )
        given.groups = [PromptGroup(row.id, text, [text] * 8, [1.0] + 7 * [0.0]) for row in given.scores.rows]
        page = render(given)
        assert len(page.encode()) < 3_000_000, kind
        detail = data_of(page)["details"]["p00005"]
        assert detail["size"] == detail["responses"][7]["size"] == 100_000
        assert text.startswith(detail["text"]) and 200 <= len(detail["text"]) <= 6000
        assert kind == "random letters" or len(detail["text"]) == 6000


def test_what_is_missing_is_said() -> None:
    given = make_input(uncertainty=None, groups=(), neighbours={}, unfinished="train holds 3 of 60 prompts")
    page = render(given)
    assert "not finished" in page and "train holds 3 of 60 prompts" in page
    assert "Not known: the stores of sketches are not beside the scores" in page
    assert data_of(page)["nodetail"] == "(the trajectory files were not given)"
    rows = [RowInfo("a", "skipped", "equal rewards")]
    nothing = ReportInput(Scores(rows, ["x"], np.full((1, 1), np.nan), {}), given.selection)
    with pytest.raises(CropiError, match="nothing to report"):
        write_report("never.html", nothing)


def test_one_prompt_and_one_set() -> None:
    rows = [RowInfo("only", norm=1.0)]
    scores = Scores(rows, ["x"], np.array([[0.5]]), {})
    page = render(ReportInput(scores, select(scores, fraction=1.0)))
    assert "1 of 1 prompts with a gradient chosen" in page


@pytest.mark.parametrize("values", [[], [np.nan], [0.25], [0.0, 1.0, 1.0, 0.5]])
def test_densities_of_few_values(values: list[float]) -> None:
    svg = density(np.array(values), np.array(values[:1]), cut=0.5, noise=0.1)
    assert svg.startswith("<svg") and svg.endswith("</svg>") and "nan" not in svg


# ---------------------------------------------------------------------------------------------- in a browser
PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const rows = () => [...document.querySelectorAll("#rows tr")].map((row) => row.dataset.id);
  const out = {chosen: rows(), count: document.getElementById("count").textContent};
  document.querySelector('[data-tab="failed"]').click();
  out.failed = rows();
  const under = () => [...document.querySelectorAll("#rows .under")].map((line) => line.textContent);
  out.reasons = under();
  document.querySelector('[data-tab="all"]').click();
  const search = document.getElementById("search");
  search.value = "p00005"; search.dispatchEvent(new Event("input"));
  out.found = rows();
  out.text = under();
  document.querySelector("#rows tr").dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
  out.detail = document.getElementById("detail").textContent;
  out.images = document.images.length; out.title = document.title;
  search.value = ""; search.dispatchEvent(new Event("input"));
  document.querySelectorAll("#head button")[3].click();
  out.sorted = rows().slice(0, 5);
  out.wide = document.documentElement.scrollWidth <= innerWidth;
  out.cut = [...document.querySelectorAll(".tiles .scroll")].filter((box) => box.scrollWidth > box.clientWidth).length;
  document.body.replaceChildren(document.createTextNode("PROBE" + JSON.stringify(out) + "END"));
}, 300));
</script>
"""


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium (Debian: apt-get install chromium)")


def browse(folder: Path, page: str, *flags: str) -> str:
    """What the browser makes of a page: the document after its scripts have run."""
    path = folder / "r.html"
    path.write_text(page, encoding="utf-8")
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}/profile",
    ]
    command += ["--window-size=1200,900", "--virtual-time-budget=5000", *flags, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_the_numbers(tmp_path: Path) -> None:
    given = make_input()
    given.scores.rows[7] = replace(given.scores.rows[7], task="a/long/name/of/a/task" * 5)
    found = browse(
        tmp_path, render(given).replace("</body>", PROBE + "</body>"), "--window-size=500,900", "--dump-dom"
    )
    shown = re.search("PROBE(.*)END", found, re.DOTALL)
    assert shown, found[-2000:]
    seen = json.loads(html.unescape(shown[1]))
    scores, chosen = given.scores, given.selection.chosen
    assert seen["chosen"] == [scores.rows[i].id for i in chosen]
    assert seen["count"] == f"1 to {len(chosen)} of {len(chosen)} prompts"
    assert seen["failed"] == ["p00001", "p00002"] and seen["found"] == ["p00005"]
    assert "What is 5 + 5?" in seen["text"][0] and all(seen["reasons"]) and len(seen["reasons"]) == 2
    assert "What is 5 + 5?" in seen["detail"] and '<script>document.title="taken"' in seen["detail"]
    assert "reward 1" in seen["detail"] and seen["images"] == 0 and seen["title"] == "Selection report"
    best = sorted(np.flatnonzero(scores.usable), key=lambda i: -scores.table[i, 0])[:5]
    assert seen["sorted"] == [scores.rows[i].id for i in best] and seen["wide"]
    assert seen["cut"] == 0, "figures of a small table that a long name moved out of it"


PLACES = """
<script>
addEventListener("load", () => {
  const chart = document.querySelector("#sets ~ .tiles svg"), box = chart.getBoundingClientRect();
  const colour = (element, key) => getComputedStyle(element)[key].match(/[0-9.]+/g).slice(0, 3).map(Number);
  document.documentElement.dataset.probe = JSON.stringify({box: [box.x, box.y, box.width, box.height],
    chosen: colour(chart.querySelector("rect.chosen"), "fill"), page: colour(document.body, "backgroundColor")});
});
</script>
"""


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_screenshot_shows_the_numbers(tmp_path: Path, scheme: str) -> None:
    """The bars of the chosen prompts are as high, in pixels, as their share of the first set's scores says."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    given = make_input(2000)
    page = render(given).replace("</body>", PLACES + "</body>")
    flag = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    found = re.search('data-probe="(.*?)"', browse(tmp_path, page, flag, "--dump-dom"))
    assert found
    seen = json.loads(html.unescape(found[1]))
    browse(tmp_path, page, flag, f"--screenshot={tmp_path}/s.png")
    picture = 255 * pyplot.imread(tmp_path / "s.png")[:, :, :3]
    # Twice 8 bits of rounding.
    assert np.abs(picture[5, 5] - seen["page"]).max() <= 2 and (picture[5, 5].mean() > 128) == (
        scheme == "light"
    )
    left, top, width, height = seen["box"]
    scale = width / WIDTH
    assert height == pytest.approx(HEIGHT * scale, abs=1)
    pool, chosen = given.scores.table[given.scores.usable, 0], given.scores.table[given.selection.chosen, 0]
    edges = np.linspace(pool.min(), pool.max(), 41)
    shares = [np.histogram(values, edges)[0] / len(values) for values in (pool, chosen)]
    plot, step = HEIGHT - BOTTOM - 8, (WIDTH - 2 * LEFT) / 40
    area = picture[round(top) : round(top + height)]
    for i, share in enumerate(shares[1]):
        column = area[:, int(left + scale * (LEFT + (i + 0.5) * step))]
        high = int((np.abs(column - seen["chosen"]).max(axis=1) <= 4).sum())
        want = scale * max(share / max(map(np.max, shares)) * plot, 0.8) if share else 0.0
        # Its two ends are blended with what is behind them, and the dashed line of the cut may stand over one bar.
        assert abs(high - want) <= 2.5 or edges[i] <= np.sort(pool)[-len(chosen)] <= edges[i + 1], (
            i,
            high,
            want,
        )
