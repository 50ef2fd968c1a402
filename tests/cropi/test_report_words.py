"""What the report page says in words and digits: what a figure is, what was drawn anew, and what options fixed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from test_report_page import data_of, make_input

from cropi.ranking.selection import select
from cropi.report.charts import density, line
from cropi.report.html import render


def test_a_score_has_the_digits_that_the_terminal_prints() -> None:
    """Five digits of 0.123449996 are 0.12345, of which a browser makes 0.1235."""
    given = make_input()
    table = given.scores.table.copy()
    table[3:6, 0] = 0.123449996, -0.1234499999, 0.00012344999
    given.scores = replace(given.scores, table=table)
    columns = data_of(render(given))["columns"]
    for v in range(2):
        for shown, value in zip(columns[f"score{v}"], table[:, v], strict=True):
            assert np.isnan(value) if shown is None else f"{shown:.4f}" == f"{value:.4f}"


def test_a_page_says_what_a_score_is() -> None:
    said = {
        "cosine": "A score is the cosine of a prompt&#39;s gradient with the set&#39;s mean gradient. Grey",
        "dot": "A score is the dot product of a prompt&#39;s gradient with the set&#39;s mean gradient. Grey",
    }
    given = make_input()
    for metric, words in said.items():
        given.scores.meta["metric"] = metric
        assert words in render(given)
    given.scores.meta["mean"] = "normalised"
    assert "with the mean direction of the set&#39;s gradients. Grey" in render(given)
    given.scores.meta.update(metric="cosine", mean="plain", minus="other", minus_weight=0.5)
    assert "mean gradient, less 0.5 times that with the set &#39;other&#39;. Grey" in render(given)
    given.scores.meta["weights"] = [1.0, 2.0]  # sums of several tables
    assert "A score is" not in render(given)


def test_a_page_says_what_was_drawn_anew() -> None:
    """With --noise the shares are those of other responses too, and more validation prompts alone do not mend them."""
    given = make_input()
    assert given.uncertainty is not None
    for signal, drawn, missing in (
        (np.nan, "validation prompts are drawn anew", "and all responses"),
        (0.3, "validation prompts and all responses are drawn anew", "responses stay as they are"),
    ):
        given.uncertainty = replace(given.uncertainty, own_signal=signal, overlap=0.4)
        page = render(given)
        assert page.count(drawn) == 2 and missing not in page
        other = "" if np.isnan(signal) else " and more responses"
        assert f"; more validation prompts{other} make the choice surer" in page


def test_a_page_says_which_shares_were_fixed() -> None:
    given = make_input()
    assert "Shares were fixed by" not in render(given)
    given.selection = select(given.scores, fraction=0.2, per="task", quota=["task1=0.5", "task2=3"])
    assert "Shares were fixed by <code><bdi>--per task --quota task1=0.5 task2=3</bdi></code>" in render(
        given
    )


def test_every_chart_says_in_words_what_it_shows() -> None:
    svg = density(np.array([0.0, 1.0, 4.0]), np.array([4.0]), cut=0.5)
    assert 'aria-label="histogram: 3 in all, 0 to 4, median 1; 1 chosen, 4 to 4, median 4; cut at 0.5"' in svg
    assert 'aria-label="stage 0: 0.25, stage 2: 0.5"' in line([0.25, None, 0.5])


def test_a_table_of_shares_says_how_many_tasks_it_leaves_out() -> None:
    given, said = make_input(), "the 30 of 58 with the largest shares of the choice"
    assert said not in render(given)
    for i, row in enumerate(given.scores.rows):
        given.scores.rows[i] = replace(row, task=f"task{i}")
    assert render(given).count(said) == 1
