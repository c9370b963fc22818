"""The report in a real browser: it renders, its pictures load, nothing is asked of the network, nothing overflows."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.report.build import build_report
from tests import report_runs
from tests.browser import MISSING, Browser, find_browser

needs_browser = pytest.mark.skipif(find_browser() is None, reason=MISSING)

CHECKS = (Path(__file__).parent.parent / "page_checks.js").read_text()


def look(page: Path, width: int, dark: bool, pictures: int) -> None:
    """Open a page and check what must hold of every report."""
    with Browser(width, dark=dark) as browser:
        browser.open(page)
        assert browser.value("document.title") == "Clew report"
        assert browser.value("document.images.length") == pictures
        assert browser.value("Promise.all([...document.images].map(i => i.decode())).then(() => true)")
        assert browser.value("[...document.images].every(i => i.naturalWidth > 0 && i.alt)")
        assert browser.value("document.documentElement.scrollWidth") <= width
        assert browser.value(CHECKS) == {"overflowing": [], "collisions": [], "faint": []}
        assert browser.value("document.querySelectorAll('main h2').length") > 1
        assert browser.errors == []
        assert [url for url in browser.requests if not url.startswith(("data:", "file:", "about:"))] == []


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    root = report_runs.all_runs(tmp_path_factory.mktemp("runs"))
    result = build_report([str(root)], str(root / "report.html"))
    return root / "report.html", result.pictures


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1400, False), (1400, True)])
def test_report_looks_right(report: tuple[Path, int], width: int, dark: bool) -> None:
    page, pictures = report
    assert pictures > 60
    look(page, width, dark, pictures)


@needs_browser
def test_the_check_itself_sees_what_is_wrong(tmp_path: Path) -> None:
    """A page with every fault that `look` looks for."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<meta name=viewport content='width=device-width'><main><img src='data:image/png;base64,AA' alt=x>"
        "<div style='width:2000px;color:#777;background:#888'>wide</div><svg width=100 height=20 aria-label=c>"
        "<text x=0 y=15>one</text><text x=2 y=15>two</text></svg></main><script>console.error('no'); lost()</script>"
    )
    with Browser(390) as browser:
        browser.open(page)
        assert browser.value("[...document.images].every(i => i.naturalWidth > 0)") is False
        found = browser.value(CHECKS)
        assert (found["overflowing"], found["collisions"], len(found["faint"])) == (["DIV."], ["c: one"], 1)
        assert len(browser.errors) >= 2


@needs_browser
def test_policy_stops_a_script_that_slipped_in(report: tuple[Path, int], tmp_path: Path) -> None:
    """Even if escaping failed, the page's policy would not run a script or load from elsewhere."""
    page = tmp_path / "slipped.html"
    text = report[0].read_text()
    evil = "<script>document.title = 'taken'</script>"
    evil += "<img src='https://example.invalid/x.png' onerror=\"document.title = 'taken'\">"
    page.write_text(text.replace("<main>", "<main>" + evil, 1))
    with Browser(1400) as browser:
        browser.open(page)
        assert browser.value("document.title") == "Clew report"
        assert any("Content Security Policy" in error for error in browser.errors)
