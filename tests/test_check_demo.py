"""What CI asks of the demo's page: each thing that can be wrong with it is found."""

from collections.abc import Mapping

import pytest
import torch
from check_demo import SECTIONS, WITH_PLAYERS, fault_of, main, problems

from lib.lab.claims import judge
from lib.listening.player import Players
from lib.pipeline import NOTEBOOKS
from lib.report.report import ORDER, Section, write_report


def page(folder, failures: Mapping[str, str] = {}, to_come=(), level: float = 0.1, seconds: float = 1.0) -> str:
    """A page with a section for each notebook, written as the pipeline does."""
    for name in NOTEBOOKS:
        section = Section(folder, name, name)
        if name in WITH_PLAYERS:
            wav = torch.full((1, round(24_000 * seconds)), level)
            section.players(Players({"original": wav, "output": 2 * wav}), "A pair")
    section.claims([judge("C1", "said", True)])
    return write_report(folder, "t", "l", {}, failures, to_come).read_text()


def test_every_notebook_has_its_place_on_the_page():
    assert sorted(ORDER) == sorted(NOTEBOOKS)


def test_a_whole_page_has_nothing_wrong(tmp_path, monkeypatch, capsys):
    assert problems(page(tmp_path)) == []
    monkeypatch.setattr("sys.argv", ["check_demo", str(tmp_path / "index.html")])
    main()
    assert f"{len(SECTIONS)} sections, none failed, and 6 players with sound" in capsys.readouterr().out


def test_a_failed_notebook_is_found(tmp_path):
    assert problems(page(tmp_path, {"03_rms_collapse": "cell 3"})) == ["03_rms_collapse: failed"]


def test_a_page_that_is_not_finished_or_lacks_a_section_is_found(tmp_path):
    said = problems(page(tmp_path, to_come=("06_super_resolution",)))
    assert said[0] == "the page says that it is not finished"
    assert said[1].startswith("sections are 05_listening, summary, 04_training")
    assert "06_super_resolution: no player" in said


def test_sections_in_another_order_are_found(tmp_path):
    source = page(tmp_path).replace('id="summary"', 'id="x"').replace('id="04_training"', 'id="summary"')
    assert "they must be 05_listening, summary, 04_training" in problems(source)[0]


def test_a_page_that_is_cut_off_is_found(tmp_path):
    assert problems(page(tmp_path)[:-20]) == ["the page is cut off"]


@pytest.mark.parametrize(
    ("level", "seconds", "fault"),
    [(0.0, 1.0, "silent (RMS 0"), (1e-4, 1.0, "silent"), (0.1, 0.2, "only 0.20 s")],
)
def test_a_player_without_sound_is_found(tmp_path, level, seconds, fault):
    said = problems(page(tmp_path, level=level, seconds=seconds))
    assert len(said) == 6
    assert all(fault in line for line in said)
    assert said[0].startswith("05_listening, player 'original': ")


def test_a_player_that_cannot_be_decoded_is_found():
    assert fault_of("outputs/x.flac") == "no embedded sound"
    assert fault_of("data:audio/flac;base64,AAAA").startswith("cannot be decoded")


def test_a_page_that_is_not_there_is_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["check_demo", str(tmp_path / "index.html")])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "there is no such page" in capsys.readouterr().out
