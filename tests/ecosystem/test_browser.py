"""The server's page in headless Chromium."""

import re
import shutil

import pytest
from helpers.server_process import Server
from helpers.serving import CHAT

import dph
from dph.model.loading import load_model, load_tokenizer

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="the server needs the extra serve")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, to drive a browser")
pytestmark = pytest.mark.ecosystem

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
INJECTED = 'a film? <img src=x onerror="document.title=1"><b>'


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    paths = [path for name in BROWSERS if (path := shutil.which(name))]
    if not paths:
        pytest.skip(f"needs a browser on the PATH: {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=paths[0], args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    with Server(models / "judge", tmp_path_factory.mktemp("server") / "log", "--max-candidates", 12) as server:
        yield server


@pytest.fixture(params=["light", "dark"])
def page(request, browser, server):
    """The page, without errors in its console."""
    context = browser.new_context(color_scheme=request.param)
    page, errors = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.errors = errors
    page.goto(server.url)
    page.locator("#head option").nth(1).wait_for(state="attached")
    yield page
    context.close()


def color(page, selector, name):
    """Brightness from 0 to 765 of a colour of an element."""
    value = page.eval_on_selector(selector, f"element => getComputedStyle(element).{name}")
    return sum(map(int, re.findall(r"\d+", value)[:3]))


def wait_for_status(page, text):
    page.locator("#status").filter(has_text=text).wait_for()


def test_candidates_arrive_with_their_rewards(page, models):
    assert (color(page, "body", "color") > color(page, "body", "backgroundColor")) == page.evaluate(
        "matchMedia('(prefers-color-scheme: dark)').matches"
    )
    # By keyboard alone: the prompt has the focus, and Tab goes through the options.
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type(INJECTED)
    for value in ("6", "short", "20", "1", "4", "7"):
        page.keyboard.press("Tab")
        if value == "short":
            page.keyboard.press("ArrowDown")
        else:
            page.keyboard.press("Control+A")
            page.keyboard.type(value)
    page.keyboard.press("Enter")
    wait_for_status(page, "is the best of 6")
    expected = dph.best_of_n(
        load_model(models / "judge").eval(),
        load_tokenizer(models / "judge"),
        [{"role": "user", "content": INJECTED}],
        6,
        head="short",
        seed=7,
        max_new_tokens=20,
        prune_every=4,
    )
    assert page.eval_on_selector_all("#candidates .text", "all => all.map(one => one.textContent)") == [
        one.text for one in expected
    ]
    pruned = page.locator("li.pruned")
    assert pruned.count() == sum(one.pruned for one in expected) > 0
    assert page.locator("li .state").first.text_content().startswith("best, ")
    rewards = [one.reward for one in expected if one.finished]
    bars = page.eval_on_selector_all("meter", "all => all.map(one => [one.value, one.getAttribute('aria-label')])")
    assert [bar[0] for bar in bars] == pytest.approx(rewards)
    assert all(label.startswith("Reward of candidate ") for _, label in bars)
    assert page.locator("#candidates img, #candidates b").count() == 0
    assert page.title() == "Best of N"
    assert page.errors == []


def test_every_field_has_a_name_for_screen_readers(page):
    tree = page.locator("main").aria_snapshot()
    for name in ("Prompt", "Candidates (N)", "Reward head", "Longest answer, tokens", "Temperature", "Seed", "API key"):
        assert name in tree
    assert "status" in tree


def test_errors_and_stopping(page):
    page.fill("#prompt", "a film?")
    page.fill("#tokens", "2000")
    page.fill("#temperature", "0.3")
    page.click("#send")
    page.wait_for_selector("#candidates .text:not(:empty)")
    page.click("#stop")
    wait_for_status(page, "Stopped.")
    assert "growing" not in page.locator("#candidates").text_content()
    page.fill("#prompt", "film " * 5000)
    page.fill("#tokens", "20")
    page.click("#send")
    wait_for_status(page, "expected at most 4096 tokens")
    assert page.get_attribute("#status", "class") == "error"
    assert CHAT["model"] in page.text_content("#model")
