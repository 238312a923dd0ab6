"""The browser that tests drive, and how it is started; None where this machine has none. And a JupyterLab for it,
with the moves of whoever uses it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from processes import until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@contextlib.contextmanager
def jupyterlab(home: Path) -> Iterator[str]:
    """The address of a JupyterLab over this folder, with its own settings."""
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    names = ["JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "JUPYTERLAB_WORKSPACES_DIR"]
    env = os.environ | {name: str(home / name.lower()) for name in names}
    env |= {
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "OMP_NUM_THREADS": "1",  # two threads on cores that other tests use wait for each other, and for very long
        "MINIPEFT_PROGRESS": str(home / "progress.json"),
    }
    env.pop("MPLBACKEND", None)  # the kernel chooses for itself, as at home
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token="]
    command += [f"--ServerApp.root_dir={home}"]
    log = (home / "log").open("wb")
    server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=home)
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert server.poll() is None, (home / "log").read_text()
        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen(f"{address}/api", timeout=1).read())
        return False

    try:
        until(answers, "JupyterLab's answer", 300, pause=0.25)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:  # it waits for a kernel that was restarted
            server.kill()
            server.wait(20)


# The picture's title says where the controls stand, so it is a new one for a move and not for the run before.
WATCH = """img => {
    window.waited = new Promise((done, failed) => {
        let from = performance.now(), seen, soon;
        const moves = ['keydown', 'mousemove', 'mouseup', 'change'], move = () => { from = performance.now(); };
        const end = () => {
            watch.disconnect();
            moves.forEach(kind => document.removeEventListener(kind, move, true));
            done((seen - from) / 1000);
        };
        const watch = new MutationObserver(() => {
            seen = performance.now();
            clearTimeout(soon);
            soon = setTimeout(end, 500);
        });
        moves.forEach(kind => document.addEventListener(kind, move, true));
        watch.observe(img, {attributeFilter: ['title']});
        setTimeout(() => failed(new Error('the picture did not change within 20 s')), 20000);
    });
}"""


def picture_after(page, image, move) -> float:
    """Seconds from the last key, mouse move or choice in `move()` to its last picture by the page's clock."""
    image.evaluate(WATCH)
    move()
    return page.evaluate("window.waited")


def by_mouse(page, handle, pixels: float) -> None:
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + pixels, y, steps=5)
    page.mouse.up()


def menu(page, menu: str, item: str) -> None:
    """Chooses from the menu bar; an item's accessible name also has its shortcut, so it is found by its label."""
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.locator(".lm-Menu-item", has=page.get_by_text(item, exact=True)).click()
