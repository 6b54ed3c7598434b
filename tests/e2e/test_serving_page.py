"""The page of a server in a real browser: a picture is added, a question sent, and the answer grows as `generate` gives it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.settings import Generation
from tests.support.random_chat import write_random_chat
from tests.support.served_model import Served, answers_alone, serving

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.parallel,
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium; apt-get install chromium"),
]

MAX_NEW_TOKENS = 12
KEY = "secret"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_random_chat(tmp_path_factory.mktemp("served") / "model", seed=1)


@pytest.fixture(scope="module")
def served(model):
    with serving(model, "--max-new-tokens", str(MAX_NEW_TOKENS), INTERNVL_MEGATRON_API_KEY=KEY) as started:
        yield started


@pytest.fixture
def complaints() -> list[str]:
    """What the browser complains of."""
    return []


@pytest.fixture
def page(served: Served, complaints: list[str]):
    """The page, just opened. Complaints that are left fail the test."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 640, "height": 760})
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        opened.goto(served.url, wait_until="networkidle")
        yield opened
        # Refusals are what some tests are about, and the first request of the page brings no key.
        assert [text for text in complaints if "Failed to load resource" not in text] == []
        browser.close()


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(5).integers(0, 256, (28, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("button", name="Send")).to_be_enabled(timeout=120_000)


def test_a_picture_is_asked_about(page, picture, model, run_ranks):
    page.get_by_label("Key of this server").fill(KEY)
    page.get_by_label("Add picture").set_input_files(picture)
    page.get_by_role("button", name="Remove picture 1").wait_for()
    ask(page, "how many digits?")
    first = Prompt("<image>\nhow many digits?", (str(picture),))
    settings = Generation(MAX_NEW_TOKENS)
    (expected,) = run_ranks(answers_alone, 1, model, [first], [settings])[0][0]
    answers = page.locator("li.assistant span")
    assert answers.all_text_contents() == [expected]
    assert page.get_by_role("img", name="Picture that was sent").count() == 1
    assert page.title() == model.name
    ask(page, "two?")
    second = Prompt("two?", first.images, history=((first.question, expected),))
    (expected_second,) = run_ranks(answers_alone, 1, model, [second], [settings])[0][0]
    assert answers.all_text_contents() == [expected, expected_second]
    page.get_by_role("button", name="New chat").click()
    assert answers.count() == 0


def test_what_is_refused_is_said_and_can_be_asked_again(page, tmp_path):
    assert "authorization" in page.get_by_text("must be Bearer").text_content()
    page.get_by_label("Key of this server").fill(KEY)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG nothing")
    page.get_by_label("Add picture").set_input_files(broken)
    page.get_by_role("button", name="Remove picture 1").wait_for()
    page.get_by_label("Message").fill("how many?")
    page.get_by_role("button", name="Send").click()
    page.get_by_role("alert").wait_for()
    assert "is no image that can be read" in page.get_by_role("alert").text_content()
    assert page.get_by_label("Message").input_value() == "how many?"
    page.get_by_role("button", name="Remove picture 1").click()
    ask(page, "how many?")
    assert page.locator("li.assistant span").count() == 1


def test_nothing_else_is_let_in(page, complaints):
    """The policy holds in the browser: other scripts, and other places to talk to, are blocked."""
    blocked = page.evaluate(
        """async () => {
            const script = document.createElement("script");
            script.textContent = "window.injected = true";
            document.body.append(script);
            const image = await fetch("data:text/plain,x").then(() => "let through", () => "blocked");
            return [window.injected ?? "blocked", image];
        }"""
    )
    assert blocked == ["blocked", "blocked"]
    refused = [text for text in complaints if "Content Security Policy" in text]
    assert len(refused) >= 2
    complaints.clear()
