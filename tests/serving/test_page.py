"""The page of the server in a real browser: a prompt, an adapter, progress, the picture, a token, a narrow window."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.test_server import Server, serving
from tests.support.services import browser
from tests.support.weights import make_adapter

pytestmark = pytest.mark.services
SHOTS = os.environ.get("DREAMBOOTH_SHOTS")  # folder for screenshots; docs/images/serve.png is of a trained adapter
TOKEN = "a-token-of-sixteen-characters"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    for number, name in enumerate(("blue-toy", "red-toy")):
        make_adapter(folder / "adapters" / name, number)
    with serving(folder, f"adapters={folder}/adapters", f"token={TOKEN}") as server:
        yield server


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    """The page, whose requests and errors are recorded, with the right token."""
    with browser() as page:
        page.hosts, page.faults = set(), []
        page.on("request", lambda request: page.hosts.add(request.url.split("/")[2]))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.goto(server.url)
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_label("Token").press("Tab")
        page.get_by_text("Model tiny-sd, adapters: 2").wait_for()
        yield page
        assert not page.faults and {host for host in page.hosts if host} == {server.url.removeprefix("http://")}


def test_a_prompt_and_an_adapter_give_progress_and_the_picture(page: Any, server: Server) -> None:
    seen: list[str] = []
    page.expose_function("seen", lambda text: seen.append(text))
    page.evaluate("new MutationObserver(() => seen(document.getElementById('status').textContent))"
                  ".observe(document.getElementById('status'), {childList: true, characterData: true, subtree: true})")
    page.get_by_label("Prompt", exact=True).fill("a photo of a zwx toy")
    page.get_by_label("Adapter", exact=True).select_option("red-toy")
    page.get_by_label("Steps").fill("6")
    page.get_by_label("Seed").fill("3")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    picture = page.get_by_role("img", name="a photo of a zwx toy")
    picture.wait_for()
    page.get_by_text("The picture is finished.").wait_for()
    assert {"Step 1 of 6.", "Step 6 of 6."} <= set(seen)
    assert picture.evaluate("image => image.naturalWidth") == 64
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "red-toy-seed3.png"
    expected = server.draw("a photo of a zwx toy", num_inference_steps=6, seed=3, adapter="red-toy", token=TOKEN)
    assert Path(download.value.path()).read_bytes() == expected.content
    page.get_by_role("button", name="Next seed").click()
    page.locator("figure").nth(1).wait_for()
    assert page.get_by_label("Seed").input_value() == "4"
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/serve.png")


def test_a_picture_can_be_cancelled_and_a_refusal_is_shown(page: Any) -> None:
    page.get_by_label("Prompt", exact=True).fill("toy " * 100)
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("tokens and the prompt has").wait_for()
    page.get_by_label("Prompt", exact=True).fill("a toy")
    page.get_by_label("Steps").fill("100")
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("of 100.").wait_for()
    page.get_by_role("button", name="Cancel").press("Enter")
    page.get_by_text("Cancelled.").wait_for()
    assert page.locator("figure").count() == 0 and not page.get_by_role("button", name="Draw").is_disabled()


def test_a_wrong_token_is_told_and_everything_fits_a_telephone(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.get_by_text("More settings").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for control in page.locator("input:visible, select:visible, textarea:visible, button:visible").all():
        box = control.bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["height"] >= 24
        assert control.evaluate("item => item.tagName == 'BUTTON' || item.labels.length == 1"), "without a label"
    page.get_by_label("Token").fill("wrong")
    page.get_by_label("Token").press("Tab")
    page.get_by_text("The token is missing or wrong", exact=False).wait_for()
