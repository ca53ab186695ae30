"""Files of tuned settings on the report's page, beside runs."""

import re

import pytest

from tests.report.runs import write_run
from tests.tuned.files import candidate, tuned
from ttt_harness import cli
from ttt_harness.report.page.tuned import find_tuned, tuned_figure
from ttt_harness.tuned import write_tuned

B, DROPPED = candidate(3e-4, 3), candidate(1e-3, 3)
GAINS = {"icl": [0] * 8 + [1] * 2, B.name: [1] * 10, DROPPED.name: [0] * 4}
LOSES = {"icl": [1] * 10, B.name: [0] * 10}


def search(**others):
    return tuned({**{f"bbh_ttt_{name}": GAINS for name in "abcde"}, "bbh_ttt_</svg>": LOSES}, [B, DROPPED], **others)


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs", {"bbh_ttt_a": [1, 0, 1, 1], "bbh_ttt_b": [1, 0, 1, 1]})
    write_tuned(search(), tmp_path / "search" / "tuned.json")

    def page(*paths):
        assert cli.main(["report", *paths]) == 0
        return (tmp_path / "report.html").read_text()

    return page


@pytest.mark.parametrize("path", ["search/tuned.json", "search"])
def test_a_search_stands_beside_the_runs(page, path):
    html = page("runs", path)
    section = html[html.index('<section id="tuned"') : html.index('<section id="tasks"')]
    assert f"{B.name} is better than in-context learning on held-out demonstrations" in section
    assert section.count('class="of-task"') == 6 + 6 + 5
    assert section.count('class="best"') == 1
    assert re.search(rf"<th[^>]*>a</th><td>{B.name}</td><td class=\"num\">\+", section)
    assert "</svg>: 100" not in section  # a task's name is text
    assert re.search(r"<th[^>]*>&lt;/svg&gt;</th><td>icl</td><td class=\"num\">−", section)
    assert '<section id="tuned"' not in page("runs")


def test_marks_stand_where_their_scores_are():
    figure = tuned_figure("tuned.json", search(), "bbh_ttt_")
    icl, best, dropped = figure.columns
    assert best.chosen
    assert best.y < icl.y < dropped.y  # y runs downwards
    assert all(column.high <= column.y <= column.low for column in figure.columns)
    assert {text.partition(":")[0] for _, text in icl.dots} == {"a", "b", "c", "d", "e", "</svg>"}
    assert len(dropped.dots) == 5
    assert max(y for y, _ in icl.dots) <= figure.height


def test_a_folder_of_runs_may_hold_a_search_and_what_is_damaged_is_said(tmp_path, page, capsys):
    write_tuned(search(), tmp_path / "runs" / "tuned.json")
    assert '<section id="tuned"' in page("runs")
    (tmp_path / "runs" / "other").mkdir()
    damaged = (tmp_path / "runs" / "tuned.json").read_text().replace('"k": 10', '"k": []')
    (tmp_path / "runs" / "other" / "tuned.json").write_text(damaged)
    assert page("runs").count('<div class="sweep">') == 1
    assert "warning: Left out:" in capsys.readouterr().err
    (tmp_path / "runs" / "other" / "tuned.json").write_text("{}")  # of another program
    found, remarks = find_tuned(tmp_path / "runs")
    assert (len(found), remarks) == (1, [])
    results = next((tmp_path / "runs").rglob("results*.json"))
    results.write_text("{")
    assert cli.main(["report", "runs"]) == 1
    assert "is not complete JSON" in capsys.readouterr().err


@pytest.mark.usefixtures("page")
def test_a_file_that_is_named_and_damaged_is_refused(tmp_path, capsys):
    damaged = (tmp_path / "search" / "tuned.json").read_text().replace('"k": 10', '"k": []')
    (tmp_path / "search" / "tuned.json").write_text(damaged)
    assert cli.main(["report", "runs", "search/tuned.json"]) == 1
    assert "is damaged: k has to hold whole numbers" in capsys.readouterr().err
