"""Draws samples with the JavaScript module, in Node.js and in Chromium, for benchmarks and tests.

Needs Node.js with npm and the packages of javascript/ (`make javascript`), and for a browser playwright and
Chromium.
"""

import functools
import http.server
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

JAVASCRIPT = Path(__file__).resolve().parent.parent / "javascript"
_PROGRAM = Path(__file__).with_suffix(".mjs")
_SECONDS = 300


def missing_packages() -> str | None:
    """What is missing on this machine, or None if `in_node` works."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return "Node.js with npm (Debian's nodejs and npm)"
    if not (JAVASCRIPT / "node_modules" / ".package-lock.json").exists():
        return "the packages of javascript/ (make javascript)"
    return None


def chromium_path() -> str | None:
    """Path of Chromium, or None."""
    return shutil.which("chromium") or shutil.which("google-chrome")


def node(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Node.js to its end."""
    command = ["node", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, **options)


def camel_case(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `export.Sampler.sample` under the names that they have in JavaScript."""
    found = {}
    for name, value in options.items():
        first, *others = name.split("_")
        found["".join([first, *map(str.capitalize, others)])] = value
    return found


def in_node(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What comes of each run in Node.js, see javascript_runs.mjs; `file` is a path."""
    result = node(_PROGRAM, input=json.dumps(runs))
    if result.returncode:
        raise RuntimeError(f"Node.js failed: {result.stderr}")
    return json.loads(result.stdout)


def in_browser(chromium: Any, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What comes of each run in a browser, with WebAssembly in one thread.

    Args:
        chromium: a browser of playwright.
        runs: as for `in_node`.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "javascript").symlink_to(JAVASCRIPT)
        shutil.copy(_PROGRAM, root)
        (root / "index.html").write_text("<!doctype html><title>runs</title>")
        names = {
            path: f"{number}.onnx" for number, path in enumerate(dict.fromkeys(run["file"] for run in runs))
        }
        for path, name in names.items():
            shutil.copy(path, root / name)
        with serve(root) as url:
            page = chromium.new_page()
            page.goto(url)
            found = page.evaluate(
                """async (runs) => {
                    const runtime = "/javascript/node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
                    const ort = await import(runtime);
                    ort.env.wasm.numThreads = 1;
                    const { Sampler } = await import("/javascript/src/index.js");
                    const { draw } = await import("/javascript_runs.mjs");
                    return draw(runs, async (file) => (await fetch(file)).arrayBuffer(), { Sampler, ort });
                }""",
                [run | {"file": names[run["file"]]} for run in runs],
            )
            page.close()
            return found


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder on a free port of this machine, with no other headers than any static server sends."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
