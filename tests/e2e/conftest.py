"""A real browser: the system's Chromium, driven by Playwright, and a JupyterLab of the tests' own for it to open."""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from playwright.sync_api import Browser, Locator, Page, WebSocketRoute, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-dev-shm-usage")  # of a browser that runs as root, as CI's does
SETTINGS = {  # JupyterLab's: every cell is in the page, and nothing is fetched or asked
    "notebook-extension/tracker": {"windowingMode": "none", "kernelShutdown": True},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Where there is none, tests are skipped; with NEED_BROWSER in the environment they fail."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing = "no Chromium on this machine; install it (apt-get install chromium)"
        pytest.fail(missing) if os.environ.get("NEED_BROWSER") else pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def screenshots() -> Path:
    """Where a test leaves pictures to look at."""
    folder = ROOT / "outputs" / "e2e"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def watched(browser) -> Iterator[Callable[..., Page]]:
    """`watched(width=, dark=)` opens a page; a console error or a request that leaves the file fails the test."""
    faults: list[str] = []
    pages = []

    def open_page(width: int = 1200, height: int = 900, dark: bool = False) -> Page:
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: None if local(request.url) else faults.append(f"request to {request.url}"))
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert faults == []


def local(url: str) -> bool:
    return url.startswith(("file:", "data:", "blob:"))


class Notebook:
    """A notebook that is open in JupyterLab."""

    def __init__(self, page: Page):
        self.page = page
        self.cells = page.locator(".jp-Notebook .jp-CodeCell")

    def run_all(self, timeout: float) -> None:
        """Run every cell from a fresh kernel and wait for the last; fails on a cell that raises."""
        self.start("Restart Kernel and Run All Cells…")
        self.page.get_by_role("button", name="Confirm Kernel Restart").click()
        self.wait(timeout)

    def start(self, entry: str) -> None:
        """An entry of the menu Run."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name=entry, exact=True).click()

    def wait(self, timeout: float) -> None:
        """Until every code cell has run and the kernel is idle."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            prompts = self.cells.locator(".jp-InputPrompt").all_inner_texts()
            assert self.page.locator("[data-mime-type='application/vnd.jupyter.stderr'] .ansi-red-fg").count() == 0, (
                self.page.locator("[data-mime-type='application/vnd.jupyter.stderr']").last.inner_text()
            )
            if prompts and all(re.fullmatch(r"\[\d+\]:", prompt.strip()) for prompt in prompts):
                return
            self.page.wait_for_timeout(500)
        raise AssertionError(f"still running after {timeout} s: {prompts}")

    def cell(self, text: str) -> Locator:
        """The code cell whose source has this text."""
        found = self.cells.filter(has=self.page.locator(".jp-InputArea", has_text=text))
        expect(found).to_have_count(1)
        return found


class Lab:
    """A JupyterLab server on a folder of its own, into which notebooks are copied when they are opened."""

    def __init__(self, folder: Path, browser: Browser):
        self.folder, self.browser = folder, browser
        self.token = secrets.token_hex(16)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        settings = folder / "settings"
        for name, values in SETTINGS.items():
            file = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={self.port}"]
        command += [f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={folder}"]
        command += ['--ServerApp.tornado_settings={"websocket_max_message_size": 500000000}']  # as in the Makefile
        command += ["--ServerApp.port_retries=0", "--LabApp.news_url=", "--LabApp.extension_manager=readonly"]
        environment = os.environ | {
            "JUPYTERLAB_SETTINGS_DIR": str(settings),
            "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
            "JUPYTER_CONFIG_DIR": str(folder / "config"),
        }
        self.log = folder / "server.log"
        with open(self.log, "w") as log:
            self.server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}token={self.token}"

    def wait_until_up(self) -> None:
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url("api/status?"), timeout=5):
                return
            assert self.server.poll() is None, self.log.read_text()
            time.sleep(0.25)
        raise AssertionError(self.log.read_text())

    def open(self, name: str, relay: Callable[[WebSocketRoute], None] | None = None, **parameters: Any) -> Notebook:
        """A copy of a notebook of this project, without outputs and with other parameters."""
        notebook = parameterize_notebook(load_notebook_node(str(ROOT / "notebooks" / f"{name}.ipynb")), parameters)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, self.folder / f"{name}.ipynb")
        return self.open_copy(name, relay)

    def open_copy(self, name: str, relay: Callable[[WebSocketRoute], None] | None = None) -> Notebook:
        """A notebook of the server's folder. `relay`: is given every connection to a kernel."""
        page = self.browser.new_page(viewport={"width": 1400, "height": 1000})
        if relay is not None:
            page.route_web_socket(re.compile("/api/kernels/"), relay)
        page.goto(self.url(f"lab/tree/{name}.ipynb?reset&"))
        expect(page.get_by_role("button", name="Python 3 (ipykernel) | Idle")).to_be_visible(timeout=60_000)
        return Notebook(page)

    def close(self) -> None:
        self.server.terminate()
        try:
            self.server.wait(30)
        except subprocess.TimeoutExpired:
            self.server.kill()


@pytest.fixture(scope="session")
def lab(browser, tmp_path_factory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"), browser)
    try:
        lab.wait_until_up()
        yield lab
    finally:
        lab.close()
