"""The page of all results: what stands on it, what it refuses, and how a browser lays it out."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import report

from minilm.files import FormatError
from minilm.measure.verdict import compared
from minilm.picture import draw_svg
from minilm.results import Result, number

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)
TALL = "height, m"
MEASURES = {TALL: 2, "width, m": 0, **{f"heat of room {n}, °C": 1 for n in range(8)}}


def result(name="towers", question="Which is higher?", seeds=(0, 1, 2), quick=False):
    rows = tuple({**dict.fromkeys(MEASURES, 12345), "arm": arm, "seed": seed,
                  TALL: height + seed ** 2 / 7}
                 for seed in seeds for arm, height in [("low", 1.0), ("high", 50.0), ("mid", 7)])
    judged = {"high is above low": compared(rows, TALL, "high", "low", at_least=0),
              "high is near low": compared(rows, TALL, "high", "low", -2.5, 2.5),
              "mid & <low>": compared(rows[:4], TALL, "mid", "low", at_most=9)}
    why = {"high is near low": {"likely": "it is <high>"}}
    claims = tuple({"claim": claim, **why.get(claim, {}), **asdict(verdict)}
                   for claim, verdict in judged.items())
    slide = {"lecture 000: towers, m": {"low": 3.25, "high": 812.5}}
    return Result(name, question, f"python scripts/experiments/{name}.py --seeds 0 1 2", quick,
                  slide, MEASURES, "2026-11-27 10:00 UTC", "abc123", "a machine",
                  rows, claims)


def lines(figure):
    axes = figure.subplots()
    axes.plot([1, 2, 3])
    axes.set(xlabel="steps & <more>")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw_svg(tmp_path_factory.mktemp("drawn") / "a.svg", lines).read_text()


@pytest.fixture
def folder(tmp_path, drawn):
    """Two results, both with the same picture."""
    for name in ("first", "second"):
        result(name).save(tmp_path / f"{name}.json")
        (tmp_path / f"{name}.svg").write_text(drawn)
    return tmp_path


def page(*paths):
    return report.page(list(paths))


def text(page):
    """What a reader sees, spaces as one."""
    body = page.split("</style>")[-1]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_every_number_and_claim_is_on_the_page(folder):
    seen, made = text(page(folder / "first.json")), result()
    for arm in made.arms:
        row = [arm]
        for measure, decimals in made.measures.items():
            mean, low, high = (number(x, decimals) for x in made.spread(arm, measure))
            row.append(mean if low == high else f"{mean} {low} – {high}")
        assert " ".join(row) in seen
    ours, slides = "low 1.24 1.00 – 1.57 12,345" + 8 * " 12,345.0", " 3.25"
    assert ours + slides in seen
    for claim, mark in zip(made.claims, "✓✗?"):
        assert f"{claim['claim']} {mark} {claim['verdict']}" in seen
    assert "high − low: height, m: 49, 95 % interval 49 to 49; claimed: above 0" in seen
    assert "claimed: between −2.5 and 2.5" in seen
    assert seen.count("Likely: it is <high>") == 1
    assert "mid − low: height, m: fewer than two seeds; claimed: below 9" in seen
    for fact in ("first.py --seeds 0 1 2", "seeds 0, 1, 2", made.question, made.date, made.commit,
                 made.machine):
        assert fact in seen


def test_contents_lead_to_each_experiment(folder):
    made = page(folder / "first.json", folder / "second.json")
    targets = re.findall(r'<li><a href="#([^"]+)">', made)
    assert len(targets) == 2 and all(made.count(f'<section id="{t}">') == 1 for t in targets)
    ids = re.findall(r'\bid="([^"]+)"', made)
    assert len(ids) == len(set(ids)) and len(ids) > 20  # two pictures alike, with ids of their own
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', made)) <= set(ids)
    assert made.count('title="holds">✓&nbsp;1<') == 2


def test_what_results_say_is_escaped(tmp_path):
    nasty = '<script>alert("1")</script>&'
    made = result(nasty, nasty)
    rows = tuple(row | {"arm": row["arm"] + nasty} for row in made.rows)
    claims = tuple(claim | {"claim": nasty, "about": nasty} for claim in made.claims)
    Result(**vars(made) | {"rows": rows, "claims": claims, "slide": {nasty: {}}, "machine": nasty,
                           "commit": nasty, "date": nasty, "command": nasty}
           ).save(tmp_path / "a.json")
    made = page(tmp_path / "a.json")
    assert "<script" not in made and "alert(&#34;1&#34;)" in made
    assert text(made).count(nasty) >= 12


@pytest.mark.parametrize("inside, complaint", [
    ("<script>1</script>", "may not hold <script>"),
    ('<g onclick="1"/>', "may not hold onclick='1'"),
    ('<use href="http://a.b/c#d"/>', "may not hold href='http"),
    ('<use xmlns:x="http://www.w3.org/1999/xlink" x:href="//a.b"/>', "href='//a.b'"),
    ('<g style="fill: url(http://a.b)"/>', "may not hold style="),
    ("<image/>", "may not hold <image>"),
    ('<g xmlns="http://www.w3.org/1999/xhtml"/>', "may not hold <{http"),
    ("<g>", "not SVG"),
    ("<g>" * 2000 + "</g>" * 2000, "nested too deeply"),
])
def test_a_picture_that_does_more_than_draw_is_refused(folder, inside, complaint):
    svg = f'<svg xmlns="http://www.w3.org/2000/svg">{inside}</svg>'
    (folder / "first.svg").write_text(svg)
    with pytest.raises(FormatError, match=complaint):
        page(folder / "first.json")


def test_a_picture_that_is_none_is_refused(folder):
    """ElementTree raises LookupError for an encoding, and would wait for a pipe's writer."""
    file = folder / "first.svg"
    file.write_text('<?xml version="1.0" encoding="utf-0"?><svg/>')
    with pytest.raises(FormatError, match="not SVG: unknown encoding"):
        page(folder / "first.json")
    file.unlink()
    for make in (file.mkdir, lambda: os.mkfifo(file)):
        make()
        with pytest.raises(FormatError, match=r"first\.svg: cannot be read: it is a "):
            page(folder / "first.json")
        if file.is_dir():
            file.rmdir()


def test_a_comment_before_the_picture_is_left_out(folder):
    svg = '<!-- <svg onload="1"> --><svg xmlns="http://www.w3.org/2000/svg"><text>seen</text></svg>'
    (folder / "first.svg").write_text(svg)
    made = page(folder / "first.json")
    assert "onload" not in made and '<svg xmlns="http://www.w3.org/2000/svg"><text>seen<' in made


def test_a_quick_run_and_one_that_has_not_ended_say_so(tmp_path):
    result(quick=True).save(tmp_path / "a.json")
    unfinished = vars(result()) | {"claims": ()}
    Result(**unfinished).save(tmp_path / "b.json")
    assert "its numbers mean nothing" in text(page(tmp_path / "a.json"))
    seen = text(page(tmp_path / "b.json"))
    assert "has not ended: no claim is judged yet" in seen and "mean nothing" not in seen
    Result(**unfinished | {"rows": ()}).save(tmp_path / "b.json")
    assert "has not ended" in text(page(tmp_path / "b.json"))


def test_files_and_folders(folder, tmp_path, capsys):
    run = tmp_path / "runs" / "towers-1"
    run.mkdir(parents=True)
    result().save(run / "result.json")
    report.main((run, folder / "first.json"), tmp_path / "pages" / "page.html")
    assert capsys.readouterr().out == f"{tmp_path}/pages/page.html: 2 experiments\n"
    made = (tmp_path / "pages" / "page.html").read_text(encoding="utf-8")
    assert made == page(run / "result.json", folder / "first.json")
    with pytest.raises(FileNotFoundError):
        report.main((tmp_path / "nowhere.json",), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_without_jinja2_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'a page needs jinja2: .* install "minilm\[report\]"'):
        page(folder / "first.json")


# In a browser: a page of frames, each with the page at some width, and what a script finds in them.

FRAMES = """<!doctype html><body>%s<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const color = getComputedStyle(page.body).backgroundColor;
    const cut = [...page.querySelectorAll("body *")].filter(e => {
      const edge = e.getBoundingClientRect().right;
      return edge > root.clientWidth + 1 && !e.closest(".scroll, svg"); });
    const text = page.querySelector("svg text");
    return {width: root.clientWidth, needed: root.scrollWidth, cut: cut.map(e => e.className),
            requests: frame.contentWindow.performance.getEntriesByType("resource").length,
            dark: matchMedia("(prefers-color-scheme: dark)").matches, color,
            ink: text && getComputedStyle(text).fill,
            folded: [...page.querySelectorAll("details > :not(summary)")].filter(
              e => !e.checkVisibility({contentVisibilityAuto: true})).length,
            boxes: [...page.querySelectorAll(".scroll")].map(e => e.scrollWidth > e.clientWidth)};
  });
  document.body.textContent = JSON.stringify(found);
});
</script></body>"""


def in_browser(folder, frames, *options):
    """What the browser finds in each of some pages, each with the width of its frame."""
    frames = [f'<iframe width="{w}" height="900" style="border: 0" srcdoc="{html.escape(p)}">'
              "</iframe>" for p, w in frames]
    (folder / "frames.html").write_text(FRAMES % "".join(frames), encoding="utf-8")
    words = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", *options,
             "--dump-dom", (folder / "frames.html").as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(html.unescape(re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)[1]))


needs_browser = pytest.mark.skipif(BROWSER is None and "CI" not in os.environ,
                                   reason="no Chromium: apt-get install chromium")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_wide_and_narrow_and_asks_for_nothing(folder, scheme):
    made = page(folder / "first.json", folder / "second.json")
    option = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    wide, narrow = in_browser(folder, [(made, 1280), (made, 390)], option)
    for found, width in [(wide, 1280), (narrow, 390)]:
        assert found["width"] == found["needed"] == width and found["cut"] == []
        assert found["requests"] == 0
        assert found["dark"] == (scheme == "dark")
        paper, ink = (sum(map(int, re.findall(r"\d+", found[which])[:3])) / 3
                      for which in ("color", "ink"))
        assert (paper < 60 and ink > 180) if scheme == "dark" else (paper > 240 and ink < 60)
    assert wide["boxes"] == [False, False] and narrow["boxes"] == [True, True]


@needs_browser
def test_the_page_of_the_lectures_fits_a_phone_and_paper(folder):
    """At 360 px tables and outputs scroll in their boxes; on paper what is folded is open."""
    output = "GPT-4  " + 40 * "wide  " + "end\n\n16 bits  " + 40 * "wide  " + "end"
    (folder / "lectures.txt").write_text(output)
    made = report.page([folder / "first.json"], folder)
    printed = made.replace("@media print", "@media all")
    phone, paper = in_browser(folder, [(made, 360), (printed, 690)])
    assert phone["needed"] == 360 and paper["needed"] == 690
    assert phone["cut"] == [] == paper["cut"] and phone["requests"] == 0
    assert phone["folded"] >= 4 and paper["folded"] == 0


@needs_browser
def test_it_fits_on_paper_and_the_browser_would_see_a_wide_page_and_a_request(folder):
    made = page(folder / "first.json")
    wide = made.replace("<header>", '<header><p style="width: 2000px; max-width: none">wide</p>')
    asking = made.replace("<header>", '<header><img src="http://127.0.0.1:59999/a.png">')
    free = re.sub(r"<meta http-equiv=.*", "", asking)
    printed = made.replace("@media print", "@media all")
    frames = [(made, 390), (wide, 390), (asking, 390), (free, 390), (printed, 690)]
    plain, wide, asking, free, printed = in_browser(folder, frames)
    assert printed["needed"] == 690 and printed["cut"] == []  # A4 with its margins
    assert plain["needed"] == 390 and wide["needed"] >= 2000
    assert asking["requests"] == free["requests"] == 1  # what its policy forbids is seen
