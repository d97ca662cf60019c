# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Pages with volumes: what is in them is what was put in, and a browser shows it."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from common.document import Heading, Text, Volume, write_html
from common.drawing import colour
from common.viewing import SCRIPT, STYLE, Scene, read_scene, scene_html

SHAPE = (13, 11, 7)
LABELS = {0: "background", 3: "edema </script>", 900: "core"}


def scene(*, image: bool = True, title: str = "a case") -> Scene:
    rng = np.random.default_rng(0)
    label = rng.choice([0, 3, 900], SHAPE, p=[0.6, 0.3, 0.1])
    prediction = np.where(rng.random(SHAPE) < 0.1, 0, label)
    scan = rng.standard_normal(SHAPE).astype(np.float32) if image else None
    return Scene(title, scan, {"label": label, "prediction": prediction}, (1.0, 1.0, 3.0), LABELS)


def taken_apart(page: str) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Return what a page says of its first volume, and the voxels in it, as a browser reads them."""
    about = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)[0])
    parts = re.findall(r'<script type="text/plain">(.*?)</script>', page, re.S)
    return about, [
        np.frombuffer(zlib.decompress(base64.b64decode(part)), np.uint8).reshape(about["shape"], order="F")
        for part in parts
    ]


def test_what_is_in_a_page_is_what_was_put_in() -> None:
    given = scene()
    about, (grey, *maps) = taken_apart(scene_html(given))
    assert about["shape"] == list(SHAPE)
    assert about["sides_mm"] == [1.0, 1.0, 3.0]
    assert about["maps"] == ["label", "prediction"]
    assert [value["name"] for value in about["values"]] == ["edema </script>", "core"]
    assert [value["colour"] for value in about["values"]] == [colour(3), colour(900)]
    for shown, marks in zip(maps, given.maps.values(), strict=True):
        assert np.array_equal(np.array([0, 3, 900])[shown], marks)
    low, high = np.percentile(given.image, [0.5, 99.5])
    np.testing.assert_allclose(grey / 255, np.clip((given.image - low) / (high - low), 0, 1), atol=0.5 / 255 + 1e-6)
    assert about["levels"] == 256
    marked = (given.maps["label"] != 0) | (given.maps["prediction"] != 0)
    for axis in range(3):
        counts = marked.sum(axis=tuple({0, 1, 2} - {axis}))
        assert counts[about["at"][axis]] == counts.max(), "it opens where most is marked"


def test_maps_alone_and_a_scan_alone_are_shown_too() -> None:
    about, maps = taken_apart(scene_html(scene(image=False)))
    assert (about["image"], len(maps)) == (False, 2)
    alone = Scene("x", np.full(SHAPE, np.nan, np.float32), {}, (1, 1, 1), [])
    about, parts = taken_apart(scene_html(alone))
    assert (about["maps"], about["at"], len(parts)) == ([], [6, 5, 3], 1)
    assert not parts[0].any(), "a scan without a number is black"


def test_more_values_than_a_byte_holds() -> None:
    marks = np.arange(SHAPE[0] * SHAPE[1] * SHAPE[2]).reshape(SHAPE)
    about, (shown,) = taken_apart(scene_html(Scene("x", None, {"atlas": marks}, (1, 1, 1), [])))
    assert len(about["values"]) == 254
    assert np.array_equal(shown, np.where(marks <= 254, marks, 255))


@pytest.mark.parametrize(
    ("megabytes", "levels", "step"), [(1.0, 256, 1), (0.075, 128, 1), (0.056, 32, 1), (0.011, 256, 2)]
)
def test_what_is_too_large_gets_fewer_grey_levels_then_fewer_voxels_and_says_so(
    megabytes: float, levels: int, step: int
) -> None:
    rng = np.random.default_rng(1)
    image = rng.standard_normal((40, 40, 40)).astype(np.float32)
    label = (np.abs(image) < 0.001).astype(np.uint8)
    part = scene_html(Scene("x", image, {"label": label}, (1, 1, 1), ["", "thing"]), megabytes=megabytes)
    about, (grey, shown) = taken_apart(part)
    assert (about["levels"], about["step"]) == (levels, step)
    assert grey.max() == levels - 1
    assert np.array_equal(shown, label[::step, ::step, ::step])
    assert len(part) <= 1e6 * megabytes + 2000
    assert (f"{levels} grey levels" in part) == (levels < 256)
    assert (f"one voxel in {step}" in part) == (step > 1)


def test_a_page_needs_no_other_file_and_no_network_and_holds_its_limit(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((200, 200, 200), np.float32)
    volumes = [Volume(Scene(name, noise, {"label": noise > 3}, (1, 1, 1), ["", "x"])) for name in ("best", "worst")]
    write_html("Two cases", [Heading("Cases"), *volumes, Text("python x", "code")], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert len(page.encode()) < 15e6, "two cases that nothing can compress"
    plain = re.sub(r'<script type="text/plain">.*?</script>', "", page, flags=re.S)
    assert not re.search(r"https?:|//\w|src=|href=\"[^#]|@import|url\(", plain.replace("// ", "")), "self-contained"
    assert plain.count("<script>") == plain.count("<style>") == 1
    assert plain.index("best") < plain.index("worst")
    without = tmp_path / "plain.html"
    write_html("No case", [Text("words")], without)
    assert SCRIPT not in without.read_text("utf-8")
    assert STYLE not in without.read_text("utf-8")


def test_a_file_is_shown_with_axes_that_lead_right_forward_and_up(tmp_path: Path) -> None:
    values = np.random.default_rng(3).random((5, 6, 7)).astype(np.float32)
    affine = np.diag([-1.0, 2.0, -3.0, 1.0])
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "scan.nii.gz")
    nib.save(nib.Nifti1Image((values > 0.7).astype(np.uint8), affine), tmp_path / "label.nii.gz")
    found = read_scene(tmp_path / "scan.nii.gz", {"label": tmp_path / "label.nii.gz"}, labels=["", "x"], title="t")
    assert found.image is not None
    np.testing.assert_allclose(found.image, values[::-1, :, ::-1], rtol=1e-6)
    assert np.array_equal(found.maps["label"], values[::-1, :, ::-1] > 0.7)
    assert found.sides_mm == [1.0, 2.0, 3.0]
    alone = read_scene(None, {"label": tmp_path / "label.nii.gz"}, labels=["", "x"], title="t")
    assert alone.image is None
    assert np.array_equal(alone.maps["label"], found.maps["label"])


_ACTS = """
(async () => {
  while (!document.querySelector("figure.viewer.ready")) await new Promise((done) => setTimeout(done, 20));
  const viewer = document.querySelector("figure.viewer").viewer;
  const [axial, coronal, sagittal] = document.querySelectorAll("figure.viewer canvas");
  const coloured = () => {
    const { data } = axial.getContext("2d").getImageData(0, 0, axial.width, axial.height);
    let count = 0;
    for (let i = 0; i < data.length; i += 4) count += Math.abs(data[i] - data[i + 2]) > 20;
    return count;
  };
  const found = { start: [...viewer.at], both: coloured() };
  const boxes = document.querySelectorAll("figure.viewer input[type=checkbox]");
  boxes[0].click();
  found.areas = coloured();
  boxes[1].click();
  found.none = coloured();
  boxes[0].click();
  found.outlines = coloured();
  const area = axial.getBoundingClientRect();
  const place = { clientX: area.left + area.width * 0.1, clientY: area.top + area.height * 0.1, bubbles: true };
  axial.dispatchEvent(new PointerEvent("pointerdown", { ...place, buttons: 1 }));
  found.clicked = [...viewer.at];
  for (const key of ["ArrowRight", "ArrowDown", "PageDown"])
    axial.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  found.keys = [...viewer.at];
  const slider = document.querySelectorAll("figure.viewer .plane input")[2];
  slider.value = 3;
  slider.dispatchEvent(new Event("input"));
  found.slid = [...viewer.at];
  found.titles = [...document.querySelectorAll("figure.viewer .plane label")].map((label) => label.textContent);
  found.order = [...document.querySelectorAll("figure.viewer [tabindex], figure.viewer input")].every(
    (one) => one.tabIndex === 0,
  );
  found.readout = document.querySelector("figure.viewer output").textContent;
  found.sides = [axial, coronal, sagittal].map((one) => one.getBoundingClientRect().width);
  document.body.dataset.found = JSON.stringify(found);
})();
"""


@pytest.mark.browser
def test_a_browser_shows_a_page_and_takes_clicks_and_keys(tmp_path: Path) -> None:
    side = 24
    image = np.broadcast_to(np.linspace(0, 1, side, dtype=np.float32), (side, side, side))
    label = np.zeros(image.shape, np.uint8)
    label[6:18, 6:18, 6:18] = 1
    given = Scene("best", image, {"label": label, "prediction": label}, (1, 1, 1), ["", "thing"])
    file = tmp_path / "page.html"
    write_html("A page", [Volume(given)], file)
    file.write_text(file.read_text("utf-8").replace("</body>", f"<script>{_ACTS}</script></body>"), "utf-8")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert browser is not None, "install Chromium, such as with apt-get install chromium"
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1200,900",
        "--virtual-time-budget=20000",
    ]
    command = [browser, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(html.unescape(re.findall(r'data-found="([^"]*)"', shown)[0]))
    assert found["start"] == [12, 12, 12]
    assert found["none"] == 0
    assert 0 < found["outlines"] < found["areas"] <= found["both"], "label as outlines, prediction as areas"
    assert found["clicked"] == [2, 21, 12]
    assert found["keys"] == [3, 20, 11]
    assert found["slid"] == [3, 20, 11]
    assert found["titles"] == ["axial 12 of 24", "coronal 21 of 24", "sagittal 4 of 24"]
    assert found["order"], "the keyboard reaches everything"
    assert found["readout"] == "voxel 4, 21, 12; label: nothing; prediction: nothing"
    assert max(found["sides"]) - min(found["sides"]) <= 1
    assert sum(found["sides"]) > 600, "three planes beside each other"
