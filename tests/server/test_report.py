"""The report: what it holds, what it must not hold, and how it looks in a real browser."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import write_comparison, write_run

from fedgraft.errors import ConfigError
from server.report import write_report

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
CLOCK = re.compile(
    r"<!-- measured by the clock: begin -->.*?<!-- measured by the clock: end -->", re.S
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "comparison"
    write_comparison(folder, rounds=12)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> Path:
    return write_report([folder], folder / "report.html")


def test_it_holds_what_a_reader_looks_for(report: Path) -> None:
    text = report.read_text()
    headline = re.search(r"<h1>(.*?)</h1>", text, re.S)
    assert headline is not None
    assert "be told apart" in headline.group(1)
    for wanted in (
        "95% interval",
        "gain over base",
        "short of centralised",
        "MB up",
        "The untouched model.",
        "Each client trains only on its own data",
        "an upper bound",
        "no reply within 3600 s",
        "client 4: lora_B of encoder.0 holds NaN",
        "mirrored, lower contrast",
        "train.lr",
        "[compare.ffa-lora.train]",
        "2.9.0",
        "--strategies fedavg,ffa-lora,lora-fair",
    ):
        assert wanted in text, wanted


def test_it_is_one_file_without_scripts(report: Path) -> None:
    text = report.read_text()
    assert "<script" not in text
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", text)
    assert "url(" not in text
    assert "default-src 'none'" in text


def test_every_picture_is_described(report: Path) -> None:
    pictures = re.findall(r"<img ([^>]*)>", report.read_text())
    assert len(pictures) == 5
    for picture in pictures:
        alt = re.search(r'alt="([^"]*)"', picture)
        source = re.search(r'src="data:image/png;base64,([^"]*)"', picture)
        assert alt is not None
        assert source is not None
        assert len(alt.group(1)) > 40
        assert base64.b64decode(source.group(1)).startswith(b"\x89PNG")


def test_equal_results_give_equal_bytes(folder: Path, report: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere")
    again = write_report([tmp_path / "elsewhere"], tmp_path / "again.html")
    assert again.read_bytes() == report.read_bytes()


def test_the_clock_stays_in_its_own_table(tmp_path: Path) -> None:
    texts = []
    for name, slow in (("quick", 1.0), ("slow", 3.7)):
        write_run(tmp_path / name, rounds=3, clients=1, slow=slow)
        texts.append(write_report([tmp_path / name], tmp_path / f"{name}.html").read_text())
    assert texts[0] != texts[1]
    assert CLOCK.sub("", texts[0]) == CLOCK.sub("", texts[1])


def test_names_and_reasons_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    write_run(tmp_path / "run", rounds=2, descriptions=(evil,), label=evil, notes=[evil])
    rounds = tmp_path / "run" / "rounds.jsonl"
    rounds.write_text(
        rounds.read_text().replace('"refused": {}', f'"refused": {{"{evil}": "{evil}"}}')
    )
    text = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert "<img src=x" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 5


def test_one_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run", rounds=3)
    text = write_report([tmp_path / "run"], tmp_path / "deep" / "er" / "report.html").read_text()
    assert "One seed tells nothing" in text
    assert "95% interval" not in text
    assert "None: every sampled client replied" in text


def test_nothing_and_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a run or a comparison"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(ConfigError, match="is a folder"):
        write_report([folder], tmp_path)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium without a network."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    for program in (CHROMIUM, DRIVER):
        if not program.exists():
            pytest.skip(f"{program} is not installed (Debian: apt-get install chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tmp_path_factory.mktemp("browser")
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(str(DRIVER))
    driver = webdriver.Chrome(options=options, service=service)
    driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield driver
    driver.quit()


# Long labels, a hostile description and 30 clients are what breaks a layout.
@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crowded") / "comparison"
    write_comparison(
        folder,
        strategies=("fedavg strategy.option=0.004", "anotherverylongstrategyname" * 3, "c"),
        clients=30,
        rounds=4,
        descriptions=("x" * 300, "<script>alert(1)</script>"),
        prompts=("y" * 500, "\u202eover <script>alert(1)</script>\n\n\tand over", ""),
    )
    return write_report([folder], folder / "report.html")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("which", ["report", "crowded"])
def test_in_a_browser(
    browser: Any, request: pytest.FixtureRequest, which: str, width: int, scheme: str
) -> None:
    page: Path = request.getfixturevalue(which)
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.resolve().as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")

    assert browser.get_log("browser") == []
    pictures = browser.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])"
    )
    assert len(pictures) == 5
    assert all(
        whole and natural > 0 and 300 <= shown <= width for whole, natural, shown in pictures
    )

    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # What does not fit scrolls inside its own box, never under the edge of the page.
    outside = browser.execute_script(
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []

    sizes = browser.execute_script(
        "return [document.body, ...document.querySelectorAll('p, li, dd, dt, td, th, figcaption')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert sizes[0] >= 14
    assert min(sizes) >= 14
    headings = browser.execute_script(
        "return [...document.querySelectorAll('h1, h2')].map(h => h.innerText.trim())"
    )
    assert headings[0]
    assert {"Results", "How it went", "Client by client", "Make it again"} <= set(headings[1:])

    ink, paper = browser.execute_script(
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    )
    assert (luminance(ink) > luminance(paper)) == (scheme == "dark")
    light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) > 7  # WCAG's ratio for enhanced contrast


def luminance(colour: str) -> float:
    """Return WCAG's relative luminance of a colour like rgb(20, 23, 26)."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
