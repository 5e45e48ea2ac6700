"""The page in a real browser, against the real stack with the embedded model.

"a gangster" with seed 3 is what it is all about: without safety the picture has what the check
calls violence, at level strong the gangster is there and the gun is not.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")

PICTURES = "Array.from(document.querySelectorAll('.picture'), p => [p.naturalWidth, p.src, p.alt])"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
CUT = "getComputedStyle(document.querySelector('.layer.b')).clipPath"


def draw(page):
    page.click("#go")
    page.wait_for_selector("#results :is(.facts, .alert)")


def report(page, key):
    """The report as JSON, as the page shows it for a side."""
    return json.loads(page.locator(f'pre[aria-label="Report as JSON, {key}"]').text_content())


def test_two_levels_their_pictures_and_what_was_seen(open_page, service, tmp_path):
    page = open_page()
    page.get_by_label("Withhold pictures that a check flags").uncheck()
    draw(page)

    (width_a, a, alt_a), (width_b, b, alt_b) = page.evaluate(PICTURES)
    assert width_a == width_b == 64 and a != b
    assert alt_a == "A: a gangster, level off, seed 3"
    assert alt_b == "B: a gangster, level strong, seed 3"

    before = page.evaluate(CUT)
    page.locator(".cut").fill("80")
    assert page.evaluate(CUT) == before.replace("50%", "80%") != before

    assert page.locator(".layer.b .heat").is_hidden()
    page.get_by_text("Heat map", exact=True).click()
    assert page.locator(".layer.b .heat").is_visible()
    assert page.locator(".layer.a .heat").count() == 0  # nothing acted on it
    assert page.get_by_text("most, in this picture").is_visible()

    assert page.locator("svg.plot > title").all_text_contents() == [
        f"{name} a denoiser call" for name in ("Cosine", "Share undone", "Momentum")
    ]
    assert page.locator("svg.plot rect.warmup.b").count() == 3
    row = page.locator(".checks tr", has_text="violence").inner_text()
    [check] = report(page, "A")["images"][0]["safety"]["checks"]
    assert f"{check['scores']['violence']:.2f}" in row
    assert "above 0.29" in row and "below 0.29" in row

    told = report(page, "B")
    made = httpx.get(service + told["links"]["self"], trust_env=False).json()
    assert told["safety"] == made["safety"] and told["images"] == made["images"]

    # What is there to copy makes the very same picture again.
    page.locator("summary", has_text="Python").last.click()
    page.get_by_role("button", name="Copy Python, B").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", copied], cwd=tmp_path, env=environment, check=True)
    again = (tmp_path / "3.png").read_bytes()
    assert again == httpx.get(service + made["images"][0]["url"], trust_env=False).content
    curl = page.locator('pre[aria-label="cURL, B"]').text_content()
    answer = subprocess.run(["bash", "-c", curl], capture_output=True, check=True).stdout
    assert json.loads(answer)["images"][0]["sha256"] == made["images"][0]["sha256"]


def test_a_withheld_picture_says_which_check_category_score_and_threshold(open_page):
    page = open_page()
    draw(page)
    blocked = report(page, "A")["images"][0]["blocked"]
    shown = page.locator(".layer.a .withheld").inner_text()
    assert "Picture withheld" in shown and blocked["check"] in shown
    assert blocked["category"] == "violence" and "violence" in shown
    assert f"score {blocked['score']:.2f}" in shown
    assert f"threshold {blocked['threshold']:.2f}" in shown
    assert len(page.evaluate(PICTURES)) == 1
    assert page.locator("#told").inner_text() == "Drawn. Withheld by a check: off."


def test_with_the_keyboard_alone(open_page):
    page = open_page()

    def press(key: str, until: str) -> None:
        for _ in range(40):
            if page.evaluate("s => document.activeElement.matches(s)", until):
                return
            page.keyboard.press(key)
        raise AssertionError(f"{key} never reaches {until}")

    press("Tab", "#prompt textarea")
    page.keyboard.press("Control+A")
    page.keyboard.type("a panda in the snow")
    press("Tab", "#level-b input")
    press("ArrowRight", "#level-b input[value=max]")
    press("Tab", "#go")
    page.keyboard.press("Enter")
    page.wait_for_selector("#results .facts")
    assert page.evaluate(PICTURES)[1][2] == "B: a panda in the snow, level max, seed 3"
    press("Tab", ".cut")
    page.keyboard.press("End")
    assert "100%" in page.evaluate(CUT)
    press("Tab", ".show-heat")
    page.keyboard.press("Space")
    assert page.locator(".layer.b .heat").is_visible()
    press("Tab", "summary")
    page.keyboard.press("Enter")
    assert page.locator("details pre").first.is_visible()


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_axe_finds_nothing_serious_and_nothing_overflows(open_page, width, scheme):
    page = open_page(width, scheme)
    page.click("#more button")
    draw(page)
    page.locator("details").evaluate_all("all => all.forEach(each => each.open = true)")
    assert page.evaluate(OVERFLOW) <= 0
    ground = page.evaluate("getComputedStyle(document.querySelector('gradio-app')).backgroundColor")
    assert ground == {"light": "rgb(247, 245, 240)", "dark": "rgb(21, 22, 19)"}[scheme]
    found = axe.Axe().run(page).response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert [(each["id"], [n["html"][:200] for n in each["nodes"]]) for each in serious] == []


def test_a_generation_is_seen_to_come_along_and_can_be_stopped(open_page):
    page = open_page()
    page.click("#more button")
    page.get_by_label("number input for Steps").fill("100")
    page.get_by_label("number input for Steps").press("Tab")
    page.click("#go")
    page.wait_for_function(
        "() => [...document.querySelectorAll('[role=progressbar]')]"
        ".some(bar => bar.ariaValueNow > 0 && bar.ariaValueNow < 100)"
    )
    page.click("#stop")
    page.wait_for_selector("#results .alert")
    assert "Stopped" in page.locator("#results .alert").inner_text()
    assert page.locator("#go").is_visible()


def test_a_service_that_is_gone_is_said_in_human_words(open_page, stack):
    """The last of the file, since the stack stays down."""
    url, pid = stack
    page = open_page()
    os.killpg(pid, signal.SIGTERM)
    while True:
        try:
            httpx.get(f"{url}/healthz", trust_env=False)
        except httpx.TransportError:
            break
    draw(page)
    shown = page.locator("#results [role=alert]").inner_text()
    assert "The service is away" in shown and url in shown and "make run" in shown
    page.reload()
    page.wait_for_selector("#results [role=alert]")
    assert page.locator("#service").inner_text() == "service away"
