"""The page in a real headless Chromium: what it shows, says and sends, on a phone and on a desktop."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import NEEDED, PHONE, Browser, started
from waiting import PATIENCE_S, wait_until

from scoreray.data.fields.normalisation import Normaliser
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.samplers.options import options_of
from scoreray.sampling.samplers.sample import SAMPLERS
from scoreray.sampling.service.access import hash_of
from scoreray.sampling.service.batcher import StepBatcher
from scoreray.sampling.service.config import Limits, ServeConfig
from scoreray.trainer.config.run_fields import TargetField
from scoreray.trainer.diffusion.condition import ConditionSpec

pytestmark = NEEDED

DESKTOP = (1280, 800)
WIDTHS = (320, 390, 820, 1280)
LONG = "a-word-that-does-not-break-" * 6
SECRET = "a-secret-of-thirty-characters!"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One for all tests: each of its starts takes longer than most of them."""
    with started() as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    chromium.clear()
    return chromium


@pytest.fixture(scope="module")
def run_url(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return os.environ.get("SCORERAY_PAGE_MODEL") or new_run(str(tmp_path_factory.mktemp("runs") / "small"))


@pytest.fixture(scope="module")
def long_names_url(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    classes = [LONG + "0", "many words " * 20, "1"]
    return new_run(str(tmp_path_factory.mktemp("runs") / "long"), shape=(3, 16, 16), classes=classes)


def config(url: str, **settings: Any) -> ServeConfig:
    return ServeConfig((("small", url),), precision="fp32", compile="off", **settings)


def keep(browser: Browser, name: str) -> None:
    """A picture of the whole page, where a person asked for them."""
    if folder := os.environ.get("SCORERAY_SCREENSHOTS"):
        browser.picture(Path(folder, f"{name}.png"))


@pytest.mark.parametrize(("name", "size"), [("phone", PHONE), ("desktop", DESKTOP)])
def test_samples_form_on_the_page(
    browser: Browser, run_url: str, served: Any, name: str, size: tuple[int, int]
) -> None:
    browser.size(*size)
    with served(config(run_url)) as (url, _):
        browser.open(url)
        browser.until("!document.querySelector('#draw').disabled")
        assert "No samples yet" in browser.text("#view")
        assert browser.run("return document.querySelectorAll('#sampler option').length") > 10
        for field in ("#adapter-field", "#size-field"):
            assert browser.run(f"return document.querySelector('{field}').hidden")
        keep(browser, f"{name}-empty")
        browser.type("#count", "6")
        browser.type("#steps", "24")
        browser.type("#seed", "5")
        curl = browser.text("#curl")
        assert '"count":6' in curl
        assert '"seed":5' in curl
        browser.until("document.querySelector('#cost').innerText.includes('47 calls of the network. 282 rows')")
        browser.click("#draw")
        browser.until("document.querySelectorAll('#strip li').length >= 2")
        keep(browser, f"{name}-drawing")
        browser.until("document.querySelectorAll('#samples img').length === 6")
        assert "6 samples in" in browser.text("#status")
        assert " · 47 calls each · " in browser.text("#status")
        assert browser.text("#draw") == "Draw"
        shown = browser.run("return [...document.querySelectorAll('#samples img')].map(i => i.naturalWidth > 0)")
        assert all(shown)
        strip = browser.run("return document.querySelectorAll('#strip li').length")
        assert strip >= 4
        keep(browser, f"{name}-samples")
        browser.click("#strip li:first-child button")
        browser.until("document.querySelector('#view img.sheet')")
        wide = browser.run("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1], "nothing is wider than the screen"
        outside = browser.run(
            "return performance.getEntriesByType('resource').map(r => r.name)"
            ".filter(n => !n.startsWith(location.origin) && !n.startsWith('data:'))"
        )
        assert outside == []
        unnamed = browser.run(
            "return [...document.querySelectorAll('input, select, textarea')]"
            ".filter(e => !e.labels.length && !e.ariaLabel).map(e => e.id)"
        )
        assert unnamed == []
        assert browser.errors() == []


def test_many_samples_are_large_enough_to_see(browser: Browser, run_url: str, served: Any) -> None:
    with served(config(run_url)) as (url, _):
        browser.size(*PHONE)
        browser.open(url)
        browser.until("!document.querySelector('#draw').disabled")
        browser.type("#count", "256")
        browser.type("#steps", "8")
        browser.click("#draw")
        browser.until("document.querySelectorAll('#samples img').length === 256")
        for name, size in (("phone", PHONE), ("desktop", DESKTOP)):
            browser.size(*size)
            browser.until(f"innerWidth === {size[0]}")
            sizes = browser.run("return [...document.querySelectorAll('#samples img')].map(i => i.clientWidth)")
            assert min(sizes) >= 64, (name, min(sizes))
            seen = browser.run(
                "return [...document.querySelectorAll('#strip li')].map(e => e.getBoundingClientRect())"
                ".every(r => r.left >= 0 && r.right <= innerWidth)"
            )
            assert seen, f"{name}: the strip from noise to image is seen as a whole"
            keep(browser, f"{name}-many")


def test_a_limit_of_calls_chooses_how_to_draw(browser: Browser, run_url: str, served: Any) -> None:
    browser.size(*PHONE)
    with served(config(run_url)) as (url, _):
        open_page(browser, url)
        browser.type("#count", "3")
        browser.type("#guidance", "2")
        for budget, chosen in (("1", ["dpmpp_2m", "1", "interior"]), ("20", ["unipc", "20", "interior"])):
            browser.type("#budget", budget)
            browser.until(f"document.querySelector('#steps').value === '{budget}'")
            fields = "[...document.querySelectorAll('#sampler, #steps, #grid')]"
            assert browser.run(f"return {fields}.map(e => e.value)") == chosen
            assert browser.run(f"return {fields}.every(e => e.disabled)")
            assert f'"max_calls":{budget}' in browser.text("#curl")
            assert "sampler" not in browser.text("#curl")
            each = "1 call" if budget == "1" else f"{budget} calls"
            rows = f"{each} of the network, each 2 rows for guidance. {6 * int(budget)} rows in all."
            assert rows in browser.text("#cost")
            browser.click("#draw")
            browser.until(f"document.querySelector('#status').innerText.includes('{each} each')")
            browser.until("document.querySelector('#draw').innerText === 'Draw'")
            keep(browser, f"phone-{budget}-calls")
        browser.type("#budget", "0")
        assert browser.text("#curl").startswith("Calls at most: ")
        choose(browser, "#budget", "")
        browser.until("document.querySelector('#cost').innerText.includes('35 calls')")
        assert browser.run(f"return {fields}.map(e => e.value)") == ["heun", "18", ""]
        assert browser.errors() == []


def test_a_wrong_number_is_not_offered_as_a_curl_line(browser: Browser, run_url: str, served: Any) -> None:
    with served(config(run_url)) as (url, _):
        browser.open(url)
        browser.until("!document.querySelector('#draw').disabled")
        for field, wrong, right in (("count", "999", "3"), ("steps", "1.5", "4"), ("seed", "-1", "5")):
            browser.type(f"#{field}", wrong)
            shown = browser.text("#curl")
            assert "curl" not in shown
            assert shown.startswith({"count": "Samples: ", "steps": "Steps: ", "seed": "Seed: "}[field])
            assert browser.run("return document.querySelector('#copy').disabled")
            browser.type(f"#{field}", right)
            assert f'"{field}":{right}' in browser.text("#curl")
            assert not browser.run("return document.querySelector('#copy').disabled")


def test_the_curl_line_draws_the_same_samples(browser: Browser, run_url: str, tmp_path: Path, served: Any) -> None:
    with served(config(run_url)) as (url, _):
        browser.open(url)
        browser.until("!document.querySelector('#draw').disabled")
        browser.type("#count", "2")
        browser.run("document.querySelector('#class').selectedIndex = 2")
        browser.type("#guidance", "1.5")
        answers = []
        for name in ("a", "b"):
            command = browser.run("showCurl(); return document.querySelector('#curl').textContent")
            subprocess.run(["sh", "-c", command + f" -s -o {name}.png"], cwd=tmp_path, check=True)
            answers.append((tmp_path / "samples.png").read_bytes())
        assert answers[0] == answers[1]
        assert answers[0].startswith(b"\x89PNG")
        assert '"class_label":1' in command
        assert '"guidance":1.5' in command


def test_a_token_is_asked_for_and_the_keyboard_suffices(browser: Browser, run_url: str, served: Any) -> None:
    settings = config(run_url, tokens=(("me", hash_of(SECRET)),))
    with served(settings) as (url, _):
        browser.open(url)
        browser.until("!document.querySelector('#token-form').hidden")
        keep(browser, "token")
        focused = browser.run("return document.activeElement.id")
        assert focused == "token"
        browser.type("#token", "wrong-wrong-wrong-wrong\ue007")
        browser.until("document.querySelector('#notice').innerText.includes('not accepted')")
        browser.type("#token", SECRET + "\ue007")  # Enter
        browser.until("!document.querySelector('#draw').disabled")
        browser.type("#count", "1\ue007")
        browser.until("document.querySelectorAll('#samples img').length === 1")
        assert SECRET not in browser.run("return document.documentElement.outerHTML")


def test_busy_error_and_stop(browser: Browser, run_url: str, served: Any) -> None:
    with served(
        config(run_url, limits=Limits(token_requests=1, max_count=8, max_steps=1000, max_request_s=PATIENCE_S))
    ) as (url, service):
        browser.open(url)
        browser.until("!document.querySelector('#draw').disabled")
        browser.run("document.querySelector('#count').max = 99")
        browser.type("#count", "9")
        browser.click("#draw")
        browser.until("document.querySelector('#notice.error')?.innerText.includes('at most 8')")
        keep(browser, "error")
        service.draining = True
        browser.type("#count", "8")
        browser.type("#steps", "1000")
        browser.click("#draw")
        browser.until("document.querySelector('#notice.busy')?.innerText.includes('Trying again in')")
        keep(browser, "busy")
        service.draining = False
        browser.click("#notice button")
        browser.until("document.querySelectorAll('#strip li').length >= 1")
        browser.click("#draw")
        browser.until("document.querySelector('#status').innerText === 'Stopped.'")
        wait_until(lambda: not service.under_way(), "the stopped request ends")


def choose(browser: Browser, field: str, value: str) -> None:
    browser.run(
        "const field = document.querySelector(arguments[0]); field.value = arguments[1];"
        "for (const name of ['change', 'input']) field.dispatchEvent(new Event(name, {bubbles: true}))",
        field,
        value,
    )


def captions(browser: Browser) -> list[str]:
    return browser.run("return [...document.querySelectorAll('#samples figcaption')].map(e => e.textContent)")


def open_page(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.until("!document.querySelector('#draw').disabled")


def assert_all_in_sight(browser: Browser, what: str) -> None:
    """At every width nothing makes the page scroll sideways, and no picture, field or word is cut by its box."""
    for width in WIDTHS:
        browser.size(width, 800)
        found = browser.run(
            "return [document.documentElement.scrollWidth, innerWidth, [...document.querySelectorAll("
            "'header *, main *')].filter(e => e.offsetParent && e.getBoundingClientRect().right > innerWidth + 0.5)"
            ".map(e => e.outerHTML.slice(0, 80))]"
        )
        assert found[0] <= found[1] == width, f"{what} at {width}: {found[2][:4]}"
        assert found[2] == [], f"{what} at {width}"
        view = browser.run(
            "const box = document.querySelector('#view').getBoundingClientRect(); return [...document.querySelectorAll("
            "'#view img, #view canvas, #view p')].map(e => e.getBoundingClientRect())"
            ".every(r => r.left >= box.left && r.right <= box.right)"
        )
        assert view, f"{what} at {width}: the sheet is cut"
        keep(browser, f"{what}-{width}")


def test_nothing_is_wider_than_the_screen_with_long_names_and_many_samples(
    browser: Browser, long_names_url: str, run_url: str, served: Any
) -> None:
    settings = replace(config(run_url), models=((f"model-{LONG}", long_names_url), ("small", run_url)))
    with served(settings) as (url, _):
        open_page(browser, url)
        browser.run("document.querySelector('#options-box').open = true")
        assert_all_in_sight(browser, "empty")
        for count in (3, 70):
            browser.type("#count", str(count))
            browser.type("#steps", "6")
            browser.click("#draw")
            browser.until(f"document.querySelectorAll('#samples img').length === {count}")
            assert captions(browser)[:3] == [LONG + "0", "many words " * 20, "1"]
            assert_all_in_sight(browser, f"{count}-samples")
        browser.click("#strip li:first-child button")
        browser.until("document.querySelector('#view img.sheet')")
        assert_all_in_sight(browser, "sheet")
        browser.run("notice('error', arguments[0], ['Try again', () => {}])", LONG * 4)
        assert_all_in_sight(browser, "notice")
        assert browser.errors() == []


def test_a_model_of_few_steps_shows_its_own_sampler_and_calls(
    browser: Browser, long_names_url: str, run_url: str, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = property(lambda info: "consistency" if info.url.startswith(long_names_url) else "none")
    monkeypatch.setattr(ModelInfo, "map", few)
    settings = replace(config(run_url), models=(("small", run_url), ("few", long_names_url)))
    fields = "[...document.querySelectorAll('#sampler, #steps')].map(e => e.value)"
    with served(settings) as (url, _):
        open_page(browser, url)
        browser.type("#count", "1")
        browser.until("document.querySelector('#cost b')?.innerText === '35 calls'")
        choose(browser, "#model", "few")
        browser.until("document.querySelector('#cost b')?.innerText === '2 calls'")
        assert browser.run(f"return {fields}") == ["consistency", "2"]
        assert browser.run("return document.querySelectorAll('#sampler option').length") == 1
        browser.click("#draw")
        browser.until("document.querySelector('#status').innerText.includes(' · 2 calls each · ')")
        keep(browser, "few-steps")
        browser.type("#budget", "3")
        browser.until("document.querySelector('#cost b')?.innerText === '3 calls'")
        choose(browser, "#model", "small")
        browser.until("document.querySelector('#sampler').value === 'dpmpp_2m'")
        choose(browser, "#budget", "")
        browser.until("document.querySelector('#cost b')?.innerText === '35 calls'")
        assert browser.run(f"return {fields}") == ["heun", "18"]
        assert browser.errors() == []


def test_another_model_chosen_meanwhile_leaves_the_pictures_their_names(
    browser: Browser, long_names_url: str, run_url: str, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing stops half way until the model has changed."""
    step, changed = StepBatcher.step, threading.Event()

    def held(batcher: StepBatcher) -> bool:
        if batcher.calls >= 20:
            changed.wait(PATIENCE_S)
        return step(batcher)

    monkeypatch.setattr(StepBatcher, "step", held)
    settings = replace(config(run_url), models=(("small", run_url), ("long", long_names_url)))
    with served(settings) as (url, _):
        open_page(browser, url)
        browser.type("#count", "3")
        browser.type("#steps", "20")
        browser.click("#draw")
        browser.until("document.querySelectorAll('#strip li').length >= 1")
        choose(browser, "#model", "long")
        assert browser.run("return document.querySelector('#samples') === null"), "it is drawn while the model changes"
        changed.set()
        browser.until("document.querySelectorAll('#samples img').length === 3")
        own = ["class-0", "class-1", "class-2"]
        assert captions(browser) == own
        assert browser.run("return [...document.querySelectorAll('#samples img')].map(i => i.naturalHeight)") == [8] * 3
        browser.click("#strip li:first-child button")
        browser.until("document.querySelector('#view img.sheet')")
        browser.click("#strip li:last-child button")
        browser.until("document.querySelector('#samples')")
        assert captions(browser) == own
        assert '"model":"long"' in browser.text("#curl")
        assert LONG + "0" in browser.run("return document.querySelector('#class').innerText")


def test_what_is_refused_or_stopped_leaves_the_earlier_pictures(browser: Browser, run_url: str, served: Any) -> None:
    with served(config(run_url, limits=Limits(max_count=8, token_requests=1))) as (url, service):
        open_page(browser, url)
        browser.type("#count", "4")
        browser.type("#steps", "9")
        browser.click("#draw")
        browser.until("document.querySelectorAll('#samples img').length === 4")
        before = browser.run("return document.querySelector('#view').innerHTML")
        strip = browser.run("return document.querySelectorAll('#strip li').length")
        pictures = f"document.querySelector('#view').innerHTML === {json.dumps(before)}"
        browser.run("document.querySelector('#count').max = 99")
        browser.type("#count", "9")
        browser.click("#draw")
        browser.until("document.querySelector('#notice.error')?.innerText.includes('at most 8')")
        assert browser.run(f"return {pictures}")
        browser.type("#count", "8")
        service.draining = True
        browser.click("#draw")
        browser.until("document.querySelector('#notice.busy')?.innerText.includes('Trying again in')")
        assert browser.run(f"return {pictures}")
        assert browser.run("return document.querySelectorAll('#strip li').length") == strip
        assert browser.run("return getComputedStyle(document.querySelector('#view')).opacity") == "1"
        service.draining = False
        browser.click("#notice button")
        browser.until("document.querySelectorAll('#samples img').length === 8")
        assert browser.errors() == []


def test_it_starts_with_what_the_limits_allow_and_offers_no_class(browser: Browser, run_url: str, served: Any) -> None:
    with served(config(run_url, limits=Limits(max_count=8, max_steps=10))) as (url, _):
        open_page(browser, url)
        curl = browser.text("#curl")
        assert '"count":8' in curl
        assert '"steps":10' in curl
        names = browser.run("return [...document.querySelector('#class').options].map(o => o.text)")
        assert names == ["each in turn", "class-0", "class-1", "class-2", "no class"]
        choose(browser, "#class", "-1")
        assert '"class_label":-1' in browser.text("#curl")
        browser.click("#draw")
        browser.until("document.querySelectorAll('#samples img').length === 8")
        assert captions(browser) == []
        choose(browser, "#grid", "geometric")
        assert '"grid":"geometric"' in browser.text("#curl")
        assert browser.text("#class-field label") == "Class"
        browser.run(
            "const {label} = model.conditions; model.conditions = {cls: label, hour: {kind: 'vector', shape: [1]}};"
            "chooseModel()"
        )
        assert browser.text("#class-field label") == "cls", "the condition's own name"
        room = browser.run(
            "const select = document.querySelector('#class'), style = getComputedStyle(select);"
            "const pen = document.createElement('canvas').getContext('2d'); pen.font = style.font;"
            "return select.clientWidth - pen.measureText(select.selectedOptions[0].text).width"
        )
        assert room > 42, "its choice is seen whole beside the arrow: 20 px of padding, 20 of the arrow"


def test_what_the_model_takes_is_offered_and_its_fields_are_seen(
    browser: Browser, new_run: Any, served: Any, tmp_path: Path
) -> None:
    """A text box, a slider a number, an upload, classes by name; fields are pictures by a colour map."""
    conditions = {
        "caption": ConditionSpec("text", (12,)),
        "place": ConditionSpec("vector", (2,), normaliser=Normaliser("range", (5.0, 10.0), (5.0, 10.0))),
        "hour": ConditionSpec("vector", (1,)),
        "coarse": ConditionSpec("concat", (1, 4, 4)),
        "hue": ConditionSpec("class", classes=("red", LONG)),
        "label": ConditionSpec("class", classes=("dry", "wet")),
    }
    target = TargetField("t2m", "array", "float32", Normaliser("channel", (280.0,), (20.0,)))
    run = new_run(str(tmp_path / "weather"), target=target, conditions=conditions, classes=["dry", "wet"])
    np.save(tmp_path / "coarse.npy", np.ones((1, 4, 4), np.float32))
    browser.size(*DESKTOP)
    with served(config(run)) as (url, _):
        open_page(browser, url)
        names = browser.run("return [...document.querySelectorAll('.condition')].map(e => e.dataset.name)")
        assert names == [name for name in conditions if name != "caption"], "which is the prompt"
        assert browser.run("return body().condition") is None
        browser.type("#prompt", "ein zu langer Text")
        assert browser.text("#curl").startswith("Prompt: 18 bytes, 12 at most")
        browser.type("#prompt", "küste's")
        browser.type("#negative", "meer")
        assert browser.text("#curl") == "Negative prompt: it does nothing at guidance 1"
        browser.click(".condition[data-name=place] input[type=checkbox]")
        browser.run(
            "const range = document.querySelector('.condition[data-name=place] input[type=range]'); range.value = 7.5;"
            "range.dispatchEvent(new Event('input', {bubbles: true}))"
        )
        choose(browser, ".condition[data-name=hue] select", "1")
        browser.upload(".condition[data-name=coarse] input", tmp_path / "coarse.npy")
        browser.until("body().condition.coarse")
        sent = browser.run("return body().condition")
        assert {name: value for name, value in sent.items() if name != "coarse"} == {
            "place": [7.5, 10], "hue": 1
        }  # fmt: skip
        assert browser.run("return [body().prompt, body().negative_prompt]") == ["küste's", "meer"]
        browser.click("#weights-box summary")
        browser.run(
            "const range = document.querySelector('#guidance-range'); range.value = 2;"
            "range.dispatchEvent(new Event('input', {bubbles: true}))"
        )
        assert browser.run("return body().guidance") == 2
        browser.type("#weights input[name=caption]", "3.5")
        assert browser.run("return body().guidance") == {"caption": 3.5, "place": 2, "hue": 2, "coarse": 2}
        assert browser.text("#weights .field").endswith("Training never dropped it on its own.")
        browser.type("#count", "2")
        browser.type("#steps", "9")
        assert_all_in_sight(browser, "conditions")
        browser.click("#draw")
        browser.until("document.querySelectorAll('#samples img').length === 2")
        keep(browser, "fields")
        assert all(browser.run("return [...document.querySelectorAll('#samples img')].map(i => i.naturalWidth > 0)"))
        assert browser.run("return document.querySelectorAll('#strip img').length") >= 3
        command = browser.text("#curl")
        subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True, stderr=subprocess.DEVNULL)
        with np.load(tmp_path / "samples.npz") as drawn:
            assert drawn["samples"].shape == (2, 1, 8, 8)
            assert 100 < drawn["samples"].mean() < 500, "kelvins"
        fields = "[...document.querySelectorAll('input, select, textarea')]"
        assert browser.run(f"return {fields}.filter(e => !e.labels.length && !e.ariaLabel).length") == 0
        assert browser.run("return document.querySelector('#class-field').hidden"), "several classes have a field each"
        assert browser.errors() == []


def test_a_prompt_is_first_and_enter_draws_it(browser: Browser, new_run: Any, served: Any, tmp_path: Path) -> None:
    """The text box, what to lead away from, guidance and the seed come before what is rarely changed."""
    sections = {"objective": {"label_dropout": 0.1}}
    conditions = {"caption": ConditionSpec("text", (64,))}
    run = new_run(str(tmp_path / "texts"), shape=(3, 16, 16), conditions=conditions, classes=0, sections=sections)
    browser.size(*PHONE)
    with served(config(run)) as (url, _):
        open_page(browser, url)
        names = browser.run(
            "return [...document.querySelectorAll('#fields label')].filter(e => e.checkVisibility())"
            ".map(e => e.textContent)"
        )
        assert names[:5] == ["Prompt", "Negative prompt", "Guidance", "Seed", "Samples"]
        assert browser.run("return [$('guidance').value, body().guidance ?? null]") == ["4", None]
        keep(browser, "prompt-phone-empty")
        seen = browser.run(
            "const box = $('draw').getBoundingClientRect(); return [box.top >= 0, box.bottom <= innerHeight]"
        )
        assert seen == [True, True], "Draw is in sight beside the prompt"
        for field, value in (("count", "4"), ("steps", "12")):
            browser.type(f"#{field}", value)
        browser.type("#negative", "blurred")
        assert browser.text("#curl") == "Negative prompt: it needs a prompt beside it"
        browser.type("#prompt", "a small red circle above a blue square")
        seed = browser.run("return body().seed")
        browser.click("#dice")
        assert browser.run("return body().seed") != seed
        browser.type("#prompt", "a small red circle above a blue square\ue007")
        browser.until("document.querySelectorAll('#strip li').length >= 2")
        keep(browser, "prompt-phone-forming")
        browser.until("document.querySelectorAll('#samples img').length === 4")
        alt = browser.run("return document.querySelector('#samples img').alt")
        assert alt == "Sample 1, a small red circle above a blue square"
        assert '"prompt":"a small red circle' in browser.text("#curl")
        assert_all_in_sight(browser, "prompt")
        keep(browser, "prompt-phone-samples")
        browser.size(*DESKTOP)
        keep(browser, "prompt-desktop-samples")
        browser.run("document.querySelector('#prompt').value = 'a\\u0007'; draw()")
        browser.until("document.querySelector('#notice.error')?.innerText.includes('control character U+0007')")
        assert browser.run("return document.activeElement.id") == "prompt"
        assert browser.errors() == []


def test_only_options_that_a_person_can_give_are_offered(browser: Browser, run_url: str, served: Any) -> None:
    with served(config(run_url)) as (url, _):
        open_page(browser, url)
        for sampler, function in SAMPLERS.items():
            if sampler == "flow_map":  # not of a denoiser
                continue
            choose(browser, "#sampler", sampler)
            fields = browser.run(
                "return [...document.querySelectorAll('#options .option')].map(e => [e.name, e.tagName, "
                "[...(e.options ?? [])].map(o => o.value)])"
            )
            plain = {
                name: one
                for name, one in options_of(function).items()
                if one.kind in (bool, int, float, str) or one.is_process
            }
            assert [name for name, *_ in fields] == list(plain), sampler
            for name, tag, choices in fields:
                assert (tag == "SELECT") == (plain[name].kind in (bool, str) or plain[name].is_process), (sampler, name)
                assert set(plain[name].choices) <= set(choices)
        choose(browser, "#sampler", "edm_sde")
        browser.run("document.querySelector('#options-box').open = true")
        choose(browser, "#option-s_churn", "3")
        assert '"options":{"s_churn":3}' in browser.text("#curl")


def test_a_lora_is_chosen_and_drawn_with(browser: Browser, lora_urls: dict[str, str], served: Any) -> None:
    adapters = tuple((name, lora_urls[name]) for name in ("ink", "style"))
    with served(config(lora_urls["base"], adapters=adapters)) as (url, _):
        open_page(browser, url)
        names = browser.run("return [...document.querySelectorAll('#adapter option')].map(o => o.textContent)")
        assert names == ["none", "ink", "style"]
        assert "adapter" not in browser.text("#curl")
        choose(browser, "#adapter", "style")
        browser.type("#count", "2")
        assert '"adapter":"style"' in browser.text("#curl")
        browser.click("#draw")
        browser.until("document.querySelectorAll('#samples img').length === 2")
        assert "LoRA style" in browser.text("#status")


def test_a_size_is_chosen_where_there_are_several(
    browser: Browser, new_run: Callable[..., str], served: Any, tmp_path: Path
) -> None:
    with served(config(new_run(str(tmp_path / "sizes"), other_shapes=((1, 6, 12),)))) as (url, _):
        open_page(browser, url)
        assert browser.run("return [...document.querySelectorAll('#size option')].map(o => o.value)") == ["8x8", "12x6"]
        assert "size" not in browser.text("#curl")
        choose(browser, "#size", "12x6")
        assert '"size":"12x6"' in browser.text("#curl")
        browser.type("#count", "2")
        browser.click("#draw")
        browser.until("document.querySelectorAll('#samples img').length === 2")
        found = browser.run(
            "const i = document.querySelector('#samples img'); return [i.naturalWidth, i.naturalHeight]"
        )
        assert found == [12, 6]
