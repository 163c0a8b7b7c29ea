"""The page in a real browser: a whole session by mouse, wide and tall images, sharp screens, a phone."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.browser import Browser, Point, opened
from support.command import raising
from support.page import Client, serving_demo, until

from minidrag import tiny
from minidrag.app.options import read_options

pytestmark = pytest.mark.slow
NAMELESS = """
    const named = (one) => one.getAttribute("aria-label")
        || (one.tagName === "BUTTON" && one.textContent.trim())
        || [...(one.labels || [])].some((label) => label.textContent.trim());
    const controls = [...document.querySelectorAll("button, input, select, textarea, canvas")];
    return controls.filter((one) => !one.closest("[aria-hidden=true]") && !(named(one) && one.tabIndex >= 0))
        .map((one) => one.outerHTML);
"""  # controls that a screen reader cannot name or a key cannot reach
COVERED = """
    return [...document.querySelectorAll(arguments[0])].filter((one) => one.offsetParent).filter((one) => {
        one.scrollIntoView({ block: "nearest" });
        const { left, right, top, bottom } = one.getBoundingClientRect();
        const middle = (top + bottom) / 2;
        return [[left + 4, middle], [right - 4, middle]].some((at) => {
            const found = document.elementFromPoint(...at);
            return !(found && (one.contains(found) || found.contains(one) && found.tagName === "LABEL"));
        });
    }).map((one) => one.id);
"""  # controls with a corner that is out of the window or under something else
PLACE = """
    const { canvas, onScreen } = await import("/view.js");
    const { left, top } = canvas.getBoundingClientRect();
    const [x, y] = onScreen([...arguments]);
    return [left + x, top + y];
"""
FRAME = """
    const { state } = await import("/state.js");
    const { canvas, view } = await import("/view.js");
    if (!state.check.window) return null;
    const box = canvas.getBoundingClientRect();
    const [x, y, width, height] = state.check.window.map((side) => side * view.scale);
    const [left, top] = [box.left + view.x + x, box.top + view.y + y];
    return [left, top, left + width, top + height];
"""  # of the window of the edit, on the screen
DRAG = read_options({"base": tiny.DEMO / "drag.json"})
RIGHT, DELETE, ESCAPE, CONTROL, SHIFT, ENTER = "\ue014", "\ue017", "\ue00c", "\ue009", "\ue008", "\ue007"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with opened(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def client(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server that begins with the demo's image and drag, in an empty folder."""
    place = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("MINIDRAG_CACHE", str(place / "cache"))
        with serving_demo() as client:
            yield client


# A whole session: these tests follow each other


def test_pairs_are_made_moved_deleted_and_undone(browser: Browser, client: Client) -> None:
    browser.open(client.site.address)
    assert "token" not in browser.driver.current_url, "it is in a cookie now"
    first = [43, 90, 88, 90]
    assert browser.drags() == [first] and browser.value("prompt") == DRAG.prompt
    x, y = upper(browser)
    browser.mouse((x, y), (x + 40, y - 20), (x + 90, y - 50))
    ((left, top, right, bottom),) = browser.drags()[1:]
    assert left < right and top > bottom
    browser.keys(RIGHT)  # the new target is selected
    assert browser.drags()[1] == [left, top, right + 1, bottom]
    browser.keys(DELETE)
    assert browser.drags() == [first]
    for keys, wanted in (
        ((CONTROL, "z"), right + 1),
        ((CONTROL, "z"), right),
        ((CONTROL, SHIFT, "z"), right + 1),
        ((CONTROL, "z"), right),
    ):
        browser.keys(*keys)
        assert until(lambda: browser.drags()[1:]) == [[left, top, wanted, bottom]]
    browser.keys(CONTROL, "z")
    assert until(lambda: len(browser.drags()) == 1)
    browser.mouse((x, y))  # half a pair
    browser.keys(ESCAPE)
    browser.mouse((x, y))
    browser.mouse((x + 60, y))  # click, click
    assert browser.drags()[1][:2] == [left, top]
    browser.click("#drags li:last-child button")
    assert browser.drags() == [first]


def test_a_mask_is_painted_and_taken_back(browser: Browser, client: Client) -> None:
    browser.click("mode-mask")
    before = np.asarray(Image.open(str(DRAG.mask)).convert("L")) >= 128
    x, y = upper(browser)
    browser.mouse((x, y), (x + 60, y))
    until(lambda: not np.array_equal(painted(client), before))
    mask = painted(client)
    assert (mask & before).sum() == before.sum() and 100 < (mask & ~before).sum() < 2000
    browser.click("mask-invert")
    until(lambda: np.array_equal(painted(client), ~mask))
    browser.click("mask-clear")
    browser.click("mask-drags")
    until(lambda: not np.array_equal(painted(client), ~mask))
    capsule = painted(client)
    assert capsule[90, 43] and capsule[90, 56] and not capsule[20, 20]
    for _ in range(4):
        browser.keys(CONTROL, "z")
    browser.keys("]")
    browser.click("mode-points")
    until(lambda: marked(client) == before.sum())


def test_one_run_is_stopped_and_another_finishes(browser: Browser, client: Client) -> None:
    browser.open(client.site.address)
    browser.click("[data-preset=fast]")
    browser.click("run")
    until(lambda: browser.text("progress-title").startswith("drag, ") and browser.shown("plot"))
    assert browser.element("view-watch").get_attribute("aria-checked") == "true"
    browser.click("stop")
    until(lambda: browser.shown("result-card"))
    assert "stopped" in browser.text("result-title") and "stopped at drag" in browser.text("result-notes")
    browser.click("result-close")
    browser.click("run")
    until(lambda: browser.shown("progress-card"))
    until(lambda: not browser.shown("progress-card") and browser.shown("result-card"))
    assert browser.text("result-title") == "ball-2" and "handle 1 moved" in browser.text("result-notes")
    made = client.get("/run?name=ball-2")["options"]
    assert made["drags"] == [{"handle": [43, 90], "target": [88, 90]}] and made["mask"]
    assert "≤" in browser.text("[data-preset=default] em"), "measured by now"
    links = {link.text for link in browser.driver.find_elements("css selector", "#downloads a")}
    assert links == {"edit", "animation", "comparison", "run.json"}, "no LoRA, as none was trained"


def test_the_slider_shows_the_original_and_the_edit(browser: Browser) -> None:
    browser.click("show-paths")
    shown = []
    for at in (0, 1000):
        move = "arguments[0].value = arguments[1]; arguments[0].oninput()"
        browser.driver.execute_script(move, browser.element("compare"), at)
        shown.append(browser.screenshot().astype(int))
    changed = np.abs(shown[0] - shown[1]).max(-1) > 40
    assert 500 < changed.sum() < 0.1 * changed.size, "where the ball was and is"


def test_a_reload_and_the_history_bring_all_back(browser: Browser, client: Client) -> None:
    browser.click("view-edit")
    browser.open(client.site.address)
    assert browser.drags() == [[43, 90, 88, 90]]
    assert len(browser.driver.find_elements("css selector", "#history button")) == 2
    browser.click("#drags button")
    browser.click("[data-run=ball-2]")
    until(lambda: browser.shown("result-card"))
    assert browser.drags() == [[43, 90, 88, 90]]
    browser.click("continue")
    until(lambda: browser.drags() == [] and not browser.shown("result-card"))
    until(lambda: client.get("/start")["draft"]["edit"]["image"].endswith("ball-2/edited.png"))
    browser.keys(CONTROL, "z")
    until(lambda: browser.drags() == [[43, 90, 88, 90]])
    assert browser.complaints() == []


def test_an_image_is_generated_from_the_prompt_and_dragged(browser: Browser, client: Client) -> None:
    browser.click("#generation summary")
    browser.click("generate")
    until(lambda: client.get("/start")["draft"]["edit"]["image"].endswith("generated-1/generated.png"))
    until(lambda: browser.drags() == [] and browser.text("size") == "128 × 128")
    x, y = upper(browser)
    browser.mouse((x, y), (x + 30, y), (x + 60, y))
    browser.click("run")
    until(lambda: browser.shown("progress-card"))
    job = client.get("/state")["jobs"][-1]
    assert job["values"]["image"] is None, "from its own latent"
    browser.click("stop")
    until(lambda: not browser.shown("progress-card"))
    assert browser.complaints() == []


def test_files_are_dropped(browser: Browser, client: Client, tmp_path: Path) -> None:
    run = client.site.store.folder.parent / "ball-2/run.json"
    browser.drop(run)
    until(lambda: browser.drags() == [[43, 90, 88, 90]])
    colored(80, 70).save(tmp_path / "dropped.png")
    browser.drop(tmp_path / "dropped.png")
    until(lambda: browser.text("size") == "80 × 70" and browser.drags() == [])
    browser.drop(tiny.DEMO / "drag.json")
    until(lambda: "ball.png is not here: drop it together with drag.json" in browser.text("toast"))
    browser.drop(*(tiny.DEMO / name for name in ("drag.json", "ball.png", "mask.png")))
    until(lambda: browser.drags() == [[43, 90, 88, 90]])


def open_demo(browser: Browser, client: Client) -> None:
    """Open the demo's image and drag with few steps in a fresh window."""
    browser.open(client.site.address)
    browser.click("mode-points")
    if browser.drags():  # of the draft, so that those of the file are seen to come
        browser.click("drags-clear")
        assert browser.drags() == [] and not browser.enabled("drags-clear")
    browser.drop(*(tiny.DEMO / name for name in ("drag.json", "ball.png", "mask.png")))
    until(lambda: browser.drags() == [[43, 90, 88, 90]])
    browser.click("[data-preset=fast]")


# A run that ends while the person is at something else


def begin(browser: Browser, client: Client) -> int:
    """Run the demo's drag with few steps, go back to the drags at once, and return the job's number."""
    open_demo(browser, client)
    browser.click("run")
    until(lambda: browser.shown("progress-card"))
    browser.click("view-edit")
    return client.get("/state")["jobs"][-1]["number"]


def test_a_run_that_ends_leaves_another_image_open(browser: Browser, client: Client, tmp_path: Path) -> None:
    number, runs = begin(browser, client), len(client.get("/history"))
    colored(80, 70).save(tmp_path / "another.png")
    browser.drop(tmp_path / "another.png")
    until(lambda: browser.text("size") == "80 × 70")
    browser.click("view-watch")
    browser.click("view-edit")
    assert client.wait(number)["state"] == "done"
    until(lambda: f"edit {number}, done" in browser.text("queue").lower())
    assert len(browser.driver.find_elements("css selector", "#history button")) == runs + 1
    assert browser.text("size") == "80 × 70" and not browser.shown("result-card")
    browser.click("#queue li button")
    until(lambda: browser.shown("result-card"))
    assert browser.text("result-title") == client.job(number)["run"] and not browser.text("queue")
    shown = browser.screenshot()
    x, y, _, _ = middle_and_size(browser)
    assert shown[int(y) - 60, int(x) - 60, 2] != 60, "the image of the run"
    browser.click("view-edit")
    assert browser.text("size") == "80 × 70" and browser.drags() == []
    assert client.get("/start")["draft"]["edit"]["drags"] == []
    assert browser.complaints() == []


def test_a_run_that_ends_leaves_later_changes_and_their_undo(browser: Browser, client: Client) -> None:
    number = begin(browser, client)
    x, y = upper(browser)
    browser.mouse((x, y), (x + 40, y), (x + 70, y))
    both = browser.drags()
    assert len(both) == 2
    browser.mouse((x - 60, y), (x - 40, y), release=False)  # the button is down when it ends
    assert client.wait(number)["state"] == "done"
    until(lambda: browser.text("queue"))
    assert browser.shown("drags") and not browser.shown("result-card")
    browser.keys(ESCAPE)
    browser.lift((x - 40, y))
    assert browser.drags() == both
    browser.click("#queue li button")
    until(lambda: browser.shown("result-card"))
    browser.click("view-edit")
    assert browser.drags()[:2] == both
    while len(browser.drags()) > 1:
        browser.keys(CONTROL, "z")
    assert browser.drags() == both[:1]
    browser.keys(CONTROL, SHIFT, "z")
    until(lambda: browser.drags() == both)
    assert browser.complaints() == []


def test_a_failed_run_keeps_saying_why(
    browser: Browser, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_demo(browser, client)
    monkeypatch.setattr("minidrag.app.session.drag_edit", raising(ValueError("there is no such thing")))
    browser.click("run")
    until(lambda: "failed: there is no such thing" in browser.text("queue"))
    assert browser.enabled("run") and not browser.shown("result-card")
    browser.click("#queue button")
    until(lambda: not browser.text("queue"))
    assert browser.drags() == [[43, 90, 88, 90]]


def test_what_is_typed_counts_and_buttons_of_the_queue_stay(browser: Browser, client: Client) -> None:
    open_demo(browser, client)
    browser.click("#settings-card summary")
    seed = browser.element("seed")
    seed.clear()
    seed.send_keys("7")
    browser.keys(CONTROL, ENTER)
    until(lambda: browser.shown("progress-card"))
    assert client.get("/state")["jobs"][-1]["values"]["seed"] == 7
    browser.click("run")
    until(lambda: "waiting" in browser.text("queue"))
    cancel, seen = browser.element("#queue button"), browser.text("progress-title")
    until(lambda: browser.text("progress-title") != seen)
    cancel.click()  # it is the same one, or a click that takes as long as an update would be lost
    until(lambda: not browser.text("queue"))
    browser.click("stop")
    until(lambda: not browser.shown("progress-card"))
    assert [job["state"] for job in client.get("/state")["jobs"][-2:]] == ["stopped"] * 2
    assert browser.complaints() == []


# What a clumsy person does


def test_a_point_in_the_hand_can_be_let_go_undone_and_deleted(browser: Browser, client: Client) -> None:
    open_demo(browser, client)
    x, y = upper(browser)
    browser.mouse((x, y), (x + 40, y), (x + 70, y))
    both = browser.drags()
    browser.mouse((x + 70, y), (x + 90, y + 20), release=False)
    assert browser.drags() != both
    browser.keys(ESCAPE)
    assert browser.drags() == both
    browser.lift((x + 95, y + 30))
    assert browser.drags() == both
    for keys in ((CONTROL, "z"), (DELETE,)):
        browser.mouse((x + 70, y), (x + 90, y + 20), release=False)
        browser.keys(*keys)
        browser.lift((x + 95, y + 30))
        assert browser.drags() == both[:1]
        browser.keys(CONTROL, SHIFT, "z") if keys != (DELETE,) else browser.keys(CONTROL, "z")
        until(lambda: browser.drags() == both)
    assert browser.complaints() == []


def test_steps_of_undo_wait_for_each_other(browser: Browser, client: Client, tmp_path: Path) -> None:
    open_demo(browser, client)
    for size in ((90, 80), (80, 90)):
        colored(*size).save(tmp_path / "colored.png")
        browser.drop(tmp_path / "colored.png")
        until(lambda: browser.text("size") == "{} × {}".format(*size))  # noqa: B023, called at once
    x, y, _, _ = middle_and_size(browser)
    browser.mouse((x, y), (x + 30, y), (x + 60, y))
    (drag,) = browser.drags()
    steps = "for (const name of ['undo', 'undo', 'redo', 'undo', 'redo', 'redo'])"
    browser.driver.execute_script(f"{steps} document.getElementById(name).onclick()")  # waiting for none
    browser.settle()
    until(lambda: browser.text("size") == "80 × 90" and browser.drags() == [drag])
    until(lambda: client.get("/start")["draft"]["size"] == [80, 90])
    assert browser.complaints() == []


def test_keys_of_lists_and_of_other_keyboards(browser: Browser, client: Client) -> None:
    open_demo(browser, client)
    before = browser.value("brush-size")
    press = "document.body.dispatchEvent(new KeyboardEvent('keydown', arguments[0]))"
    for held in ({"ctrlKey": True, "altKey": True}, {"altKey": True}, {}):  # AltGr here, there, and none
        browser.driver.execute_script(press, {"key": "]", "bubbles": True, **held})
    assert int(browser.value("brush-size")) == int(before) + 12
    browser.click("#settings-card summary")
    chosen = browser.element("[data-setting=motion_loss]")
    chosen.send_keys("s")
    assert chosen.get_attribute("value") == "sum"
    browser.keys(CONTROL, "z")
    until(lambda: chosen.get_attribute("value") == "mean")


def test_masks_are_read_as_the_command_reads_them(browser: Browser, client: Client, tmp_path: Path) -> None:
    open_demo(browser, client)
    layer = Image.new("RGBA", (128, 128))
    layer.paste((200, 20, 20, 255), (30, 40, 90, 100))  # paint on a transparent layer, darker than gray
    layer.save(tmp_path / "layer.png")
    browser.click("mode-mask")
    browser.element("mask-file").send_keys(str(tmp_path / "layer.png"))
    until(lambda: marked(client) == 60 * 60)
    Image.new("L", (128, 128)).save(tmp_path / "black.png")
    browser.element("mask-file").send_keys(str(tmp_path / "black.png"))
    until(lambda: "all black" in browser.text("toast"))
    browser.drop(tiny.DEMO / "mask.png")  # in Mask, one of the right size is no new image
    expected = int((np.asarray(Image.open(str(DRAG.mask)).convert("L")) >= 128).sum())
    until(lambda: marked(client) == expected)
    assert browser.drags() == [[43, 90, 88, 90]]
    browser.drop(tiny.DEMO / "ball.png")
    until(lambda: browser.drags() == [])


def test_a_run_with_a_lora_of_its_own_says_that_it_is_not_used(
    browser: Browser, client: Client, tmp_path: Path
) -> None:
    open_demo(browser, client)
    values = json.loads((tiny.DEMO / "drag.json").read_text()) | {"lora": "/elsewhere/mine.safetensors"}
    (tmp_path / "run.json").write_text(json.dumps(values))
    browser.drop(tmp_path / "run.json", *(tiny.DEMO / name for name in ("ball.png", "mask.png")))
    until(lambda: "run used the LoRA mine.safetensors" in browser.text("toast"))
    (tmp_path / "run.json").write_text(json.dumps(values | {"drags": [{"handle": [1, 2, 3], "target": 4}]}))
    browser.drop(tmp_path / "run.json", *(tiny.DEMO / name for name in ("ball.png", "mask.png")))
    until(lambda: "invalid drag" in browser.text("toast").lower())
    assert browser.drags() == [[43, 90, 88, 90]]
    assert all("/match" in complaint for complaint in browser.complaints()), "refused, nothing else"


# The window of a large image


def open_sheet(browser: Browser, client: Client, folder: Path, **config: bool) -> str:
    """Open the demo's image amid eight more, with a mask of its ball, and return its name on the server."""
    sheet = Image.new("RGB", (384, 384))
    mask = Image.new("L", (384, 384))
    with Image.open(str(DRAG.image)) as ball:
        for number in range(9):
            sheet.paste(ball, (128 * (number % 3), 128 * (number // 3)))
    uploads = len(client.site.store.known())
    sheet.putpixel((0, 0), (uploads, 0, 0))  # a new image, so that no draft of it is left
    mask.paste(255, (146, 196, 196, 242))
    for name, image in (("sheet", sheet), ("mask", mask)):
        image.save(folder / f"{name}.png")
    client.site.start["image"] = image = client.upload("/image", folder / "sheet.png")["image"]
    client.site.start["mask"] = client.upload("/mask", folder / "mask.png")["mask"]
    fast = client.get("/settings")["presets"]["fast"]
    client.site.start |= {"drags": [], "config": fast | {"window": True, "lora_steps": 2} | config}
    browser.open(client.site.address)
    assert browser.drags() == []
    return image


def framed(browser: Browser) -> bool:
    """True if the window is framed by dashes on the canvas."""
    box = browser.driver.execute_script(FRAME)
    if not box:
        return False
    left, top, right, bottom = (round(at) for at in box)
    shown = browser.screenshot().astype(int)
    sides = [shown[top - 1 : top + 2, left:right], shown[bottom - 1 : bottom + 2, left:right]]
    sides += [shown[top:bottom, at - 1 : at + 2].swapaxes(0, 1) for at in (left, right)]
    return all((side.min(-1).max(0) > 240).mean() > 0.3 for side in sides)


def test_the_window_is_framed_and_its_lora_waits_for_a_drag(
    browser: Browser, client: Client, tmp_path: Path
) -> None:
    image = open_sheet(browser, client, tmp_path)
    sent = "return performance.getEntriesByType('resource').some(({ name }) => name.endsWith('/prefetch'))"
    until(lambda: browser.driver.execute_script(sent))
    assert image not in client.get("/state")["prefetch"]["lora"] and not browser.text("lora-state")
    assert not framed(browser) and browser.text("scale") == ""
    browser.mouse(*(place(browser, x, 218) for x in (171, 190, 216)))
    until(lambda: framed(browser))
    browser.click("theme")
    assert framed(browser), "dark and light"
    browser.click("theme")
    until(lambda: browser.text("lora-state") == "LoRA ready")
    trained = client.get("/state")["prefetch"]["lora"]
    assert image in trained
    browser.keys(SHIFT, RIGHT)
    browser.mouse(place(browser, 226, 218), place(browser, 290, 200), place(browser, 350, 60))
    until(lambda: "edited at" in browser.text("scale") or "enlarged" in browser.text("scale"))
    until(lambda: client.get("/state")["prefetch"]["lora"] not in ("", trained))
    browser.click("drags-clear")
    assert not framed(browser)
    assert browser.complaints() == []


def test_a_mask_that_cuts_is_extended_and_the_run_is_one_of_the_whole_image(
    browser: Browser, client: Client, tmp_path: Path
) -> None:
    open_sheet(browser, client, tmp_path)
    browser.mouse(*(place(browser, x, 218) for x in (171, 190, 216)))
    cut = "the target of drag 1 is outside the mask, where nothing can appear extend the mask"
    until(lambda: cut in browser.text("notes"))
    before = marked(client)
    browser.click("#notes button")
    until(lambda: browser.text("notes") and "mask" not in browser.text("notes").replace("around mask", ""))
    until(lambda: marked(client) > before)
    mask = painted(client)
    rows, columns = np.mgrid[:384, :384]
    for x in (171, 216):  # a ball of a radius of 22
        assert mask[np.hypot(columns - x, rows - 218) < 20].all(), "the ball, here and there"
    assert not mask[np.hypot(columns - 193, rows - 218) > 65].any(), "little else"
    browser.keys(CONTROL, "z")
    until(lambda: marked(client) == before and cut in browser.text("notes"))
    browser.keys(CONTROL, SHIFT, "z")
    until(lambda: marked(client) == mask.sum())
    browser.click("run")
    until(lambda: browser.shown("result-card"))
    browser.click("view-edit")
    browser.click("drags-clear")
    browser.click("#history button")
    until(lambda: browser.shown("result-card") and browser.drags())
    assert browser.drags() == [[171, 218, 216, 218]]
    browser.click("view-edit")
    until(lambda: framed(browser))
    assert browser.complaints() == []


@pytest.mark.parametrize("warped", [True, False])
def test_an_extended_mask_has_the_way_of_what_moves_step_by_step(
    browser: Browser, client: Client, tmp_path: Path, warped: bool
) -> None:
    open_sheet(browser, client, tmp_path, warp_start=warped)
    browser.mouse(*(place(browser, x, 218) for x in (171, 190, 340)))
    until(lambda: "extend the mask" in browser.text("notes"))
    browser.click("#notes button")
    bits = "const { mask } = await import('/mask.js'); return [...arguments].map((at) => mask.bits[at])"
    there, between = browser.driver.execute_script(bits, 218 * 384 + 340, 218 * 384 + 256)
    assert there and between == (not warped)


# Pixels and sizes


@pytest.mark.parametrize(
    ("size", "sharp"), [((210, 70), 1.0), ((70, 210), 1.0), ((210, 70), 2.0), ((96, 80), 1.5)]
)
def test_the_pixel_that_is_clicked_is_the_one_in_the_json(
    browser: Browser, client: Client, tmp_path: Path, size: tuple[int, int], sharp: float
) -> None:
    colored(*size).save(tmp_path / "colored.png")
    image = client.upload("/image", tmp_path / "colored.png")["image"]
    client.site.start |= {"image": image, "mask": None, "drags": [], "config": {"lora_steps": 0}}
    browser.open(client.site.address, sharp=sharp)
    assert browser.drags() == [] and browser.text("size") == f"{size[0]} × {size[1]}"
    for zoom in ("zoom-fit", "zoom-in", "wheel", "zoom-out"):
        x, y, u, v = middle_and_size(browser)
        browser.click(zoom) if zoom != "wheel" else browser.wheel((x + 40, y + 30), -12)
        shown = browser.screenshot()
        blended = int(browser.text("zoom").split()[0]) < 1200  # the browser shows borders a pixel off
        left, top, right, bottom = visible(shown, (x, y), (u, v), sharp)
        for ends in (((left, top), (right, bottom)), ((right, top), (left, bottom))):
            start, end = ends if zoom == "zoom-fit" else (steady(shown, at, (x, y), sharp) for at in ends)
            expected = [*seen_at(shown, start, sharp), *seen_at(shown, end, sharp)]
            browser.mouse(start, (x, y), end)
            (found,) = browser.drags()
            assert found == pytest.approx(expected, abs=1 if blended and zoom != "zoom-fit" else 0), zoom
            if zoom == "zoom-fit":
                assert ({*found[::2]}, {*found[1::2]}) == ({0, size[0] - 1}, {0, size[1] - 1}), "the corners"
            sent = [{"handle": found[:2], "target": found[2:]}]
            until(lambda: client.get("/start")["draft"]["edit"]["drags"] == sent)  # noqa: B023, called at once
            browser.click("#drags button")
    assert not blended
    assert browser.complaints() == []


@pytest.mark.parametrize("size", [(900, 700), (390, 844)])
def test_nothing_is_out_of_reach_on_a_small_screen(
    browser: Browser, client: Client, size: tuple[int, int]
) -> None:
    browser.open(client.site.address, size)
    wide = browser.driver.execute_script("return document.documentElement.scrollWidth")
    assert wide <= size[0], "no sideways scrolling"
    for name in ("open", "mode-mask", "undo", "run", "prompt", "zoom-fit", "help"):
        box = browser.element(name).rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= size[0], name
    browser.click("mode-mask")
    covered = browser.driver.execute_script(COVERED, ".toolbar button, .toolbar input")
    assert covered == []
    names = ("drags", "invert", "clear", "load", "save")
    tops = {browser.element(f"mask-{name}").rect["y"] for name in names}
    assert len(tops) == 1 or size[0] < 800, "two rows with the modes"
    browser.click("mode-points")
    assert browser.driver.execute_script(COVERED, ".toolbar button") == []
    tops = {browser.element(name).rect["y"] // 20 for name in ("mode-points", "preview", "undo")}
    assert len(tops) == 1 or size[0] < 800, "one row"


def test_every_control_has_a_name_and_can_be_reached_by_keys(browser: Browser, client: Client) -> None:
    browser.open(client.site.address)
    nameless = browser.driver.execute_script(NAMELESS)
    assert nameless == []


def place(browser: Browser, *pixel: int) -> Point:
    """The point of the window where a pixel of the open image is shown."""
    x, y = browser.driver.execute_script(PLACE, *pixel)
    return x, y


def upper(browser: Browser) -> Point:
    """A point of the window in the sky of the demo's image."""
    x, y, _, height = middle_and_size(browser)
    return x, y - height / 4


def middle_and_size(browser: Browser) -> tuple[float, float, float, float]:
    box = browser.element("canvas").rect
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, box["width"], box["height"]


def painted(client: Client) -> np.ndarray:
    """The mask that the page has sent last; none is sent that was sent before."""
    sent = max(client.site.store.folder.glob("*/mask.png"), key=os.path.getmtime, default=DRAG.mask)
    return np.asarray(Image.open(str(sent)).convert("L")) >= 128


def marked(client: Client) -> int:
    """Pixels of the mask in the draft, which has the lengths of its runs."""
    return sum(client.get("/start")["draft"]["mask"][1::2])


def colored(width: int, height: int) -> Image.Image:
    """An image whose colors say where they are: x + 20 red, y + 20 green, 60 blue."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns + 20, rows + 20, 60 + 0 * rows], -1).astype(np.uint8))


def seen_at(shown: np.ndarray, point: Point, sharp: float) -> list[int]:
    """The pixel of a `colored` image that is shown at a point of the window."""
    red, green, _ = shown[int(point[1] * sharp), int(point[0] * sharp)]
    return [int(red) - 20, int(green) - 20]


def steady(shown: np.ndarray, point: Point, middle: Point, sharp: float) -> Point:
    """The point, or the nearest one toward the middle that is clear of the border of two pixels.

    The browser blends neighboring pixels, so that their border is shown within a pixel of the screen.
    """
    while True:
        x, y = point
        around = [seen_at(shown, (x + a / sharp, y + b / sharp), sharp) for a in (-2, 1) for b in (-2, 1)]
        if all(at == around[-1] for at in around):
            return point
        point = x + math.copysign(1, middle[0] - x), y + math.copysign(1, middle[1] - y)


def visible(shown: np.ndarray, middle: Point, size: Point, sharp: float) -> tuple[int, int, int, int]:
    """Left, top, right, and bottom of a `colored` image as shown, clear of the edges and controls."""
    x, y = (int(at * sharp) for at in middle)
    outside = abs(shown[..., 2].astype(int) - 60) > 2
    across, down = np.nonzero(outside[y])[0], np.nonzero(outside[:, x])[0]
    left, top = (math.ceil((at[at < here].max() + 1) / sharp) for at, here in ((across, x), (down, y)))
    right, bottom = (int((at[at > here].min() - 1) / sharp) for at, here in ((across, x), (down, y)))
    if right - left < size[0] - 10 and bottom - top < size[1] - 10:
        return left, top, right, bottom
    (x, y), (width, height) = middle, size  # zoomed in: away from the controls
    left, top = max(left, round(x - width / 2 + 20)), max(top, round(y - height / 2 + 70))
    return left, top, min(right, round(x + width / 2 - 190)), min(bottom, round(y + height / 2 - 60))
