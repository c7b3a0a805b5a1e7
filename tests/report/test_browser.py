"""The page in headless Chromium: the videos play in step, and everything on it does what it says."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser as chromium
import numpy as np
import pytest
from PIL import Image

from dit_sparse.report import load, write_page
from tests.report.conftest import PROMPT, counting_video, manifest_line

FRAMES, FPS, STEP, OFFSET = 48, 16, 4, 30
"""Of the videos that count: the gray of frame f is STEP f on the left, and OFFSET more on the right."""

SHOWN = """
    return [...document.querySelectorAll("video")].map((video) => {
        const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
        const context = canvas.getContext("2d");
        context.drawImage(video, 0, 0);
        return {time: video.currentTime, paused: video.paused, gray: context.getImageData(20, 20, 1, 1).data[1]};
    });
"""
DIFFERENCE = """
    const canvas = document.querySelector(".pane canvas");
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return {pixels: [...pixels], filter: canvas.style.filter};
"""

if why := chromium.missing():
    if os.environ.get("CI") == "true":
        raise RuntimeError(why)
    pytest.skip(why, allow_module_level=True)


@pytest.fixture(scope="module")
def window() -> Iterator[chromium.Browser]:
    with chromium.Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def counting(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`made` with videos that count."""
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("counting") / "run"))
    line = manifest_line(folder)
    for name, offset in ((line["dense_file"], 0), (line["file"], OFFSET)):
        counting_video(folder / name, frames=FRAMES, step=STEP, offset=offset)
    write_page(load(folder), folder / "report.html")
    return folder


@pytest.fixture
def page(window: chromium.Browser, counting: Path) -> Iterator[chromium.Browser]:
    """The page of `counting`, just opened; what it says on the console makes the test fail."""
    open_page(window, counting / "report.html")
    yield window
    # The tests' own reading of pixels is slow, and Chromium says so.
    assert [message for message in window.console() if "getImageData" not in message] == []


def open_page(window: chromium.Browser, path: Path) -> None:
    window.prefer("light")
    window.open(path)
    ready = "return [...document.querySelectorAll('video')].every((video) => video.readyState >= 3 && !video.seeking)"
    wait_for(lambda: window.run(ready))


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def frames_shown(window: chromium.Browser) -> list[float]:
    left, right = window.run(SHOWN)
    return [left["gray"] / STEP, (right["gray"] - OFFSET) / STEP]


def at_frame(window: chromium.Browser, frame: int) -> bool:
    return all(abs(shown - frame) < 0.75 for shown in frames_shown(window))


def text_of(window: chromium.Browser, selector: str) -> str:
    return window.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)


def choose(window: chromium.Browser, label: str, index: int) -> None:
    script = """
        const pick = document.querySelector(`select[aria-label="${arguments[0]}"]`);
        pick.selectedIndex = arguments[1];
        pick.dispatchEvent(new Event("change"));
    """
    window.run(script, label, index)


def test_the_videos_play_in_step(page) -> None:
    page.press("Space")
    wait_for(lambda: frames_shown(page)[0] > 2)
    seen = []
    for _ in range(12):
        left, right = page.run(SHOWN)
        assert not left["paused"]
        assert not right["paused"]
        seen.append((left["gray"] / STEP, (right["gray"] - OFFSET) / STEP, left["time"], right["time"]))
        time.sleep(0.08)
    page.press("Space")
    assert max(a for a, *_ in seen) - min(a for a, *_ in seen) > 4
    # One may stumble for a moment where the machine is busy, but never for long.
    leads = sorted(abs(left_time - right_time) * FPS for *_, left_time, right_time in seen)
    assert leads[8] <= 1
    assert leads[-1] <= 4
    pictures = sorted(abs(left - right) for left, right, *_ in seen)
    assert pictures[8] <= 1.75  # one frame, and what compression does to the gray
    frame = page.run("return Number(document.querySelector('.transport input').value)")
    wait_for(lambda: at_frame(page, frame))
    assert all(video["paused"] for video in page.run(SHOWN))


def test_a_video_that_lags_catches_up(page) -> None:
    page.press("Space")
    wait_for(lambda: frames_shown(page)[0] > 2)
    page.run("const video = document.querySelectorAll('video')[1]; video.currentTime -= 0.8")
    read = "return [...document.querySelectorAll('video')].map((video) => video.currentTime)"
    wait_for(lambda: abs(np.diff(page.run(read))[0]) <= 1 / FPS, seconds=1)


def test_they_begin_again_at_the_end(page) -> None:
    page.press("End")
    wait_for(lambda: at_frame(page, FRAMES - 1))
    page.press("Space")
    wait_for(lambda: 1 < frames_shown(page)[0] < 20)
    wait_for(lambda: abs(np.diff(frames_shown(page))[0]) <= 1.75)


def test_keys_go_frame_by_frame(page) -> None:
    for keys, frame in (
        (["ArrowRight"] * 3, 3),
        (["ArrowLeft"], 2),
        (["End"], FRAMES - 1),
        (["ArrowRight"], FRAMES - 1),
        (["Home"], 0),
    ):
        page.press(*keys)
        wait_for(lambda frame=frame: at_frame(page, frame))
        assert text_of(page, ".readout") == f"{frame + 1} / {FRAMES}"


def test_the_scrub_bar_and_the_speed(page) -> None:
    page.run(
        "const bar = document.querySelector('.transport input'); bar.value = 30; bar.dispatchEvent(new Event('input'))"
    )
    wait_for(lambda: at_frame(page, 30))
    choose(page, "Speed", 0)
    rates = page.run("return [...document.querySelectorAll('video')].map((video) => video.playbackRate)")
    assert rates == [0.1, 0.1]


def test_the_difference_is_that_of_the_frames(page) -> None:
    page.press("Home")
    wait_for(lambda: at_frame(page, 0))
    found = wait_for(lambda: (d := page.run(DIFFERENCE)) and max(d["pixels"][:3]) and d)
    pixels = np.array(found["pixels"]).reshape(-1, 4)
    assert np.abs(pixels[:, :3] - OFFSET).max() <= 4
    assert found["filter"] == "brightness(8)"
    choose(page, "Amplification of the difference", 5)
    assert page.run(DIFFERENCE)["filter"] == "brightness(32)"
    # The same video on both sides differs nowhere.
    choose(page, "Video on the right", 0)
    wait_for(lambda: max(np.array(page.run(DIFFERENCE)["pixels"]).reshape(-1, 4)[:, :3].max(1)) == 0)


def test_the_tooltip_says_layer_head_and_density(page, counting) -> None:
    line = manifest_line(counting)
    trace = json.loads((counting / line["trace"]).read_text())
    density = next(entry["heads"][2][1] for entry in trace["tracks"][0]["density"] if entry["heads"][2] is not None)
    page.point('.cell[data-layer="2"][data-head="1"]')
    tip = wait_for(lambda: text_of(page, "#tooltip"))
    assert tip == f"layer 2 · head 1 · density {density:.4f} · new plan"
    page.point('.cell[data-layer="0"]')
    wait_for(lambda: text_of(page, "#tooltip") == "layer 0 · all heads · density 1 · dense: layer")
    page.point("h1")
    wait_for(lambda: page.run("return document.getElementById('tooltip').hidden"))


def test_the_timeline_says_what_each_step_did(page, counting) -> None:
    trace = json.loads((counting / manifest_line(counting)["trace"]).read_text())
    labels = page.run("return [...document.querySelectorAll('.step')].map((node) => node.getAttribute('aria-label'))")
    assert len(labels) == len(trace["steps"]) == 4
    for label, step in zip(labels, trace["steps"], strict=True):
        assert f"step {step['step'] + 1} ·" in label
        assert f"density {step['density']:.3f}" in label
        assert f"attention {step['attention_seconds']:.2f}" in label
    did = [label.split(" · ")[1] for label in labels]
    assert did == ["dense: layer, dense: warm-up"] * 2 + ["dense: layer, new plan", "dense: layer, cached plan"]
    page.point(".step", click=True)
    assert "step 1" in text_of(page, ".heat-box h3")
    assert page.run("return document.querySelectorAll('.cell:not(.dense)').length") == 0


def test_the_picture_is_the_mask(page, counting) -> None:
    trace = json.loads((counting / manifest_line(counting)["trace"]).read_text())
    mask = next(mask for mask in trace["masks"] if mask["layer"] == 2)
    rows, columns = mask["size"]
    levels = np.asarray(Image.open(io.BytesIO(base64.b64decode(mask["png"])))).reshape(-1, rows, columns)
    page.point('.cell[data-layer="2"][data-head="1"]', click=True)
    read = """
        const canvas = document.querySelector(".mask canvas");
        if (document.querySelector(".masks-box h3").textContent !== "Masks of layer 2") return null;
        return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
    """
    shown = np.array(wait_for(lambda: page.run(read))).reshape(rows, columns, 4)
    assert text_of(page, ".mask figcaption") == "head 1"
    want = 240 + (10 - 240) * (levels[1] / 255)
    assert np.abs(shown[..., 0] - want).max() <= 1
    assert 0 < (levels[1] > 0).mean() < 1


def test_everything_is_reached_by_keys(page) -> None:
    focused = """
        const at = document.activeElement;
        return at === document.body ? null : at.getAttribute("aria-label") ?? at.innerText;
    """
    reached: list[str] = []
    for _ in range(40):
        page.press("Tab")
        if (name := page.run(focused)) is None:
            break
        reached.append(name)
    wanted = ["Theme", "Video on the left", "Video on the right", "Amplification of the difference", "Play (space)"]
    wanted += ["Frame", "Speed", "Guidance branch", "step 3 ·", "layer 1 · head 0", "dit-sparse generate", "Copy"]
    places = [next((i for i, name in enumerate(reached) if name.startswith(want)), -1) for want in wanted]
    assert -1 not in places, (wanted, reached)
    assert places == sorted(places)


def test_arrows_move_in_the_map_and_not_in_the_video(page) -> None:
    page.point('.cell[data-layer="1"][data-head="0"]', click=True)
    page.press("ArrowDown", "ArrowRight")
    assert text_of(page, "#tooltip").startswith("layer 2 · head 1")
    assert at_frame(page, 0)
    assert page.run("return document.activeElement.getAttribute('role')") == "gridcell"
    wait_for(lambda: text_of(page, ".masks-box h3") == "Masks of layer 2")
    assert text_of(page, ".mask figcaption") == "head 1"


def _brightness(window: chromium.Browser) -> float:
    return float(np.asarray(Image.open(io.BytesIO(window.picture())).convert("L")).mean())


def test_light_and_dark(page) -> None:
    assert _brightness(page) > 180
    page.prefer("dark")
    wait_for(lambda: _brightness(page) < 80)
    choose(page, "Theme", 1)
    wait_for(lambda: _brightness(page) > 180)
    page.prefer("light")
    choose(page, "Theme", 2)
    wait_for(lambda: _brightness(page) < 80)


def test_a_prompt_is_text(page) -> None:
    assert page.run("return document.title") == "run: generate"
    assert page.run("return document.querySelector('#player-title').textContent") == PROMPT
    assert page.run("return document.scripts.length") == 5


def test_nothing_is_asked_of_the_network(page) -> None:
    names = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name.slice(0, 5))")
    assert [name for name in names if name != "data:"] == []


def test_linked_videos_play_from_the_folder(window, counting) -> None:
    write_page(load(counting), counting / "linked.html", link=True)
    open_page(window, counting / "linked.html")
    window.press("Space")
    times = "return [...document.querySelectorAll('video')].map((video) => video.currentTime)"
    wait_for(lambda: min(window.run(times)) > 0.4)
    window.press("Space")
    assert window.console() == []


def test_a_missing_video_says_so(window, counting, tmp_path) -> None:
    folder = Path(shutil.copytree(counting, tmp_path / "run"))
    (folder / manifest_line(folder)["dense_file"]).unlink()
    write_page(load(folder), folder / "report.html")
    open_page(window, folder / "report.html")
    assert "is missing" in text_of(window, ".notes")
    window.press("ArrowRight", "ArrowRight")
    read = "return document.querySelector('video').currentTime"
    wait_for(lambda: window.run(read) == pytest.approx(2.5 / FPS, abs=1e-3))
    assert window.console() == []


def test_tables_sort_and_charts_explain(window, tmp_path) -> None:
    from tests.report.test_load import BENCH, ROW

    rows = [ROW | {"kernel": kernel, "ideal_ratio": ratio} for kernel, ratio in (("b", 1.5), ("a", 2.5), ("c", 1.25))]
    (tmp_path / "kernels.json").write_text(json.dumps(BENCH | {"rows": rows}))
    write_page(load(tmp_path / "kernels.json"), tmp_path / "report.html")
    open_page(window, tmp_path / "report.html")
    column = "return [...document.querySelectorAll('tbody tr')].map((row) => row.children[2].innerText)"
    assert window.run(column) == ["b", "a", "c"]
    window.point("th:nth-child(8) button", click=True)
    assert window.run(column) == ["c", "b", "a"]
    window.point("th:nth-child(8) button", click=True)
    assert window.run(column) == ["a", "b", "c"]
    assert window.console() == []


def test_images_stand_still(window, made, tmp_path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "run"))
    line = manifest_line(folder)
    for name, gray in (("a.png", 50), ("a.dense.png", 90)):
        Image.new("RGB", (40, 30), (gray,) * 3).save(folder / name)
    changes = {"file": "a.png", "dense_file": "a.dense.png", "frames": 1, "format": "png"}
    (folder / "manifest.jsonl").write_text(json.dumps(line | changes) + "\n")
    write_page(load(folder), folder / "report.html")
    open_page(window, folder / "report.html")
    assert window.run("return document.querySelector('.transport')") is None
    pixels = wait_for(lambda: (found := window.run(DIFFERENCE)["pixels"]) and found[0] and found)
    assert set(np.array(pixels).reshape(-1, 4)[:, :3].flatten()) == {40}
    window.press("Space", "ArrowRight")
    assert [message for message in window.console() if "getImageData" not in message] == []


def test_a_comparison_in_the_browser(window, folder) -> None:
    from tests.report.test_load import _compare_json

    (folder / "compare.json").write_text(json.dumps(_compare_json(folder)))
    write_page(load(folder), folder / "report.html")
    open_page(window, folder / "report.html")
    window.point(".series circle")
    wait_for(lambda: text_of(window, "#tooltip") == "adaspa 0.3 · 2.00\u00d7 · 25.00 dB")
    assert window.console() == []
