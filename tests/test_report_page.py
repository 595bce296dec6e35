"""The report page in a real browser: it draws the whole study, answers to clicks and keys, and asks nothing of a network."""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from example_study import study_result
from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from autoprune.measure.latency import LatencyTable, plan_keys
from autoprune.pruning.plan import compile_plan
from autoprune.search.records import DimensionRow, StudyResult
from autoprune.search.report_page import PageDetails, Pictures, save_report_page, scale_times

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"> a ring & <b>cross</b>"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars"]
GREEN = {4: 0.04, 5: 0.1, 7: 0.2}  # trials of the example's tiers, and what their pictures add to dense ones


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Chrome]:
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in paths.values():
        pytest.skip("no browser here: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = paths["chromium"]
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(paths["chromedriver"]))
    yield driver
    driver.quit()


def details(result: StudyResult) -> PageDetails:
    """Returns two prompts' pictures in plain colours, red for dense, and a table in which scale n takes n + 1 ms."""
    dense = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(2, 3, 48, 48)
    policies = {trial: dense + torch.tensor([0.0, green, 0.0]).view(3, 1, 1) for trial, green in GREEN.items()}
    table = LatencyTable(0.6)
    for trial in (0, *GREEN):
        plan = compile_plan(result.trials[trial].policy, result.trials[trial].policy.scale_schedule, 6)
        seconds = [0.001 * (scale.index + 1) for scale in plan.scales] + [0.002]
        table.add(list(zip(plan_keys(plan), seconds, strict=True)), slowness=1.0)
    return PageDetails(
        {"device": "2-core test CPU", "search prompts": f"48 from {HOSTILE}"},
        {"Search again": "python -m autoprune study.name='x y'"},
        scale_times(result, table),
        Pictures([HOSTILE, "a red circle"], dense, policies),
    )


def example(folder: Path) -> StudyResult:
    rows = (DimensionRow("skip_last", 4, 0.7, 0.1, 0.3), DimensionRow("keep_6", 6, 0.2, 0.6, 0.05))
    result = study_result(folder)
    front = [replace(each, held_out=replace(each.held_out, loss_interval=(0.2, 0.25))) for each in result.front]
    return replace(result, front=tuple(front), dimensions=rows)


def opened(
    browser: Chrome, page: Path, *, width: int = 1280, height: int = 900, scheme: str = "light", motion: str = ""
) -> None:
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sized(width, height))
    features = [{"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": motion}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())
    assert find(browser, "#front svg .mark"), "the front is drawn"


def sized(width: int, height: int) -> dict[str, object]:
    return {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}


def find(browser: Chrome, selector: str) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def texts(browser: Chrome, selector: str) -> list[str]:
    return [element.text for element in find(browser, selector)]


def colour(element: WebElement) -> tuple[int, ...]:
    shown = Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB")
    return shown.getpixel((shown.width // 2, shown.height // 2))


def complaints(browser: Chrome) -> list[dict]:
    return [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def requests(browser: Chrome) -> set[str]:
    """Returns the schemes of everything the browser asked for so far."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    return {url.partition(":")[0] for url in urls}


@pytest.fixture
def page(tmp_path) -> Path:
    result = example(tmp_path)
    return save_report_page(result, details(result), tmp_path / "report.html")


def test_a_clicked_point_shows_its_policy_and_its_pictures(browser, page):
    opened(browser, page)
    marks = {mark.get_attribute("data-trial"): mark for mark in find(browser, "#front .mark")}
    assert set(marks) == {str(number) for number in range(10)}, "every measured trial is a point"
    marks["7"].click()
    assert texts(browser, "#chosen h3") == ["fast, trial 7"]
    assert texts(browser, "#chosen li") == [
        "scale 5 (12x12): keep 31 % (dc, sublayer, area from scale 4)",
        "scale 6 (16x16): keep 20 % (dc, sublayer, layers 1-4, bicubic from scale 4)",
        "from scale 4: cond branch only",
    ]
    numbers = texts(browser, "#chosen tr")
    assert any("score drop" in row and "+3.0 [+1.0, +5.0]" in row for row in numbers)
    assert any("loss" in row and "0.2200" in row and "0.2250 [0.2000, 0.2500]" in row for row in numbers), (
        "search and held-out loss"
    )
    alternatives = [image.get_attribute("alt") for image in find(browser, ".wall .policy")]
    assert alternatives == [f"policy: {HOSTILE}", "policy: a red circle"]
    marks["8"].click()
    assert texts(browser, "#chosen h3") == ["sampler, trial 8"] and not find(browser, ".wall")
    assert not complaints(browser) and browser.title != "taken"
    asked = requests(browser)
    tab = {"chrome", "chrome-untrusted"}  # the empty one it starts with
    assert "file" in asked and asked <= {"file", "data", *tab}


def test_the_slider_goes_from_dense_over_policy_to_difference(browser, page):
    opened(browser, page)
    find(browser, '[data-trial="7"]')[0].click()
    slider, picture = find(browser, ".slider input")[0], find(browser, ".wall .stack")[0]
    assert colour(picture) == (255, 51, 0), "a policy's picture comes first"
    slider.send_keys(Keys.HOME)
    assert colour(picture) == (255, 0, 0)
    slider.send_keys(Keys.END)
    assert colour(picture) == (51, 51, 51), "three times the mean of 0, 0.2 and 0"
    assert slider.get_attribute("aria-valuetext") == "difference x 3"
    dense = next(each for each in find(browser, ".stops button") if each.text == "dense")
    dense.click()
    assert colour(picture) == (255, 0, 0) and dense.get_attribute("aria-pressed") == "true"


GREYS = (0.2, 0.4, 0.6, 0.8, 1.0)


@pytest.fixture
def clip_page(tmp_path) -> Path:
    """A page of one prompt's videos: five shades of red for dense, a policy adds green."""
    result = example(tmp_path)
    dense = torch.zeros(1, 3, len(GREYS), 48, 96)
    dense[0, 0] = torch.tensor(GREYS)[:, None, None]
    policies = {trial: dense + torch.tensor([0.0, green, 0.0]).view(3, 1, 1, 1) for trial, green in GREEN.items()}
    pictures = Pictures([HOSTILE], dense, policies, 10.0)
    return save_report_page(result, replace(details(result), pictures=pictures), tmp_path / "report.html")


def test_videos_play_stand_still_and_are_slid_frame_by_frame(browser, clip_page):
    opened(browser, clip_page)
    find(browser, '[data-trial="7"]')[0].click()
    (play,), (place,), (stack,) = find(browser, "#clip button"), find(browser, "#clip input"), find(browser, ".wall .stack")
    assert play.text == "Play" and play.get_attribute("aria-pressed") == "true"
    assert stack.size["width"] == 2 * stack.size["height"], "one frame is seen"
    seen = set()
    WebDriverWait(browser, 20, 0.13).until(lambda _: seen.add(place.get_attribute("value")) or len(seen) == len(GREYS))
    play.click()
    stopped = int(place.get_attribute("value"))
    assert play.get_attribute("aria-pressed") == "false"
    assert colour(stack) == (round(255 * GREYS[stopped]), 51, 0), "a policy's frame"
    place.send_keys(Keys.HOME)
    reds = []
    for _ in GREYS:
        reds.append(colour(stack))
        place.send_keys(Keys.ARROW_RIGHT)
    assert reds == [(round(255 * grey), 51, 0) for grey in GREYS]
    find(browser, ".slider input")[0].send_keys(Keys.HOME)
    assert colour(stack) == (255, 0, 0), "dense, the same frame"
    find(browser, '[data-trial="5"]')[0].click()
    (other,) = find(browser, ".wall .stack")
    assert colour(other) == (255, 26, 0), "another tier goes on where this one stood"
    play.click()
    WebDriverWait(browser, 20).until(lambda _: place.get_attribute("value") != "4")
    assert not complaints(browser) and requests(browser) <= {"file", "data", "chrome", "chrome-untrusted"}


def test_videos_stand_still_for_who_wants_no_motion(browser, clip_page):
    opened(browser, clip_page, motion="reduce")
    assert find(browser, "#clip button")[0].get_attribute("aria-pressed") == "false"
    assert find(browser, "#clip input")[0].get_attribute("value") == "0"


def test_images_have_nothing_to_play(browser, page):
    opened(browser, page)
    assert not find(browser, "#clip")[0].is_displayed()


def test_keys_go_from_point_to_point_and_hovering_shows_the_schedule(browser, page):
    opened(browser, page)
    (start,) = find(browser, '#front [tabindex="0"]')
    start.send_keys(Keys.HOME)
    assert browser.switch_to.active_element.get_attribute("data-trial") == "0", "dense is the slowest"
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    focused = browser.switch_to.active_element
    assert focused.get_attribute("data-trial") == "8" and "1.05x, loss 0.200" in find(browser, ".tip")[0].text
    assert "scale 6 (16x16): keep 90 %" in find(browser, ".tip")[0].text
    focused.send_keys(Keys.ENTER)
    assert texts(browser, "#chosen h3") == ["sampler, trial 8"]


def test_kinds_can_be_hidden(browser, page):
    opened(browser, page)
    find(browser, "#legend button")[0].click()
    left = {mark.get_attribute("data-trial") for mark in find(browser, "#front .mark")}
    assert left == {"0", "1", "2", "3", "4", "5", "6", "7", "8"}, "the one outside the constraints is gone"


def test_times_importances_conditions_and_commands_are_there(browser, page):
    opened(browser, page)
    assert [row.split("\n") for row in texts(browser, "#times .row > div:first-child")] == [
        ["dense", "30.0 ms"],
        ["lossless, high", "30.0 ms"],
        ["balanced", "30.0 ms"],
        ["fast", "30.0 ms"],
    ]
    assert texts(browser, "#dimensions tbody th") == ["skip_last (4)", "keep_6 (6)"]
    assert texts(browser, "#dimensions td") == ["30.0 %", "70.0 %", "10.0 %", "5.0 %", "20.0 %", "60.0 %"]
    assert f"48 from {HOSTILE}" in texts(browser, "#conditions dd")
    assert texts(browser, "#commands code") == ["python -m autoprune study.name='x y'"]
    (copy,) = find(browser, "#commands button")
    copy.click()
    WebDriverWait(browser, 10).until(lambda _: copy.text in ("Copied", "Selected"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_in_one_direction_only(browser, page, scheme):
    opened(browser, page, width=390, height=844, scheme=scheme)
    find(browser, '[data-trial="5"]')[0].click()
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= 390
    bright = browser.execute_script("return getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")
    assert (int(bright[0]) > 128) == (scheme == "light")
    assert not complaints(browser)


def test_a_stopped_study_shows_what_its_search_measured(browser, tmp_path):
    result = replace(example(tmp_path), front=(), presets={}, dimensions=(), interrupted=True)
    bare = PageDetails({"device": "2-core test CPU"}, {"Go on": "python -m autoprune"})
    opened(browser, save_report_page(result, bare, tmp_path / "report.html"))
    assert texts(browser, "#status")[0].startswith("This study was stopped: all numbers are from the prompts of the search.")
    assert [button for button in texts(browser, "#legend button") if "front" in button] == ["front of the search prompts"]
    leading = {mark.get_attribute("data-trial") for mark in find(browser, "#front .search-front")}
    assert leading == {"4", "5", "6", "7"}
    assert not find(browser, "#pictures-section")[0].is_displayed() and not find(browser, "#times-section")[0].is_displayed()
    assert not complaints(browser)
