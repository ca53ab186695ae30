"""The report page: what it holds, and how it behaves in a real browser (Debian's chromium, by playwright)."""

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tests.report.runs import ttt, write_run
from ttt_harness import cli
from ttt_harness.errors import ReportError
from ttt_harness.report.page.figures import costs, group_by_seed
from ttt_harness.report.page.page import build_page, embeddable
from ttt_harness.report.page.questions import shared_start
from ttt_harness.report.results import find_runs, read_run

TASKS = {"bbh_ttt_snarks": 40, "bbh_ttt_navigate": 60, "bbh_ttt_web_of_lies": 50}

HOSTILE = [
    "<script>window.hacked = true</script>",
    "</script><script>window.hacked = true</script>",
    "</textarea><img src=x onerror='window.hacked = true'>",
    "<!-- <script> -->",
    "\u202eright to left\u202c and \u200f marks",
    "control \x00\x07\x1b[31m characters",
    "lines\u2028and\u2029paragraphs",
    "{{ 7 * 7 }} ${window.hacked = true} &amp; &lt;b&gt;",
    "javascript:window.hacked=true",
]


def bits(n, seed, share=0.5):
    return [float(x) for x in np.random.default_rng(seed).random(n) < share]


def prompt(task, i):
    return f"Instruction of {task}.\n\nQ: first\nA: True\n\nQ: second\nA: False\n\nQ: {task} question {i}\nA:"


def write_runs(folder, methods=("ttt",), seeds=(42,), **options):
    """In-context runs and runs of each method, per seed."""
    options = {"group": "bbh_ttt", "prompt": prompt, **options}
    for s, seed in enumerate(seeds):
        metadata = {"seed": seed}
        scores = {task: bits(n, 10 * s + t) for t, (task, n) in enumerate(TASKS.items())}
        write_run(folder / "icl", scores, metadata=metadata, **options)
        for m, method in enumerate(methods, 1):
            scores = {task: bits(n, 1000 * m + 10 * s + t, 0.7) for t, (task, n) in enumerate(TASKS.items())}
            fits = ttt(list(TASKS), method=method, seed=seed)
            write_run(folder / method, scores, source="ttt_vllm", ttt=fits, metadata=metadata, **options)


def page_data(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_an_adapter_that_tasks_share_costs_its_fit_once(tmp_path):
    fits = ttt(list(TASKS), method="shared_ttt")
    for i, fit in enumerate(fits["tasks"].values()):
        fit |= {"adapter": "/cache/shared", "reused": i > 0, "fit_seconds": 20.0, "train_tokens": 900}
    write_run(tmp_path, {task: bits(n, n) for task, n in TASKS.items()}, source="ttt_vllm", ttt=fits)
    runs = find_runs(tmp_path)
    (cost,) = costs(group_by_seed(runs, runs[0], {})[0])
    assert (cost["fit"], cost["tokens"], cost["fits"], cost["reused"]) == (20.0, 900.0, 1, 0)
    assert cost["generate"] == pytest.approx(sum(fit["generate_seconds"] for fit in fits["tasks"].values()))


def test_fits_of_earlier_runs_cost_this_one_nothing(tmp_path):
    fits = ttt(list(TASKS))
    for fit in fits["tasks"].values():
        fit["reused"] = True
    write_run(tmp_path, {task: bits(n, n) for task, n in TASKS.items()}, source="ttt_vllm", ttt=fits)
    runs = find_runs(tmp_path)
    (cost,) = costs(group_by_seed(runs, runs[0], {})[0])
    assert (cost["fit"], cost["tokens"], cost["fits"], cost["reused"]) == (None, None, 3, 3)


def test_an_unknown_metric_is_refused(tmp_path, capsys):
    write_runs(tmp_path / "runs")
    assert cli.main(["report", str(tmp_path / "runs"), "--metric", "foo", "-o", str(tmp_path / "page.html")]) == 1
    assert "no run has the metric foo; choose from acc" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_page_is_one_file_without_links(tmp_path):
    write_runs(tmp_path)
    html = build_page(find_runs(tmp_path))
    assert re.findall(r"(?:src|href)=[\"']?(?!#|data:)[^\"'\s>]+", html) == []
    assert "url(" not in html
    assert "@import" not in html


def test_data_can_not_leave_its_element():
    text = embeddable({"</script>": HOSTILE, "lone": "\ud800"})
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == {"</script>": HOSTILE, "lone": "\ud800"}
    text.encode("utf-8")


def test_hostile_texts_are_never_markup(tmp_path):
    name = "<script>alert(1)</script>"
    write_run(
        tmp_path,
        {"t": [1.0, 0.0]},
        model=name.replace("/", ""),
        answer=lambda *_: "</script><b>",
        change={"lm_eval_version": name},
    )
    html = build_page(find_runs(tmp_path), title=name)
    assert html.count("<script>") == 1
    assert html.count("</script>") == 2


def test_each_question_is_there_once_with_all_answers(tmp_path):
    write_runs(tmp_path, ("ttt", "e2e"))
    data = page_data(build_page(find_runs(tmp_path)))
    assert data["labels"] == ["10-shot", "ttt", "e2e"]
    questions = data["questions"]
    assert len(questions["id"]) == sum(TASKS.values())
    assert [len(m["answer"]) for m in questions["methods"]] == [sum(TASKS.values())] * 3
    strings = data["strings"]
    assert len(strings) == len(set(strings))
    first = strings[questions["text"][0]]
    start = strings[data["prefixes"]["0,0"][0]]
    assert start + first == prompt("bbh_ttt_snarks", 0)
    assert start.endswith("A: False\n\n")


def test_shared_start_of_prompts():
    assert shared_start(["intro\n\nQ: a\nA:", "intro\n\nQ: b\nA:"]) == "intro\n\n"
    assert shared_start(["intro\n\nQ: a\nA:"]) == "intro\n\n"
    assert shared_start(["intro\n\nQ: a\n\n"]) == "intro\n\n"
    assert shared_start(["Q: a", "Q: b"]) == ""
    assert shared_start([]) == ""


def test_figures_are_those_of_compare(tmp_path, capsys):
    write_runs(tmp_path)
    icl, trained = find_runs(tmp_path)
    cli.main(["compare", str(icl.path), str(trained.path), "--format", "json"])
    expected = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    rows = page_data(build_page([icl, trained]))["rows"]["1"]
    assert [row["name"] for row in rows] == list(expected)
    for row in rows:
        same = expected[row["name"]]
        assert row["diff"] == pytest.approx([same["difference"], same["ci_low"], same["ci_high"]], abs=1e-6)
        assert (row["p"], row["won"], row["lost"]) == (same["p_value"], same["won"], same["lost"])


def test_several_seeds_are_mean_and_spread(tmp_path):
    write_runs(tmp_path, seeds=(42, 43, 44))
    data = page_data(build_page(find_runs(tmp_path)))
    assert data["labels"] == ["10-shot", "ttt"]
    assert data["seeds"] == ["42", "43", "44"]
    row = next(row for row in data["rows"]["1"] if row["name"] == "bbh_ttt_snarks")
    gains = [np.mean(bits(40, 1000 + 10 * s, 0.7)) - np.mean(bits(40, 10 * s)) for s in range(3)]
    assert row["seeds"] == 3
    assert row["diff"][0] == pytest.approx(np.mean(gains), abs=1e-6)
    assert row["diff"][2] - row["diff"][0] == pytest.approx(np.std(gains, ddof=1), abs=1e-6)
    assert row["p"] is None
    assert len(data["losses"]["1"]["0"]) == 3


def test_zero_shot_runs_are_no_in_context_runs(tmp_path):
    scores = {("zero_shot", 42): 0.1, ("zero_shot", 43): 0.2, ("icl", 42): 0.5, ("icl", 43): 0.6}
    for (name, seed), share in scores.items():
        write_run(
            tmp_path / name / f"seed{seed}",
            {"t": [1.0] * round(40 * share) + [0.0] * round(40 - 40 * share)},
            source="ttt_vllm",
            ttt=ttt(["t"], method="icl", seed=seed),
            metadata={"seed": seed},
            shots=0 if name == "zero_shot" else 10,
        )
    data = page_data(build_page(find_runs(tmp_path)))
    assert data["labels"] == ["icl", "zero_shot"]  # the base is in-context, although zero-shot is older
    (row,) = data["rows"]["1"]
    assert (row["base"][0], row["other"][0], row["seeds"]) == (pytest.approx(0.55), pytest.approx(0.15), 2)


def test_runs_of_some_of_the_questions_stand_by_themselves(tmp_path):
    write_run(tmp_path / "all", {"t": bits(40, 1)})
    write_run(tmp_path / "some", {"t": bits(20, 1)}, limit=20.0)
    write_run(tmp_path / "share", {"t": bits(20, 1)}, limit=0.5)
    assert page_data(build_page(find_runs(tmp_path)))["labels"] == ["10-shot", "10-shot limit=20", "10-shot limit=0.5"]


def test_a_run_given_twice_is_shown_once_and_said(tmp_path):
    write_runs(tmp_path)
    runs = find_runs(tmp_path)
    html = build_page([*runs, *runs])
    assert page_data(html)["labels"] == ["10-shot", "ttt"]
    assert "shown once" in html


def test_runs_that_cannot_be_compared_are_shown_with_the_reason(tmp_path):
    write_run(tmp_path / "a", {"t": bits(40, 1)})
    write_run(tmp_path / "b", {"t": bits(20, 1)}, ttt=ttt(["t"]))
    html = build_page(find_runs(tmp_path))
    assert re.search(r"not compared: the questions of t differ [^<]*task version\.<", html)
    assert len(page_data(html)["questions"]["id"]) == 40


def test_base_can_be_chosen(tmp_path, capsys):
    write_runs(tmp_path / "runs", ("ttt", "e2e"))
    output = tmp_path / "new" / "report.html"
    arguments = ["report", str(tmp_path / "runs"), "-o", str(output), "--base", str(tmp_path / "runs" / "ttt")]
    assert cli.main(arguments) == 0
    assert str(output) in capsys.readouterr().out
    assert page_data(output.read_text(encoding="utf-8"))["labels"] == ["ttt", "10-shot", "e2e"]


def labels_of_report(folder, *arguments):
    output = folder / "report.html"
    assert cli.main(["report", *map(str, arguments), "-o", str(output)]) == 0
    return page_data(output.read_text(encoding="utf-8"))["labels"]


def test_runs_are_called_by_the_names_given(tmp_path):
    write_runs(tmp_path, seeds=(42, 43))
    named = [f"in-context={tmp_path / 'icl'}", f"TTT={tmp_path / 'ttt'}"]
    assert labels_of_report(tmp_path, *named) == ["in-context", "TTT"]
    assert labels_of_report(tmp_path, *named, "--base", tmp_path / "ttt") == ["TTT", "in-context"]
    assert labels_of_report(tmp_path, *named[:1], tmp_path / "ttt") == ["in-context", "ttt"]


def test_runs_alike_under_two_names_stand_by_themselves(tmp_path):
    for name in ("old", "new"):
        write_runs(tmp_path / name)
    named = [f"{name}={tmp_path / name}" for name in ("old", "new")]
    assert labels_of_report(tmp_path, *named) == ["old 10-shot", "old ttt", "new 10-shot", "new ttt"]


def test_one_name_for_two_folders_is_refused(tmp_path, capsys):
    write_runs(tmp_path)
    assert cli.main(["report", f"a={tmp_path / 'icl'}", f"a={tmp_path / 'ttt'}", "-o", str(tmp_path / "r.html")]) == 1
    assert "the name a is given to two runs; give each its own.\n" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_no_runs_are_refused(tmp_path, capsys):
    with pytest.raises(ReportError, match="no run"):
        build_page([])
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 1
    assert re.search(r"holds no results file .*\.\n$", capsys.readouterr().err)


def test_output_that_can_not_be_written_is_one_sentence(tmp_path, capsys):
    write_runs(tmp_path / "runs")
    (tmp_path / "file").write_text("")
    assert cli.main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / "file" / "r.html")]) == 1
    assert re.search(r"cannot be written: .*; choose another file with -o\.\n$", capsys.readouterr().err)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast_in_both_themes():
    css = (Path(cli.__file__).parent / "report/page/page.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--([\w-]+): (#\w{6})", css[: css.index("data-theme")]))
    dark = light | dict(re.findall(r"--([\w-]+): (#\w{6})", css[css.index("data-theme") :].split("}")[0]))
    pairs = [
        (text, ground)
        for text in ("ink", "muted", "accent", "gain", "loss")
        for ground in ("ground", "surface", "raised")
    ]
    pairs += [
        ("gain", "gain-soft"),
        ("loss", "loss-soft"),
        ("warn", "warn-soft"),
        ("ink", "warn-soft"),
        ("changed", "raised"),
    ]
    for name, colours in (("light", light), ("dark", dark)):
        for text, ground in pairs:
            one, two = sorted((luminance(colours[text]), luminance(colours[ground])))
            assert (two + 0.05) / (one + 0.05) >= 4.5, (name, text, ground)


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(
            executable_path=chromium,
            args=["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield opened
        opened.close()


@pytest.fixture
def show(browser, tmp_path):
    """show(html, **context options): the page in a new tab. Fails on anything on the console or the network."""
    problems, contexts = [], []

    def opened(html, **options):
        file = tmp_path / "report.html"
        file.write_text(html, encoding="utf-8")
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url == file.as_uri() or request.url.startswith("data:") or problems.append(request.url)
            ),
        )
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_runs(folder, ("ttt", "e2e"))
    return build_page(find_runs(folder), reference=True)


def shown(page):
    return int(re.sub(r"\D", "", page.locator("#shown").inner_text()))


def choose(page, outcome):
    page.check(f"#outcomes input[value={outcome}]", force=True)  # the radio button itself is not to be seen


def search(page, words, expected):
    # the page's security policy forbids wait_for_function
    page.fill("#search", words)
    page.locator("#shown", has_text=re.compile(f"^{expected}$")).wait_for()


def rows(page):
    return page.locator("#rows .row").all_inner_texts()


def test_filters_and_search(show, report):
    page = show(report)
    base, other = bits(40, 0), bits(40, 1000, 0.7)
    won = sum(b < o for b, o in zip(base, other, strict=True))
    lost = sum(b > o for b, o in zip(base, other, strict=True))
    page.select_option("#task-filter", label="snarks")
    assert shown(page) == won + lost
    choose(page, "won")
    assert shown(page) == won
    assert all("won" in row for row in rows(page))
    choose(page, "lost")
    assert shown(page) == lost
    choose(page, "all")
    assert shown(page) == 40
    search(page, "QUESTION 17 snarks", "1 question")
    search(page, "no such words", "0 questions")
    assert page.locator(".none").inner_text() == "No question matches."


def test_task_row_filters_its_questions(show, report):
    page = show(report)
    page.locator(".task button.name", has_text="navigate").click()
    assert page.input_value("#task-filter") == "1"
    assert all("navigate" in row for row in rows(page))


def test_sort(show, report):
    page = show(report)
    choose(page, "all")
    page.get_by_role("button", name="Sort by question").click()
    up = [row.split("\n")[2] for row in rows(page)]
    assert up == sorted(up)
    page.get_by_role("button", name="Sort by question").click()
    down = [row.split("\n")[2] for row in rows(page)]
    assert down == sorted(down, reverse=True)
    assert up[0] != down[0]


def test_tasks_are_sorted_by_gain_and_follow_the_method(show, report):
    page = show(report)

    def gains():
        texts = page.locator(".task:not(.head):not(.mean) .change span:first-child").all_inner_texts()
        return [float(text.replace("−", "-")) for text in texts]

    first = gains()
    assert first == sorted(first, reverse=True)
    page.select_option("#method", label="e2e")
    assert gains() != first
    assert "e2e" in page.locator("#task-legend").inner_text()
    assert page.locator(".published").count() > 0


def test_keyboard(show, report):
    page = show(report)
    page.focus("#rows")
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", "End", "Home", "PageDown", "ArrowDown"):
        page.keyboard.press(key)
    active = page.get_attribute("#rows", "aria-activedescendant")
    assert active != "row-0"
    assert page.locator(f"#{active}").get_attribute("aria-selected") == "true"
    page.keyboard.press("Enter")
    assert page.locator("#detail").is_visible()
    title = page.locator("#detail-title").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#detail-title").inner_text() != title
    page.keyboard.press("Escape")
    assert not page.locator("#detail").is_visible()
    assert page.evaluate("document.activeElement.id") == "rows"
    assert page.get_attribute("#rows", "aria-activedescendant") == f"row-{int(active[4:]) + 1}"


def test_everything_that_takes_focus_shows_it_and_has_a_name(show, report):
    page = show(report)
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline, label = page.evaluate(
            """() => {
              const node = document.activeElement;
              const near = [node, node.closest("label") ?? node];
              const ring = near.some((n) => getComputedStyle(n).outlineStyle !== "none");
              const text = node.getAttribute("aria-label") || node.labels?.[0]?.textContent || node.textContent;
              return [node.tagName + "#" + node.id, ring, text.trim()];
            }"""
        )
        if name.startswith("BODY"):
            break
        seen.add(name)
        assert outline, name
        assert label, name
    assert {"BUTTON#theme", "SELECT#method", "INPUT#search", "DIV#rows"} <= seen


def test_detail_shows_prompt_answers_and_target(show, report):
    page = show(report)
    page.locator(".row").first.click()
    detail = page.locator("#detail")
    assert "Q: bbh_ttt_" in detail.inner_text()
    for label in ("10-shot", "ttt", "e2e"):
        assert label in detail.locator(".answers").inner_text()
    detail.locator("details", has_text="Whole prompt").locator("summary").click()
    assert "Instruction of bbh_ttt_" in detail.inner_text()
    assert "A: False" in detail.inner_text()


def test_hostile_answers_are_text(show, tmp_path):
    n = len(HOSTILE)
    for folder, scores in (("a", [0.0] * n), ("b", [1.0] * n)):
        write_run(
            tmp_path / folder,
            {"<img src=x onerror=window.hacked=1>": scores},
            answer=lambda _t, i, _s: HOSTILE[i],
            question=lambda _t, i: HOSTILE[i],
            target=lambda _t, i: HOSTILE[i],
            ttt=ttt(["t"], method=HOSTILE[0]) if folder == "b" else None,
        )
    page = show(build_page(find_runs(tmp_path), title=HOSTILE[1]))
    assert page.locator("#rows .row").count() == n
    for i, text in enumerate(HOSTILE):
        page.locator("#rows .row").nth(i).click()
        answer = page.locator(".answers .text").first.text_content()
        visible = re.sub(
            "[\x00-\x08\x0b-\x1f\u200f\u2028\u2029\u202c\u202e]", lambda found: f"U+{ord(found[0]):04X}", text
        )
        assert answer == visible
        page.keyboard.press("Escape")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert page.title() == HOSTILE[1]


def write_grid(folder, axes, seeds=(42, 43), **options):
    """In-context runs, and runs of `ttt` at each point of a grid; the score rises with the place on the axes."""
    write_runs(folder, (), seeds, **options)
    points = [{}]
    for axis, values in axes.items():
        points = [{**point, axis: value} for point in points for value in values]
    for p, point in enumerate(points):
        for seed in seeds:
            share = 0.3 + 0.6 * p / len(points)
            scores = {task: bits(n, 7 * seed + t, share) for t, (task, n) in enumerate(TASKS.items())}
            fits = ttt(list(TASKS), seed=seed, **point)
            facts = {"group": "bbh_ttt", "prompt": prompt, "metadata": {"seed": seed}, **options}
            write_run(folder / "ttt" / str(p), scores, source="ttt_vllm", ttt=fits, **facts)


def test_a_sweep_over_one_axis_is_a_line_with_intervals(show, tmp_path):
    write_grid(tmp_path, {"lr": [3e-4, 1e-4, 1e-3]})
    page = show(build_page(find_runs(tmp_path)))
    assert page.locator("#sweeps svg.plot circle").count() == 3
    assert page.locator("#sweeps svg.plot .best circle").count() == 1
    assert page.locator("#sweeps svg.plot .interval").count() == 9
    assert "lr=0.001 has the best bbh_ttt of 3 settings" in page.locator(".verdict").inner_text()
    labels = [page.locator("#sweeps svg.plot g").nth(i).locator("text").last.text_content() for i in range(3)]
    assert labels == ["0.0001", "0.0003", "0.001"]
    heights = [float(page.locator("#sweeps circle").nth(i).get_attribute("cy")) for i in range(3)]
    assert heights[2] < min(heights[:2])  # the best one is highest
    page.locator("#sweeps summary").click()
    assert page.locator("#sweeps tbody tr").count() == 3
    assert page.locator("#sweeps tbody tr", has_text="best").count() == 1


def test_a_sweep_over_two_axes_is_a_heat_map(show, tmp_path):
    write_grid(tmp_path, {"lr": [1e-4, 3e-4], "epochs": [1, 2, 3]})
    page = show(build_page(find_runs(tmp_path)))
    cells = page.locator("#sweeps svg.heat g")
    assert cells.count() == 6
    shades = [float(cells.nth(i).locator("rect").get_attribute("fill-opacity")) for i in range(6)]
    scores = [float(cells.nth(i).locator(".score").inner_html().split()[0]) for i in range(6)]
    assert shades.index(max(shades)) == scores.index(max(scores))
    assert shades.index(min(shades)) == scores.index(min(scores))
    assert page.locator("#sweeps svg.heat .best .score", has_text="best").count() == 1


def test_a_sweep_over_three_axes_is_a_table(show, tmp_path):
    write_grid(tmp_path, {"lr": [1e-4, 3e-4], "epochs": [1, 2], "lora_rank": [8, 16]}, seeds=(42,))
    page = show(build_page(find_runs(tmp_path)))
    assert page.locator("#sweeps svg").count() == 0
    assert page.locator("#sweeps tbody tr:visible").count() == 8


def test_one_setting_has_no_section_of_settings_tried(report):
    assert "Settings tried" not in report


def test_hostile_settings_are_text(show, tmp_path):
    write_grid(tmp_path, {"lr": HOSTILE[:4], "<img src=x onerror='window.hacked = true'>": [1, 2]}, seeds=(42,))
    page = show(build_page(find_runs(tmp_path)))
    assert page.evaluate("window.hacked") is None
    assert page.locator("#sweeps svg.heat g").count() == 8


def test_the_four_cards_are_those_that_gain_most(show, tmp_path):
    write_grid(tmp_path, {"lr": [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]})
    page = show(build_page(find_runs(tmp_path)))
    assert page.locator(".card").count() == 4
    assert "lr=0.003" in page.locator(".card h3").last.inner_text()
    assert not any("lr=1e-05" in text for text in page.locator(".card h3").all_inner_texts())


def test_settings_show_what_ran(tmp_path):
    """lm-eval writes its default device into every file; `ttt_vllm` states the one that it ran on."""
    change = {"config": {"model": "ttt_vllm", "device": "cuda:0", "ttt": ttt(["t"], device="cpu")}}
    page = build_page([read_run(write_run(tmp_path, {"t": [1.0]}, source="ttt_vllm", change=change))])
    settings = page[page.index('<section id="settings"') :]
    assert "cuda:0" not in settings
    assert re.search(r"device</th>\s*<td>cpu</td>", settings)
    without = {"config": {"model": "hf", "device": "cuda:0"}}
    page = build_page([read_run(write_run(tmp_path, {"t": [1.0]}, source="hf", change=without))])
    assert "cuda:0" not in page[page.index('<section id="settings"') :]


def test_answers_are_texts_and_no_lists(tmp_path):
    path = write_run(tmp_path, {"t": [1.0]})
    samples = next(path.parent.glob("samples_*"))
    line = json.loads(samples.read_text())
    samples.write_text(json.dumps({**line, "filtered_resps": [["true"]], "target": ["true"]}) + "\n")
    (sample,) = read_run(path).samples("t", "answer")
    assert (sample.answer, sample.target) == ("true", "true")


def test_phone_has_no_sideways_scroll(show, report):
    for width in (320, 380):
        page = show(report, viewport={"width": width, "height": 800}, has_touch=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator(".row").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.locator("#detail").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


def test_themes(show, report):
    for scheme in ("light", "dark"):
        page = show(report, color_scheme=scheme)
        ground = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(ground) == "rgb(247, 248, 250)"
        assert light == (scheme == "light")
        page.click("#theme")  # auto -> light
        page.click("#theme")  # light -> dark
        assert page.evaluate(ground) == "rgb(16, 19, 23)"
        assert page.get_attribute("#theme", "aria-label") == "Colours: dark"


def test_several_seeds(show, tmp_path):
    write_runs(tmp_path, seeds=(42, 43))
    page = show(build_page(find_runs(tmp_path)))
    assert "2 seeds" in page.locator("#summary").inner_text()
    choose(page, "all")
    assert shown(page) == 2 * sum(TASKS.values())
    page.select_option("#seed-filter", label="43")
    assert shown(page) == sum(TASKS.values())


def test_without_samples_it_says_what_to_add(show, tmp_path):
    write_runs(tmp_path, samples=False)
    page = show(build_page(find_runs(tmp_path)))
    assert "--log_samples" in page.locator("#questions").inner_text()
    assert page.locator("#task-list .task").count() == 2 + len(TASKS)


def test_a_single_run_shows_right_and_wrong(show, tmp_path):
    path = write_run(tmp_path, {task: bits(n, 1) for task, n in TASKS.items()}, group="bbh_ttt")
    page = show(build_page([read_run(path)]))
    choose(page, "wrong")
    assert shown(page) == sum(bits(n, 1).count(0.0) for n in TASKS.values())
    page.locator(".row").first.click()
    assert page.locator("#detail").is_visible()


def test_6000_questions_with_5_methods_open_in_2_seconds_and_scroll_smoothly(show, tmp_path):
    tasks = {f"bbh_ttt_task_{t:02}": 240 for t in range(25)}
    text = "In this question five people each hold one object and swap them in turn. " * 6
    demonstrations = "".join(f"Q: {text} ({i})\nA: (A)\n\n" for i in range(10))
    for m in range(5):
        write_run(
            tmp_path / str(m),
            {task: bits(n, 100 * m + t) for t, (task, n) in enumerate(tasks.items())},
            group="bbh_ttt",
            ttt=ttt(list(tasks), lr=10.0**-m) if m else None,
            prompt=lambda task, i: f"Instruction of {task}.\n\n{demonstrations}Q: {text} ({task} {i})\nA:",
            answer=lambda task, i, score: f"answer {score} to {task} {i}",
        )
    html = build_page(find_runs(tmp_path))
    assert len(page_data(html)["questions"]["id"]) == 6000
    assert len(html) < 8e6
    start = time.perf_counter()
    page = show(html)
    page.wait_for_selector("#rows .row")
    opened = time.perf_counter() - start
    assert opened < 2, f"{opened:.2f} s"
    assert page.locator("#rows .row").count() < 60  # of 6,000: only what is in sight is in the document
    frames = page.evaluate(
        """async () => {
          const body = document.querySelector("#rows");
          const spent = [];
          for (let i = 0; i < 60; i++) {
            const start = performance.now();
            body.scrollTop += 400;
            await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
            spent.push(performance.now() - start);
          }
          return spent.sort((a, b) => a - b);
        }"""
    )
    assert frames[30] < 50, frames  # the median: the machine that runs the tests may be busy
    start = time.perf_counter()
    search(page, "task_07 111", r"\d questions?")
    assert time.perf_counter() - start < 2
