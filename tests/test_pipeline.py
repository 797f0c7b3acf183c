"""The pipeline: notebooks executed in order into one page, and every way in which that can stop."""

import contextlib
import dataclasses
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import papermill
import psutil
import pytest
import soundfile

import lib.pipeline
import lib.project
from lib.audio.decode import AudioError  # noqa: F401  its subclasses are looked for below
from lib.model.cascade import CascadeConfig
from lib.pipeline import (
    EXECUTED,
    NOTEBOOKS,
    NotebookError,
    chosen_notebooks,
    facts,
    main,
    parse_overrides,
    run_notebooks,
)
from lib.presets import load_preset
from lib.training.fusion_learner import run_settings
from lib.training.run import Run
from lib.util.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = 'preset = ""\noverrides = {}\ndata_dir = ""\nout_dir = ""\nresume = False'
# what every tiny notebook does: note what it was given, and leave a section for the page
NOTE = """import json, os, pathlib
folder = pathlib.Path(out_dir)
with open(folder / "log.jsonl", "a") as log:
    given = [preset, overrides, data_dir, out_dir, resume]
    connection = json.load(open(get_ipython().kernel.config.IPKernelApp.connection_file))
    facts = {"cwd": os.getcwd(), "pid": os.getpid(), "transport": connection["transport"], "ip": connection["ip"]}
    print(json.dumps({"name": NAME, "given": given} | facts), file=log)
section = {"name": NAME, "title": NAME, "items": [{"kind": "text", "text": "seen by " + NAME}]}
(folder / "report").mkdir(exist_ok=True)
(folder / "report" / (NAME + ".json")).write_text(json.dumps(section))
print("done")"""


@pytest.fixture
def notebooks(tmp_path, monkeypatch) -> Callable[..., None]:
    """`notebooks(name=[cell, ...])` writes tiny notebooks, which the pipeline takes for its own."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(lib.pipeline, "FOLDER", folder)

    def write(**cells: list[str]) -> None:
        for name, sources in cells.items():
            head = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
            note = nbformat.v4.new_code_cell(f"NAME = {name!r}\n{NOTE}")
            metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
            notebook = nbformat.v4.new_notebook(metadata=metadata)
            notebook.cells = [head, note, *map(nbformat.v4.new_code_cell, sources)]
            nbformat.write(notebook, folder / f"{name}.ipynb")

    return write


@pytest.fixture
def project(monkeypatch) -> SimpleNamespace:
    """No data, no codec: what `open_project` would return, and what it was asked for."""
    stub = SimpleNamespace(asked=[], index=Path("index-1.npz"))
    stub.codec = SimpleNamespace(name="mdct", dim=128, fingerprint="f" * 64)
    stub.listening = lambda: stub.asked.append("listening")
    stub.manifest = SimpleNamespace(split=lambda split: (1, 2, 3) if split == "train" else (4,))
    stub.in_words = lambda: ["what it works with"]
    monkeypatch.setattr(lib.pipeline, "open_project", lambda *given, resume: stub.asked.append(given) or stub)
    return stub


@pytest.fixture
def executions(monkeypatch) -> list[tuple[str, dict]]:
    """Without kernels: name and parameters of every notebook that would be executed."""
    executed = []

    def execute(name, out, parameters):
        executed.append((name, parameters))
        (out / "report").mkdir(exist_ok=True)
        (out / "report" / f"{name}.json").write_text(json.dumps({"name": name, "title": name, "items": []}))

    monkeypatch.setattr(lib.pipeline, "execute", execute)
    return executed


@pytest.fixture(autouse=True)
def no_kernel_is_left():
    yield
    kernels = [child for child in psutil.Process().children(recursive=True) if "ipykernel" in " ".join(command(child))]
    assert not kernels


def command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def executed(out: Path, name: str) -> list:
    """The code cells of an executed notebook."""
    return [cell for cell in nbformat.read(out / f"{name}.ipynb", 4).cells if cell.cell_type == "code"]


# --- options ----------------------------------------------------------------------------------------------------------


def test_settings_are_read_as_yaml():
    settings = [
        "train.max_steps=40",
        "codec=encodec",
        "clip=null",
        "anti_cheating=0.5",
        "pair_mode=a=b",
        "learning_rate=1e-4",
    ]
    assert parse_overrides(settings) == {
        "train.max_steps": 40,
        "codec": "encodec",
        "clip": None,
        "anti_cheating": 0.5,
        "pair_mode": "a=b",
        "learning_rate": "1e-4",  # a text for YAML, a number for load_preset
    }
    assert parse_overrides(["seed=1", "seed=2"]) == {"seed": 2}
    assert parse_overrides([]) == {}


@pytest.mark.parametrize(
    "setting",
    [
        "train.max_steps",
        "=4",
        "",
        "codec=[",
        "codec=!!python/name:os.system",
        "seed=2020-13-45",
        "seed=010",  # 8 in YAML
        "train.max_steps=1:30",  # 90
    ],
)
def test_a_setting_of_another_form_is_refused(setting):
    with pytest.raises(UserError, match=f"--set {re.escape(setting)}: ") as caught:
        parse_overrides([setting])
    assert "\n" not in str(caught.value)


def test_notebooks_are_chosen_by_number_in_their_own_order():
    assert chosen_notebooks("05, 04") == ("04_training", "05_listening")
    assert chosen_notebooks("04_training,04") == ("04_training",)
    assert chosen_notebooks(None) == NOTEBOOKS
    for only in ("99", "04,99", "training", "", ",", "0"):
        with pytest.raises(UserError, match=f"--only {only}: unknown .*; choose from {', '.join(NOTEBOOKS)}"):
            chosen_notebooks(only)


def test_every_notebook_there_is_takes_part():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NOTEBOOKS)


def test_every_mistake_of_the_user_is_known_by_its_name():
    """A cell's error comes back as the name of its class."""

    def below(error: type) -> set[str]:
        return {error.__name__}.union(*map(below, error.__subclasses__()))

    assert below(UserError) == lib.pipeline.USER_ERRORS


# --- parameters -------------------------------------------------------------------------------------------------------


def test_every_parameter_that_is_passed_exists_in_its_notebook(tmp_path, project, executions):
    """papermill only warns about an unknown one."""
    run_notebooks("smoke", {"train.max_steps": 1}, "", tmp_path / "out")
    assert [name for name, _ in executions] == list(EXECUTED)
    for name, parameters in executions:
        declared = papermill.inspect_notebook(str(ROOT / "notebooks" / f"{name}.ipynb"))
        by_default = {"num_processes"} if name == "04_training" else set()  # `lib.train` is for more than one
        assert set(parameters) | by_default == set(declared), name


def test_folders_from_the_command_line_are_relative_to_where_it_was_called(tmp_path, project, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_notebooks("smoke", {}, "my songs", "my run", only=())
    (asked,) = project.asked
    assert asked == (load_preset("smoke"), str(tmp_path / "my songs"), tmp_path / "my run")


# --- execution --------------------------------------------------------------------------------------------------------


def test_notebooks_find_modules_where_the_command_runs(tmp_path, notebooks, project, monkeypatch):
    (tmp_path / "mine.py").write_text("answer = 42")
    monkeypatch.chdir(tmp_path)
    notebooks(**{"01_encoding": ["import mine\nprint(mine.answer)"]})
    run_notebooks("smoke", {}, "", tmp_path / "out", ("01_encoding",))
    assert executed(tmp_path / "out", "01_encoding")[-1].outputs[0].text == "42\n"


def test_notebooks_are_executed_and_joined_into_a_page(tmp_path, notebooks, project, capsys):
    notebooks(**{"01_encoding": [], "04_training": []})
    out = tmp_path / "a run {é}"  # papermill would take braces for a parameter
    overrides = {"codec": 'it\'s "odd" {é}', "train.clip": None, "train.learning_rate": 1e-4}
    names = "01_encoding", "04_training"
    page = run_notebooks("smoke", overrides, str(tmp_path), out, names)
    assert page == out / "index.html"
    assert page.read_text().count("seen by 04_training") == 1
    for link in ("01_encoding.ipynb", "01_encoding.html"):
        assert f'href="{link}"' in page.read_text()
        assert (out / link).exists()
    for entry, name in zip(log(out), names, strict=True):
        assert entry["name"] == name
        assert entry["given"] == ["smoke", overrides, str(tmp_path), str(out), False]
        assert entry["cwd"] == str(ROOT)
        assert not psutil.pid_exists(entry["pid"])
        assert entry["transport"] == "ipc"  # no port that others on this machine could connect to
        assert os.path.isabs(entry["ip"])
        assert not Path(entry["ip"]).parent.exists()
        assert executed(out, name)[-1].outputs[0].text == "done\n"
    assert log(out)[0]["ip"] != log(out)[1]["ip"]  # two pipelines in one repository must not share sockets
    said = capsys.readouterr().err
    assert "what it works with" in said
    assert f"[1/2] 01_encoding → {out / '01_encoding.ipynb'}" in said
    assert re.search(r"Executing: +100%", said)  # a bar for the cells


def test_resume_skips_what_is_done_under_the_same_conditions(
    tmp_path, notebooks, project, executions, capsys, monkeypatch
):
    names = "01_encoding", "04_training"
    notebooks(**{name: [] for name in names})
    run = {"preset_name": "smoke", "overrides": {}, "data_dir": str(tmp_path), "out_dir": tmp_path / "out"}

    def runs_of(**changes) -> list[str]:
        executions.clear()
        run_notebooks(**run | {"only": names, "resume": True} | changes)
        return [name for name, _ in executions]

    assert runs_of(resume=False) == list(names)
    assert runs_of() == []
    assert "[2/2] 04_training: done before, skipped" in capsys.readouterr().err
    assert runs_of(resume=False, only=names[:1]) == ["01_encoding"]
    assert runs_of(overrides={"train.max_steps": 3}, only=names[1:]) == ["04_training"]
    assert executions[0][1]["resume"] is True  # training goes on
    assert executions[0][1]["overrides"] == {"train.max_steps": 3}
    assert runs_of() == ["04_training"]
    notebooks(**{"01_encoding": ["'a new cell'"]})
    assert runs_of() == ["01_encoding"]
    project.index = Path("index-2.npz")  # other music
    assert runs_of() == list(names)
    project.codec.fingerprint = "e" * 64
    assert runs_of() == list(names)
    monkeypatch.setattr(lib.pipeline, "code_fingerprint", lambda *modules: "an edit")
    assert runs_of() == list(names)
    monkeypatch.setattr(lib.pipeline, "RECORD", tmp_path)  # of which notebooks show tables
    (tmp_path / "ablation.json").write_text("another record")
    assert runs_of() == list(names)
    (tmp_path / "claims.json").write_text("what the notebooks said")  # which none of them shows
    assert runs_of() == []


def test_a_refused_resume_replaces_nothing(tmp_path, notebooks, project, executions):
    names = "01_encoding", "04_training"
    notebooks(**{name: [] for name in names})
    run_notebooks("smoke", {}, "", tmp_path, names)
    preset = load_preset("smoke")
    model = preset.model.cascade, preset.train, preset.model.masking
    Run.create(tmp_path, run_settings(project.index, project.codec, *model) | {"code": []})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    executions.clear()
    with pytest.raises(UserError, match=r"holds a run with another config \(train\.clip: 1\.0 → 2\.0\)"):
        run_notebooks("smoke", {"train.clip": 2.0}, "", tmp_path, names, resume=True)
    assert not executions
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    run_notebooks("smoke", {"train.max_steps": 40}, "", tmp_path, names, resume=True)  # only longer
    assert [name for name, _ in executions] == list(names)


def test_any_module_of_lib_decides_whether_a_notebook_is_done(monkeypatch):
    asked = []
    monkeypatch.setattr(lib.pipeline, "code_fingerprint", lambda *modules: asked.extend(modules))
    lib.pipeline.code_of_lib()
    assert {"lib.training.losses", "lib.superres.vae", "lib.superres.__init__"} < set(asked)
    assert len(asked) == len(list((ROOT / "lib").rglob("*.py")))


def test_the_order_is_that_of_the_story_with_listening_early():
    assert sorted(EXECUTED) == sorted(NOTEBOOKS)
    assert EXECUTED[:3] == ("01_encoding", "04_training", "05_listening")
    assert EXECUTED.index("02_stage_ablation") < EXECUTED.index("03_rms_collapse")  # which reads the other's runs


def test_the_page_is_there_after_the_first_notebook_and_says_what_is_to_come(tmp_path, notebooks, project):
    """The second notebook looks at the page that the first has left."""
    out = tmp_path / "out"
    look = f"(folder / 'seen.html').write_text(open({str(out / 'index.html')!r}).read())"
    notebooks(**{"01_encoding": [], "04_training": [look], "05_listening": []})
    page = run_notebooks("smoke", {}, "", out, ("01_encoding", "04_training", "05_listening"))
    early, late = (out / "seen.html").read_text(), page.read_text()
    assert early.rstrip().endswith("</html>")
    assert "seen by 01_encoding" in early
    assert "Still to come: Training, Listening." in early
    assert "Still to come" not in late
    assert all(f"seen by {name}" in late for name in ("01_encoding", "04_training", "05_listening"))


FAILING = ["x = 1", "def f():\n    return x / 0\n\n\nf()", "print('never')"]


def test_a_failing_cell_is_reported_with_cell_error_and_notebook(tmp_path, notebooks, project, parse):
    notebooks(**{"02_stage_ablation": FAILING, "03_rms_collapse": []})
    out = tmp_path / "out"
    with pytest.raises(NotebookError) as caught:
        run_notebooks("smoke", {}, "", out, ("02_stage_ablation", "03_rms_collapse"))
    cells = executed(out, "02_stage_ablation")
    reason = f"cell {cells[-2].execution_count}: ZeroDivisionError: division by zero"
    reason += f"; the executed notebook is {out / '02_stage_ablation.ipynb'}"
    told = f"1 of 2 notebooks failed: 02_stage_ablation: {reason}"
    assert str(caught.value) == f"{told}; the page is {out / 'index.html'}"
    (error,) = (output for output in cells[-2].outputs if output.output_type == "error")
    assert "ZeroDivisionError" in error.traceback[-1]
    assert len(error.traceback) > 2
    assert not cells[-1].outputs
    source = (out / "index.html").read_text()
    failed = source.partition('<section id="02_stage_ablation" class="failed">')[2].partition("</section>")[0]
    assert "seen by 02_stage_ablation" in failed  # what it had shown before
    assert reason in failed
    assert 'href="02_stage_ablation.html"' in failed
    assert "ZeroDivisionError" in (out / "02_stage_ablation.html").read_text()
    assert '<section id="03_rms_collapse">' in source  # unharmed
    assert "seen by 03_rms_collapse" in source


def test_what_needs_a_failed_notebook_is_not_run_and_the_rest_is(tmp_path, notebooks, project):
    notebooks(
        **{"04_training": ["raise KeyError('k')"], "05_listening": [], "06_super_resolution": [], "01_encoding": []}
    )
    out, only = tmp_path / "out", ("01_encoding", "04_training", "05_listening", "06_super_resolution")
    with pytest.raises(NotebookError, match="2 of 4 notebooks failed: 04_training: cell 4: KeyError") as caught:
        run_notebooks("smoke", {}, "", out, only)
    assert "05_listening: not run: it needs 04_training, which failed" in str(caught.value)
    assert [entry["name"] for entry in log(out)] == ["01_encoding", "04_training", "06_super_resolution"]
    source = (out / "index.html").read_text()
    assert source.index('<section id="05_listening" class="failed">') < source.index('id="summary"')
    assert source.count('class="failed"') == 2
    notebooks(**{"04_training": []})
    run_notebooks("smoke", {}, "", out, only, resume=True)
    assert [entry["name"] for entry in log(out)[3:]] == ["04_training", "05_listening", "06_super_resolution"]
    assert 'class="failed"' not in (out / "index.html").read_text()


def test_a_failure_of_an_earlier_run_is_not_shown_of_what_is_still_to_come(tmp_path, notebooks, project):
    out, only = tmp_path / "out", ("01_encoding", "04_training", "05_listening")
    notebooks(**{"01_encoding": [], "04_training": ["1 / 0"], "05_listening": []})
    with pytest.raises(NotebookError):
        run_notebooks("smoke", {}, "", out, only)
    look = f"(folder / 'seen.html').write_text(open({str(out / 'index.html')!r}).read())"
    notebooks(**{"04_training": [look]})
    run_notebooks("smoke", {}, "", out, only)
    early = (out / "seen.html").read_text()
    assert "Still to come: Training, Listening." in early
    assert 'class="failed"' not in early


def test_a_notebook_that_was_stopped_says_so_beside_its_time(tmp_path, notebooks, project):
    notebooks(**{"01_encoding": [], "02_stage_ablation": []})
    out, only = tmp_path / "out", ("01_encoding", "02_stage_ablation")
    run_notebooks("smoke", {}, "", out, only)
    (out / "report" / "02_stage_ablation.mark").unlink()  # as a stop leaves it: executed in part, no mark
    run_notebooks("smoke", {}, "", out, only, resume=True)
    first, second = facts(load_preset("smoke"), out, 3, 1)["time"].split(", ")
    assert re.fullmatch(r"01_encoding \d+ s", first)
    assert re.fullmatch(r"02_stage_ablation \d+ s after a stop", second)


def test_a_failure_is_remembered_until_the_notebook_has_run_again(tmp_path, notebooks, project):
    notebooks(**{"02_stage_ablation": ["1 / 0"], "03_rms_collapse": []})
    out = tmp_path / "out"
    with pytest.raises(NotebookError):
        run_notebooks("smoke", {}, "", out, ("02_stage_ablation",))
    run_notebooks("smoke", {}, "", out, ("03_rms_collapse",))
    assert "ZeroDivisionError" in (out / "index.html").read_text()


MODULE = """import sys
sys.path.insert(0, str(folder))
(folder / "a_module.py").write_text("def f(x):\\n    assert x > 2\\n")
import a_module
a_module.f(1)"""


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("value = 3\nassert value == 4", "AssertionError: assert value == 4"),
        ("def check(x):\n    assert not x\n\n\ncheck([0])", "AssertionError: assert not x"),
        ("assert 1 > 2, 'too small'", "AssertionError: too small"),
        ("raise KeyError", "KeyError: raise KeyError"),
        (MODULE, "AssertionError: assert x > 2"),
    ],
)
def test_an_error_without_a_message_is_reported_by_its_source_line(tmp_path, notebooks, project, cell, said):
    notebooks(**{"01_encoding": [cell]})
    with pytest.raises(NotebookError, match=re.escape(f"cell 4: {said}")):
        run_notebooks("smoke", {}, "", tmp_path / "out", ("01_encoding",))


def test_a_kernel_that_dies_is_reported_like_a_failing_cell(tmp_path, notebooks, project):
    """As the kernel of a server short of memory would."""
    notebooks(**{"01_encoding": ["os.kill(os.getpid(), 9)"], "02_stage_ablation": []})
    out = tmp_path / "out"
    with pytest.raises(NotebookError, match=r"01_encoding.*died.*the executed notebook is .*01_encoding\.ipynb"):
        run_notebooks("smoke", {}, "", out, ("01_encoding", "02_stage_ablation"))
    assert executed(out, "01_encoding")
    assert "seen by 02_stage_ablation" in (out / "index.html").read_text()


def test_the_kernel_is_this_environments_own_wherever_temporary_files_lie(tmp_path, notebooks, project, monkeypatch):
    """Another kernel is called python3 here, and TMPDIR is too long for a socket."""
    spec = tmp_path / "share" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    (temporary := tmp_path / ("t" * 100)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    notebooks(**{"01_encoding": ["import sys", "open(f'{out_dir}/who', 'w').write(sys.executable)"]})
    run_notebooks("smoke", {}, "", tmp_path / "out", ("01_encoding",))
    assert (tmp_path / "out" / "who").read_text() == sys.executable


def test_facts_are_those_of_the_run(tmp_path):
    preset = load_preset("smoke")
    head = facts(preset, tmp_path, 3, 1)
    assert (head["preset"], head["pairs"]) == ("smoke", "3 training, 1 validation")
    assert "training" not in head
    config = {
        "cascade": dataclasses.asdict(CascadeConfig.reference(1, num_layers=1)),
        "codec": {"name": "mdct", "fingerprint": "f"},
    }
    run = Run.create(tmp_path, config)
    assert facts(preset, tmp_path, 3, 1)["training"] == "0 steps"
    for step in (1, 2):
        run.log({"split": "train", "step": step})
    head = facts(preset, tmp_path, 3, 1)
    assert (head["codec"], head["training"]) == ("mdct", "2 steps")
    assert head["code"] == f"commit {run.config['versions']['commit']}, torch {run.config['versions']['torch']}"


# --- stopping ---------------------------------------------------------------------------------------------------------

SLEEP = """import time
try:
    (folder / "asleep").touch()
    time.sleep(120)
finally:
    (folder / "saved").touch()"""


def wait_for(path: Path, process: subprocess.Popen | None = None) -> None:
    end = time.monotonic() + 120
    while not path.exists() and time.monotonic() < end and (process is None or process.poll() is None):
        time.sleep(0.05)


def test_ctrl_c_lets_the_cell_save_and_says_how_to_go_on(tmp_path, notebooks):
    """In a process of its own, as from a terminal."""
    notebooks(**{"01_encoding": [SLEEP]})
    out = tmp_path / "out"
    script = f"""
import pathlib, sys
from types import SimpleNamespace
import lib.pipeline
manifest = SimpleNamespace(split=lambda split: ())
codec, index = SimpleNamespace(name="mdct", dim=128, fingerprint="f"), pathlib.Path("index.json")
project = SimpleNamespace(manifest=manifest, codec=codec, index=index, in_words=lambda: [])
lib.pipeline.open_project = lambda *_, resume: project
lib.pipeline.FOLDER = pathlib.Path({str(tmp_path / "notebooks")!r})
sys.argv = ["lib.pipeline", "--preset", "smoke", "--only", "01", "--out", {str(out)!r}]
lib.pipeline.main()
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(out / "asleep", process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert (out / "saved").exists()
    assert "SIGINT: asking the notebook to save and stop; again to stop at once" in errors
    assert errors.splitlines()[-1].startswith("error: ")
    assert errors.splitlines()[-1].endswith("resume with --resume")
    assert "Traceback" not in errors
    assert executed(out, "01_encoding")[-1].outputs[-1].ename == "KeyboardInterrupt"
    with contextlib.suppress(psutil.NoSuchProcess):  # the kernel ended with the pipeline
        psutil.Process(log(out)[0]["pid"]).wait(10)


def test_sigterm_stops_like_ctrl_c_and_leaves_the_handlers_as_they_were(tmp_path, notebooks, project):
    notebooks(**{"01_encoding": [SLEEP]})
    out = tmp_path / "out"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def stop() -> None:
        wait_for(out / "asleep")
        os.kill(os.getpid(), signal.SIGTERM)

    out.mkdir()
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match="resume with --resume"):
        run_notebooks("smoke", {}, "", out, ("01_encoding",))
    thread.join()
    assert (out / "saved").exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def call(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[object, str, str]]:
    """`call(*argv)` runs the command in a repository of its own; returns exit code, stdout and stderr."""
    monkeypatch.setattr(lib.project, "ROOT", tmp_path / "repo")

    def run(*argv: str | Path) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["lib.pipeline", *map(str, argv)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def songs(tmp_path) -> Path:
    """Four songs of 5 s."""
    folder = tmp_path / "my songs é"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        soundfile.write(folder / f"{number}.wav", 0.1 * rng.standard_normal(5 * 24_000), 24_000)
    return folder


def check_one_line(result: tuple[object, str, str], *words: str) -> None:
    """Exit code 2, and after what the pipeline said it was doing one line of error."""
    code, said, errors = result
    assert (code, said) == (2, ""), errors
    lines = [line for line in errors.splitlines() if not line.startswith("preset smoke: ")]
    assert len(lines) == 1, errors
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "big"], ["preset: unknown 'big'; choose one of smoke, demo, reference, full"]),
        (["--set", "train.max_step=4"], ["setting train.max_step is unknown; did you mean train.max_steps"]),
        (["--set", "max_steps=4"], ["setting max_steps is unknown; did you mean train.max_steps"]),
        (["--set", "name=x"], ["setting name is unknown; "]),
        (["--set", "train.max_steps"], ["--set train.max_steps: not of the form name=value; write for example"]),
        (["--set", "train.max_steps="], ["--set train.max_steps=: not of the form name=value; write for example"]),
        (["--set", "train.max_steps=many"], ["train.max_steps='many' is not allowed; use a whole number, 1 or more"]),
        (["--set", "train.batch_size=0"], ["batch_size=0 is not allowed; use a whole number"]),
        (["--only", "04,99"], ["--only 04,99: unknown 99; choose from 01_encoding"]),
        (["--codec", "lpc"], ["codec 'lpc': unknown; choose mdct or encodec"]),
    ],
)
def test_a_bad_option_is_one_line(tmp_path, call, options, words):
    defaults = [] if "--preset" in options else ["--preset", "smoke"]
    check_one_line(call(*defaults, "--out", tmp_path / "out", *options), *words)


def test_a_bad_folder_is_one_line(tmp_path, call, songs):
    def fails(*words: str, data: Path = songs, out: Path = tmp_path / "out", codec: str | Path = "mdct") -> None:
        check_one_line(call("--preset", "smoke", "--data", data, "--out", out, "--codec", codec), *words)

    file, empty, broken = tmp_path / "a file", tmp_path / "empty é", tmp_path / "broken"
    file.write_text("x")
    empty.mkdir()
    broken.mkdir()
    (broken / "zero.wav").write_bytes(b"")
    (broken / "text.mp3").write_text("la la")
    (broken / "cover.jpg").write_text("")
    fails(f"{tmp_path / 'none'}: no such folder; check the path", data=tmp_path / "none")
    fails(f"{file}: a file, not a folder; name the folder it is in", data=file)
    fails(f"{empty}: no music in this folder; put WAV, FLAC, OGG, MP3, M4A, Opus or AIFF files there", data=empty)
    fails(f"{broken}: no usable pair for", "zero.wav: empty (0 bytes)", "text.mp3: not audio", data=broken)
    fails(f"{file}: cannot be written", "choose another output folder", out=file)
    fails(f"{file / 'out'}: cannot be written", "choose another output folder", out=file / "out")
    fails("/proc/out: cannot be written", "choose another output folder", out=Path("/proc/out"))
    fails(f"{empty}: needs exactly one encodec_24khz", "found none", codec=empty)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    odd.mkdir()
    for folder in ({"data": odd}, {"out": odd}):
        fails("folder=", "udcff' is not allowed; use a name in UTF-8", **folder)


def test_a_bad_file_among_good_ones_is_listed_and_skipped(tmp_path, call, songs, executions):
    (songs / "broken é.wav").write_text("la la")
    out = tmp_path / "out"
    code, said, errors = call("--preset", "smoke", "--data", songs, "--out", out)
    assert (code, said) == (0, f"report: {out / 'index.html'}\n"), errors
    assert f"1 files were skipped, listed in {out / 'manifest.json'}" in errors
    assert "  broken é.wav: not audio" in errors
    assert [item["path"] for item in json.loads((out / "manifest.json").read_text())["skipped"]] == ["broken é.wav"]


def test_a_mistake_that_only_a_cell_finds_is_one_line_too(tmp_path, call, notebooks, project):
    notebooks(
        **{"05_listening": ["from lib.util.errors import UserError", "raise UserError('x.wav: too short;\\nuse more')"]}
    )
    code, said, errors = call("--preset", "smoke", "--only", "05", "--out", tmp_path / "out")
    assert (code, said) == (2, "")
    assert errors.splitlines()[-1] == "error: x.wav: too short; use more"
    assert "Traceback" not in errors
    assert "cell 5: UserError: x.wav: too short;\nuse more" in (tmp_path / "out" / "index.html").read_text()


def test_a_failure_of_ours_has_exit_code_1(tmp_path, call, project, monkeypatch):
    def execute(name, out, parameters):
        raise NotebookError(name, "cell 3: KeyError: 'x'; the executed notebook is there")

    monkeypatch.setattr(lib.pipeline, "execute", execute)
    code, _, _ = call("--preset", "smoke", "--only", "01", "--out", tmp_path / "out")
    error = "1 of 1 notebooks failed: 01_encoding: cell 3: KeyError: 'x'; the executed notebook is there"
    assert code == f"error: {error}; the page is {tmp_path / 'out' / 'index.html'}"  # printed, with code 1


def test_the_options_reach_the_notebooks(tmp_path, call, monkeypatch):
    asked = {}

    def stub(*given):
        asked.update(inspect.signature(run_notebooks).bind(*given).arguments)
        return tmp_path / "index.html"

    monkeypatch.setattr(lib.pipeline, "run_notebooks", stub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    folders = ["--data", "songs", "--out", "there", "--codec", "weights"]
    settings = ["--set", "train.max_steps=5", "--set", "train.clip=null"]
    assert call("--preset", "demo", *folders, *settings, "--only", "05,04", "--resume")[0] == 0
    assert asked == {
        "preset_name": "demo",
        "overrides": {"train.max_steps": 5, "train.clip": None, "codec": str(tmp_path / "weights")},
        "data_dir": "songs",
        "out_dir": "there",
        "only": ("04_training", "05_listening"),
        "resume": True,
    }


def test_listening_is_done_again_after_another_training(tmp_path, notebooks, project, executions):
    names = "04_training", "05_listening"
    notebooks(**{name: [] for name in names})
    run = {"preset_name": "smoke", "overrides": {}, "out_dir": tmp_path / "out"}
    run_notebooks(**run, only=names)
    run_notebooks(**run, only=names[:1])  # trains again
    executions.clear()
    run_notebooks(**run, only=names, resume=True)
    assert [name for name, _ in executions] == ["05_listening"]


def test_an_own_term_that_is_not_there_is_refused_where_one_trains_before_music_is_read(tmp_path, project, executions):
    own = {"train.loss.own": {"a": {"function": "no:term", "weight": 1.0}}}
    with pytest.raises(UserError, match="'no:term': cannot be imported"):
        run_notebooks("smoke", own, "", tmp_path)
    assert not project.asked
    run_notebooks("smoke", own, "", tmp_path, ("05_listening",))
    assert [name for name, _ in executions] == ["05_listening"]
