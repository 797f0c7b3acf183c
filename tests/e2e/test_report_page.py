"""The page in a browser: opens offline, plays, keeps its place and the score, works by keyboard and on a phone."""

import math
import re

import pytest
import torch
from playwright.sync_api import Page, expect

from lib.audio.files import SAMPLE_RATE
from lib.audio.plots import spectra
from lib.listening.player import Players
from lib.report.report import Section, write_report

SECONDS = 3.0


def tone(level: float, frequency: float, rate: int = SAMPLE_RATE) -> torch.Tensor:
    """`[1, N]`."""
    time = torch.arange(round(SECONDS * rate)) / rate
    return level * torch.sin(2 * torch.pi * frequency * time)[None]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    """The address of a page with two panels, the second of a codec at 16 kHz, tables and a figure."""
    folder = tmp_path_factory.mktemp("report")
    section = Section(folder, "05_listening", "Listening")
    section.text("Words about the clips, which come after the first of them. " * 4)
    section.players(Players({"input": tone(0.5, 440), "target": tone(0.05, 660), "output": tone(0.2, 550)}), "A pair")
    other = {"input": tone(0.1, 300, 16_000), "output": tone(0.1, 400, 16_000)}
    section.players(Players(other, 16_000), "Another pair")
    section.table([{f"column {i}": "a long cell" * 3 for i in range(12)}], "A wide table")
    section.table([{"a": i} for i in range(3)], "A narrow table")
    section.table([{"a": i} for i in range(30)], "A long table")
    section.figure(spectra({"a tone": tone(0.5, 440)}, None), "spectra", "A figure")
    return write_report(folder, "A run", "What it is.", {"a fact": "its value"}).as_uri()


@pytest.fixture
def page(watched, report) -> Page:
    page = watched()
    page.goto(report)
    return page


def seconds(page: Page, panel: int = 0) -> float:
    """What the clock of a panel shows."""
    minutes, rest = page.locator(".time").nth(panel).inner_text().split(" / ")[0].split(":")
    return 60 * float(minutes) + float(rest)


def audible_gains(page: Page) -> list[float]:
    """The gain at which each clip of the first panel plays, after the fade."""
    return page.evaluate(
        """async () => {
            const panel = document.querySelector(".players").panel;
            await new Promise((done) => setTimeout(done, 150));  // the fade
            return panel.clips.map((clip) => clip.level ? clip.level.gain.value : null);
        }"""
    )


def test_players_load_and_time_advances(page):
    expect(page.locator("audio:visible")).to_have_count(0)  # the panel stands for them
    assert seconds(page) == 0
    page.get_by_role("button", name="Play").first.click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    page.wait_for_function("() => document.querySelector('.position').value > 0.3")
    cursors = page.eval_on_selector_all(
        ".players:first-of-type .cursor", "all => all.map((c) => parseFloat(c.style.left))"
    )
    assert len(set(cursors)) == 1  # all pictures are at the same place
    assert cursors[0] > 5
    page.get_by_role("button", name="Pause").click()
    at = seconds(page)
    page.wait_for_timeout(300)
    assert seconds(page) == at


def test_switching_clips_keeps_the_position_and_only_one_is_audible(page):
    page.get_by_role("button", name="Play").first.click()
    page.wait_for_function("() => document.querySelector('.position').value > 0.5")
    assert audible_gains(page) == pytest.approx([1, 0, 0], abs=0.01)
    before = seconds(page)
    page.get_by_role("radio", name="target").first.check()
    assert seconds(page) >= before
    assert audible_gains(page) == pytest.approx([0, 1, 0], abs=0.01)
    expect(page.locator(".player.current").first).to_have_attribute("data-name", "target")


def test_equal_loudness_turns_the_quiet_clip_up_and_says_so(page):
    page.get_by_role("radio", name="target").first.check()
    page.get_by_role("button", name="Play").first.click()
    page.wait_for_function("() => document.querySelector('.position').value > 0.1")
    assert audible_gains(page)[1] == pytest.approx(1, abs=0.01)
    page.get_by_role("radio", name="equal loudness").first.check()
    gains = [float(figure.get_attribute("data-gain")) for figure in page.locator(".player").all()[:3]]
    assert gains[1] / gains[0] == pytest.approx(10, rel=0.1)
    assert audible_gains(page)[1] == pytest.approx(gains[1], rel=0.02)
    shown = page.locator(".player").nth(1).locator(".shift").inner_text()
    assert shown == f"played +{20 * math.log10(gains[1]):.1f} dB"


def test_one_panel_plays_at_a_time(page):
    page.get_by_role("button", name="Play").first.click()
    page.wait_for_function("() => document.querySelector('.position').value > 0.1")
    page.get_by_role("button", name="Play").click()  # the other one's: the first says Pause now
    page.wait_for_function("() => document.querySelectorAll('.position')[1].value > 0.1")
    expect(page.get_by_role("button", name="Pause")).to_have_count(1)


def test_a_loop_begins_again(page):
    page.get_by_label("loop").first.check()
    page.locator(".position").first.evaluate(
        f"(slider) => {{ slider.value = {SECONDS - 0.3}; slider.dispatchEvent(new Event('input')); }}"
    )
    page.get_by_role("button", name="Play").first.click()
    page.wait_for_function("() => { const at = document.querySelector('.position').value; return at > 0.2 && at < 2; }")
    expect(page.get_by_role("button", name="Pause")).to_be_visible()


def test_frequencies_stand_beside_their_bands(page):
    """By the mel scale up to 12 kHz, in the lower 80 of 140 rows."""
    picture = page.locator(".picture").first
    label = picture.locator(".frequency", has_text=re.compile("^1 kHz$"))
    box, at = picture.bounding_box(), label.bounding_box()
    height = (box["y"] + box["height"] - at["y"] - at["height"] / 2) / box["height"]
    assert height == pytest.approx(80 / 140 * math.log(1 + 1000 / 700) / math.log(1 + 12000 / 700), abs=0.05)
    shown = [panel.locator(".player").first.locator(".frequency") for panel in page.locator(".players").all()]
    wanted = ["0.3 kHz", "1 kHz", "3 kHz", "10 kHz"]
    assert [labels.all_inner_texts() for labels in shown] == [wanted, wanted[:3]]  # of 12 and 8 kHz


def test_the_end_is_the_end(page):
    page.locator(".position").first.evaluate(
        f"(slider) => {{ slider.value = {SECONDS - 0.3}; slider.dispatchEvent(new Event('input')); }}"
    )
    page.get_by_role("button", name="Play").first.click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    expect(page.get_by_role("button", name="Pause")).to_have_count(0, timeout=5000)
    assert seconds(page) == 0


def test_a_blind_test_keeps_score_and_shows_the_probability(page):
    """Ten rounds answered right, by looking at what a listener cannot see."""
    page.get_by_text("Blind test (ABX)").first.click()
    panel = "document.querySelector('.players').panel"
    for trial in range(1, 11):
        page.get_by_role("radio", name="X", exact=True).first.check()
        assert page.locator(".players").first.locator(".player.current").count() == 0  # nothing gives it away
        page.get_by_role("button", name=f"X is {'AB'[page.evaluate(f'{panel}.x')]}").first.click()
        expect(page.locator(".score").first).to_contain_text(f"{trial} of {trial} right")
    expect(page.locator(".score").first).to_contain_text("p = 0.001")  # 2⁻¹⁰
    page.get_by_role("radio", name="X", exact=True).first.check()
    wrong = 1 - page.evaluate(f"{panel}.x")
    page.get_by_role("button", name=f"X is {'AB'[wrong]}").first.click()
    expect(page.locator(".score").first).to_contain_text("10 of 11 right, p = 0.006")  # 12/2048


def test_an_answer_needs_x_played_and_two_clips(page):
    page.get_by_text("Blind test (ABX)").first.click()
    guess = page.get_by_role("button", name="X is A").first
    expect(guess).to_be_disabled()
    page.get_by_role("radio", name="A", exact=True).first.check()
    expect(guess).to_be_disabled()
    page.get_by_role("radio", name="X", exact=True).first.check()
    expect(guess).to_be_enabled()
    page.get_by_label("B is").first.select_option("input")
    expect(page.locator(".score").first).to_contain_text("the same clip")
    expect(page.get_by_role("radio", name="X", exact=True).first).to_be_disabled()


def test_after_a_blind_test_the_clip_of_before_is_back(page):
    page.get_by_role("radio", name="target").first.check()
    page.get_by_text("Blind test (ABX)").first.click()
    page.get_by_role("radio", name="A", exact=True).first.check()
    expect(page.get_by_role("radio", name="output").first).to_be_disabled()
    page.get_by_text("Blind test (ABX)").first.click()
    expect(page.locator(".player.current").first).to_have_attribute("data-name", "target")
    assert audible_gains(page) == pytest.approx([0, 1, 0], abs=0.01)


def test_in_a_blind_test_the_labels_match_what_plays(page):
    page.get_by_text("Blind test (ABX)").first.click()
    page.get_by_role("radio", name="X", exact=True).first.check()
    expect(page.get_by_role("radio", name="equal loudness").first).to_be_checked()
    expect(page.get_by_role("radio", name="equal loudness").first).to_be_disabled()
    expect(page.locator(".note").first).to_be_hidden()
    page.get_by_text("Blind test (ABX)").first.click()
    expect(page.get_by_role("radio", name="true").first).to_be_checked()
    expect(page.locator(".note").first).to_be_visible()


def test_the_score_outlives_closing(page):
    page.get_by_text("Blind test (ABX)").first.click()
    page.get_by_role("radio", name="X", exact=True).first.check()
    page.get_by_role("button", name="X is A").first.click()
    expect(page.get_by_role("radio", name="X", exact=True).first).to_be_focused()
    score = page.locator(".score").first.inner_text()
    page.get_by_text("Blind test (ABX)").first.click()
    page.get_by_text("Blind test (ABX)").first.click()
    expect(page.locator(".score").first).to_have_text(score)


def test_a_pause_before_the_clips_are_loaded_holds(page):
    page.evaluate("() => { const { panel } = document.querySelector('.players'); panel.play(); panel.pause(); }")
    page.wait_for_timeout(500)
    assert seconds(page) == 0


def test_x_is_random_in_every_round(page):
    page.get_by_text("Blind test (ABX)").first.click()
    drawn = page.evaluate(
        "() => { const panel = document.querySelector('.players').panel;"
        " return Array.from({length: 200}, () => { panel.draw(); return panel.x; }); }"
    )
    assert 60 < sum(drawn) < 140


def test_the_binomial_tail(page):
    """Against exact sums."""
    for trials in (1, 5, 16, 60):
        for right in range(trials + 1):
            exact = sum(math.comb(trials, k) for k in range(right, trials + 1)) / 2**trials
            found = page.evaluate(f"document.querySelector('.players').panel.constructor.guessing({right}, {trials})")
            assert found == pytest.approx(exact, rel=1e-9)


def test_the_keyboard_is_enough(page):
    page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_text("Skip to the content")
    page.keyboard.press("Enter")
    for _ in range(20):
        page.keyboard.press("Tab")
        if "Play" in page.locator(":focus").inner_text():
            break
    page.keyboard.press("Space")
    page.wait_for_function("() => document.querySelector('.position').value > 0.2")
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    at = seconds(page)
    assert at > 1
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # plays it again and again
    expect(page.locator(":focus")).to_be_checked()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")  # the next clip
    expect(page.locator(".player.current").first).to_have_attribute("data-name", "target")
    assert seconds(page) == at


def test_a_screen_reader_finds_names(page):
    for role, name in (
        ("slider", "Position in the clip"),
        ("group", "Clip"),
        ("group", "Level"),
        ("region", "A wide table"),
    ):
        expect(page.get_by_role(role, name=re.compile(name)).first).to_be_visible()
    images = page.locator(".picture img")
    assert images.first.get_attribute("alt") == "waveform and mel spectrogram of input"
    assert page.locator("html").get_attribute("lang") == "en"


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_nothing_is_wider_than_the_screen(watched, report, screenshots, dark):
    page = watched(width=360, height=740, dark=dark)
    page.goto(report)
    width = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width[0] <= width[1]
    background, colour = page.evaluate(
        "['backgroundColor', 'color'].map((name) => getComputedStyle(document.documentElement)[name])"
    )
    assert ("255, 255, 255" in colour) is dark or background != colour
    page.screenshot(path=screenshots / f"phone_{'dark' if dark else 'light'}.png", full_page=True)


@pytest.mark.parametrize(("width", "height"), [(1200, 900), (360, 740)])
def test_the_first_screen_has_a_player_and_the_menu_stays(watched, report, screenshots, width, height):
    page = watched(width=width, height=height)
    page.goto(report)
    play = page.get_by_role("button", name="Play").first.bounding_box()
    assert play["y"] + play["height"] <= height
    page.screenshot(path=screenshots / f"first_screen_{width}.png")
    menu = page.get_by_role("navigation", name="Sections")
    page.mouse.wheel(0, 3000)
    page.wait_for_function("() => scrollY > 300")
    assert menu.bounding_box()["y"] == 0
    menu.get_by_role("link", name="Results").click()
    heading = page.get_by_role("heading", name="Results").bounding_box()
    assert menu.bounding_box()["height"] <= heading["y"] < height


def test_on_a_phone_a_wide_table_scrolls_and_says_so(watched, report):
    page = watched(width=360, height=740)
    page.goto(report)
    hint = "(box) => getComputedStyle(box, '::before').content"
    wide, narrow = (page.get_by_role("region", name=f"A {name} table") for name in ("wide", "narrow"))
    expect(wide).to_have_class(re.compile("cut"))
    assert "scroll sideways" in wide.evaluate(hint)
    assert wide.evaluate("(box) => { box.scrollLeft = 200; return box.scrollLeft; }") == 200
    assert narrow.evaluate(hint) == "none"


def test_a_long_table_opens_by_a_click(page):
    table = page.get_by_role("region", name="A long table")
    expect(table).to_be_hidden()
    page.get_by_text("A long table (30 rows)").click()
    expect(table).to_be_visible()


def test_a_figure_follows_the_scheme_of_the_page(watched, report):
    shown = []
    for dark in (False, True):
        page = watched(dark=dark)
        page.goto(report)
        image = page.get_by_role("img", name="A figure")
        shown.append(image.evaluate("(image) => image.currentSrc"))
        assert (shown[-1] == image.get_attribute("src")) is not dark
    assert len(set(shown)) == 2


def test_without_scripts_the_players_are_plain_ones(browser, report):
    page = browser.new_page(java_script_enabled=False)
    page.goto(report)
    expect(page.locator("audio:visible")).to_have_count(5)
    page.close()


def test_the_page_may_ask_for_nothing(browser, report):
    """Its own policy refuses a request, whoever adds one."""
    page = browser.new_page()
    page.goto(report)
    with page.expect_event("requestfailed") as refused:
        page.evaluate("() => { document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'})); }")
    assert refused.value.failure == "csp"
    assert page.evaluate("() => fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.name)") == "TypeError"
    page.close()
