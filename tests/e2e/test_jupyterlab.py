"""JupyterLab as people use it: run a notebook, move a slider, press play, guess blind, upload files, stop training."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import soundfile
from playwright.sync_api import Locator, WebSocketRoute, expect

from lib.training.run import Run

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.timeout(900), pytest.mark.jupyterlab]


@pytest.fixture(scope="module")
def trained(lab):
    """An output folder in which notebooks 04 and 05 have run, with masks and stages, so that every slider acts."""
    out = lab.folder / "trained"
    command = [sys.executable, "-m", "lib.pipeline", "--preset", "smoke", "--only", "04,05", "--out", out]
    command += ["--set", "model.num_stages=1", "--set", "model.num_layers=1"]
    subprocess.run(command, check=True, capture_output=True)
    return out


def test_the_page_of_a_pipeline(watched, trained, screenshots):
    """Every clip of every panel decodes to its length, and pages of the notebooks open as well, also on a phone."""
    page = watched()
    page.goto((trained / "index.html").as_uri())
    lengths = page.evaluate(
        """() => Promise.all([...document.querySelectorAll(".players")].map(async ({ panel }) => {
            await panel.load();
            return [panel.duration, ...panel.clips.map((clip) => clip.buffer.duration)];
        }))"""
    )
    assert lengths
    for duration, *clips in lengths:
        assert clips == pytest.approx([duration] * len(clips), abs=1e-3)
    page.screenshot(path=screenshots / "page.png", full_page=True)
    links = page.eval_on_selector_all("a[href$='.html']", "links => links.map((link) => link.href)")
    assert len(links) == 2
    for link in (page.url, *links):
        phone = watched(width=360)
        phone.goto(link)
        width = phone.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert width[0] <= width[1], link


def changes(image: Locator) -> None:
    """Wait until a widget's image shows another picture: each is a blob with an address of its own."""
    expect(image).not_to_have_attribute("src", image.get_attribute("src"), timeout=60_000)


# as soon as it is there: a rendering of two seconds may be over before a click from here
CLICK_CANCEL = """cell => new MutationObserver((_, observer) => {
    const button = [...cell.querySelectorAll("button")].find((b) => b.textContent.includes("Cancel") && b.offsetParent);
    if (button) { observer.disconnect(); button.click(); }
}).observe(cell, { subtree: true, childList: true, attributes: true })"""


def move(slider: Locator, steps: int) -> None:
    slider.focus()
    for _ in range(abs(steps)):
        slider.press("ArrowRight" if steps > 0 else "ArrowLeft")


def upload(button: Locator, file: Path) -> None:
    """Choose a file in the dialog that the button opens."""
    with button.page.expect_file_chooser() as chooser:
        button.click()
    chooser.value.set_files(file)


def slider(cell: Locator, name: str) -> Locator:
    """The handle of a slider of ipywidgets, by its label."""
    row = cell.locator(".widget-hslider", has=cell.page.get_by_text(name, exact=True))
    return row.locator(".noUi-handle")


def test_the_rms_sliders_move_the_figure(lab, screenshots):
    notebook = lab.open("03_rms_collapse", out_dir=str(lab.folder / "03"))
    notebook.run_all(timeout=300)
    cell = notebook.cell("show(explorer.sliders")
    image = cell.locator("img.widget-image")
    expect(image).to_be_visible()
    before = image.get_attribute("src")
    move(slider(cell, "last residual weight"), 10)
    expect(cell.locator(".widget-readout").first).to_have_text("0.20")
    expect(image).not_to_have_attribute("src", before)
    changed = image.get_attribute("src")
    cell.get_by_label("clamp to 0.7 to 1.5").uncheck()
    expect(image).not_to_have_attribute("src", changed)
    notebook.page.screenshot(path=screenshots / "03_explorer.png")
    notebook.page.close()


def test_training_is_watched_stopped_and_resumed(lab, screenshots):
    """The page loses its connection and comes back; then it is closed, and another notebook watches and stops."""
    out = lab.folder / "04"
    connections = []

    def relay(client: WebSocketRoute) -> None:
        client.connect_to_server()
        connections.append(client)

    settings = {"train.checkpoint_every": 500, "train.max_train_pairs": 80}  # twenty steps per epoch
    notebook = lab.open("04_training", relay=relay, out_dir=str(out), overrides={"train.max_steps": 500, **settings})
    notebook.start("Run All Cells")
    page = notebook.page
    image = page.locator("img.widget-image")
    expect(image).to_be_visible(timeout=120_000)
    changes(image)
    expect(page.get_by_text(re.compile(r"[0-9]+:[0-9]+ left"))).to_be_visible(timeout=60_000)
    before = len(connections)
    for connection in connections:
        connection.close(code=4000)  # as good as a lost one: 1000 and 1001 would be meant
    changes(image)
    assert len(connections) > before  # it was another connection
    expect(page.locator(".players audio").first).to_be_attached(timeout=240_000)  # after an epoch
    expect(page.get_by_role("button", name="Python 3 (ipykernel) | Busy")).to_be_visible()
    training = notebook.cell("train_project(")
    expect(training.locator("[data-mime-type='application/vnd.jupyter.stderr']")).to_have_count(0)
    image.scroll_into_view_if_needed()
    page.screenshot(path=screenshots / "04_dashboard.png")
    page.close()
    (lab.folder / "watch.ipynb").write_text(nbformat.writes(watching(out)))
    watcher = lab.open_copy("watch")
    watcher.start("Run All Cells")
    image = watcher.page.locator("img.widget-image")
    expect(image).to_be_visible(timeout=60_000)
    changes(image)
    watcher.page.get_by_role("button", name="Stop and save").click()
    meta = out / "last" / "meta.json"
    for _ in range(300):
        if meta.exists():
            break
        watcher.page.wait_for_timeout(100)
    stopped = json.loads(meta.read_text())["step"]
    assert 0 < stopped < 500
    watcher.page.close()
    more = {"train.max_steps": stopped + 60, **settings}
    notebook = lab.open("04_training", out_dir=str(out), overrides=more, resume=True)
    notebook.start("Run All Cells")
    expect(notebook.page.locator("img.widget-image")).to_be_visible(timeout=120_000)
    notebook.page.get_by_role("button", name="Stop and save").click()  # while the cell runs
    expect(notebook.page.get_by_text("resume = True resumes")).to_be_visible(timeout=30_000)
    again = json.loads(meta.read_text())["step"]
    assert stopped < again < stopped + 60
    notebook.page.close()
    more = {"train.max_steps": again + 2, **settings}
    notebook = lab.open("04_training", out_dir=str(out), overrides=more, resume=True)
    notebook.run_all(timeout=300)
    expect(notebook.page.get_by_text("finished", exact=True)).to_be_visible()
    assert [row["step"] for row in Run.open(out).metrics("train")] == list(range(1, again + 3))
    notebook.page.close()


def watching(out: Path) -> nbformat.NotebookNode:
    """A notebook that watches a run."""
    cell = nbformat.v4.new_code_cell(f"from lib.listening.dashboard import watch\n\nwatch({str(out)!r}, seconds=1)")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}}
    return nbformat.v4.new_notebook(cells=[cell], metadata=kernel)


@pytest.fixture
def newest(trained):
    """The trained run as the newest of the repository's own outputs."""
    run = ROOT / "outputs" / "e2e_newest"
    shutil.rmtree(run, ignore_errors=True)  # a kernel may have written into it after an earlier test
    shutil.copytree(trained, run, symlinks=True)
    os.utime(run / "best", follow_symlinks=False)
    yield run
    shutil.rmtree(run)


def test_listening_finds_the_newest_run(lab, newest, screenshots):
    notebook = lab.open("05_listening")
    notebook.run_all(timeout=600)
    chosen = notebook.cell("trained_runs(asked)")
    expect(chosen.get_by_text(re.compile("listening to e2e_newest, saved"))).to_be_visible()
    expect(chosen.locator("select option").first).to_have_text(re.compile(r"^e2e_newest,\s+saved"))  # no-break spaces
    expect(notebook.cell("show(listening.panel").locator(".players audio").first).to_be_attached(timeout=60_000)
    notebook.page.screenshot(path=screenshots / "05_newest.png")
    notebook.page.close()


def test_listening_without_a_run_is_one_line(lab, screenshots):
    notebook = lab.open("05_listening", out_dir=str(lab.folder / "nothing"))
    notebook.start("Run All Cells")
    output = notebook.cell("trained_runs(asked)").locator(".jp-OutputArea-output")
    expect(output).to_have_text(
        re.compile(r"^\S*nothing: no run here .*`make demo` trains one[^\n]*$"), timeout=120_000
    )
    expect(notebook.page.get_by_text("Traceback")).to_have_count(0)
    notebook.page.screenshot(path=screenshots / "05_no_run.png")
    notebook.page.close()


def test_listening(lab, trained, tmp_path, screenshots):
    notebook = lab.open("05_listening", out_dir=str(trained))
    notebook.run_all(timeout=300)
    page, cell = notebook.page, notebook.cell("show(listening.panel")
    panel, message = cell.locator(".players"), cell.locator(".widget-html").get_by_role("alert")
    expect(panel.locator("audio").first).to_be_attached(timeout=60_000)  # rendered in a thread
    # press play and see time advance
    cell.get_by_role("button", name="Play").click()
    time = cell.locator(".position")
    expect(cell.get_by_role("button", name="Pause")).to_be_visible()
    page.wait_for_function("slider => slider.value > 0.3", arg=time.element_handle())
    cell.get_by_role("radio", name="output", exact=True).check()
    # by keyboard, which JupyterLab would like to have for itself
    cell.get_by_role("button", name="Pause").click()
    time.focus()
    time.press("Home")
    time.press("ArrowRight")
    expect(time).to_have_js_property("value", "0.05")
    cell.get_by_role("radio", name="target", exact=True).focus()
    page.keyboard.press("ArrowRight")
    expect(cell.get_by_role("radio", name="output", exact=True)).to_be_checked()
    # one round of the blind test
    cell.get_by_text("Blind test (ABX)").click()
    cell.get_by_role("radio", name="X", exact=True).check()
    cell.get_by_role("button", name="X is A").click()
    expect(cell.locator(".score")).to_contain_text("of 1 right, p = ")
    # blend the masks: another picture, another sound, the same place, and no word of what X was
    before, masks = panel.locator("audio").nth(2).get_attribute("src"), cell.locator("img.widget-image")
    seen = masks.get_attribute("src")
    move(slider(cell, "blend masks with 0.5"), 20)
    expect(masks).not_to_have_attribute("src", seen)
    expect(panel.locator("audio").nth(2)).not_to_have_attribute("src", before)
    expect(cell.get_by_role("radio", name="output", exact=True)).to_be_checked()
    expect(cell.locator(".problem")).to_contain_text("which ended the blind test")
    cell.scroll_into_view_if_needed()
    page.screenshot(path=screenshots / "05_listening.png")
    # find a pair
    search = cell.get_by_placeholder("words of names, cross, continuation")
    search.fill("continuation")
    search.press("Enter")
    offered = cell.get_by_label("pair", exact=True).locator("option")
    expect(offered.filter(has_text=re.compile("^cross:"))).to_have_count(0)
    first = offered.first.inner_text().replace("\xa0", " ").removeprefix("continuation: ")
    parts = r" of [\d.]+ s \+ ".join(map(re.escape, first.split(" + ")))
    expect(cell.get_by_text(re.compile(f"^playing {parts} of "))).to_be_visible(timeout=60_000)
    options = [option.replace("\xa0", " ") for option in offered.all_inner_texts()]
    assert options[-1] == "uploaded files"
    assert all(option.startswith("continuation: ") for option in options[:-1])
    # loop, and start another rendering while one is under way, then cancel
    cell.get_by_label("loop").check()
    playing = panel.locator("audio").nth(2).get_attribute("src")
    cell.evaluate(CLICK_CANCEL)
    move(slider(cell, "blend masks with 0.5"), -1)
    expect(cell.get_by_text("Cancelled: what plays is what played before, whatever the controls say.")).to_be_visible()
    expect(cell.get_by_role("button", name="Cancel")).to_be_hidden()
    expect(panel.locator("audio").nth(2)).to_have_attribute("src", playing)
    # two files, one of them broken
    (tmp_path / "broken.wav").write_bytes(b"RIFF\x10\x00\x00\x00WAVE no sound")
    rng = np.random.default_rng(0)
    for name, seconds in (("mine.wav", 140), ("other.flac", 2)):  # 12 MB: more than a server takes by itself
        soundfile.write(tmp_path / name, 0.1 * rng.standard_normal(44_100 * seconds), 44_100)
    upload(cell.get_by_role("button", name="input file"), tmp_path / "mine.wav")
    upload(cell.get_by_role("button", name="target file"), tmp_path / "broken.wav")
    expect(message).to_contain_text("broken.wav: not audio")
    page.screenshot(path=screenshots / "05_broken.png")
    upload(cell.get_by_role("button", name="target file"), tmp_path / "other.flac")
    expect(message).to_have_count(0)
    expect(panel.locator("audio").first).not_to_have_attribute("src", before)
    expect(cell.get_by_text("playing mine.wav 0–2 s of 140 s + other.flac 0–2 s of 2 s")).to_be_visible()
    offered = notebook.cell("show(playground.panel").get_by_label("input", exact=True).locator("option")
    expect(offered.filter(has_text="mine.wav")).to_have_count(1)  # without running its cell again
    assert sorted(path.name.split("_")[1] for path in (trained / "uploads").iterdir()) == ["mine.wav", "other.flac"]
    # the same file again, after a pair
    cell.get_by_label("pair", exact=True).select_option(index=0)
    expect(cell.get_by_text(re.compile(f"^playing {parts} of "))).to_be_visible()
    upload(cell.get_by_role("button", name="input file"), tmp_path / "mine.wav")
    expect(cell.get_by_text("playing mine.wav 0–2 s of 140 s + other.flac 0–2 s of 2 s")).to_be_visible()
    page.close()


def test_playground(lab, trained, tmp_path, screenshots):
    notebook = lab.open("05_listening", out_dir=str(trained))
    notebook.run_all(timeout=300)
    cell = notebook.cell("show(playground.panel")
    audio = cell.locator(".players audio")
    expect(audio).to_have_count(6, timeout=60_000)
    expect(cell.get_by_text(re.compile("by the law, before training"))).to_be_visible()
    for name, steps in (("last residual weight", -18), ("noise share", 4), ("mask hardness", 10)):
        before = audio.nth(2).get_attribute("src")
        move(slider(cell, name), steps)
        expect(audio.nth(2)).not_to_have_attribute("src", before)
    changed = audio.nth(2).get_attribute("src")
    cell.get_by_role("button", name="Reset").click()
    expect(audio.nth(2)).not_to_have_attribute("src", changed)
    cell.get_by_role("button", name="Undo").click()
    expect(audio.nth(2)).to_have_attribute("src", changed)
    cell.get_by_label("targets (one or more)").select_option(index=[1, 2, 3])
    expect(audio).to_have_count(16)
    cell.get_by_role("button", name="Save WAV and recipe").click()
    expect(cell.get_by_text("Saved favourite.wav")).to_be_visible()
    cell.scroll_into_view_if_needed()
    notebook.page.screenshot(path=screenshots / "05_playground.png")
    recipe = trained / "favourites" / "favourite.json"
    settings = json.loads(recipe.read_text())["settings"]
    assert settings["residual_weight"] == pytest.approx(0.1)
    assert settings["noise"] == pytest.approx(0.2)
    again = [sys.executable, "-m", "lib.fuse", "--recipe", recipe, "-o", tmp_path / "again.wav"]
    subprocess.run(again, check=True, capture_output=True)
    assert (tmp_path / "again.wav").read_bytes() == recipe.with_suffix(".wav").read_bytes()
    notebook.page.close()
