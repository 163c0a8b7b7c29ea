"""Serve the page to this machine's browser, and to nobody else.

    minidrag page [PHOTO] [--model MODEL] [--port N] [--no-browser]

Nothing here imports PyTorch at the top: the page is there before the model.
"""

import argparse
import os
import signal
import sys
import threading
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from minidrag.page.handler import Handler
from minidrag.page.history import read_json
from minidrag.page.site import LOCAL, Site
from minidrag.page.store import Store
from minidrag.system import console

DEMO = Path(__file__).parents[1] / "tiny/demo/drag.json"
PORTS = range(7860, 7960)


class Server(ThreadingHTTPServer):
    """The server of a site, at a port."""

    daemon_threads = True
    request_queue_size = 128  # a page requests its images all at once
    allow_reuse_address = os.name != "nt"  # on Windows it would share the port with another program

    def __init__(self, host: str, port: int, site: Site):
        super().__init__((host, port), partial(Handler, site))
        self.site = site
        site.bind(host, self.server_address[1])

    def load(self, arguments: argparse.Namespace) -> None:
        """Load the engine of the site; shut down if that is not possible."""
        self.site.load({name: getattr(arguments, name) for name in ("vae", "tokenizer", "device", "dtype")})
        if self.site.trouble:
            self.shutdown()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception() if sys.version_info >= (3, 11) else sys.exc_info()[1]
        if not isinstance(error, OSError):  # a browser that went away
            print(f"minidrag: a request failed, {type(error).__name__}: {error}", file=sys.stderr)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ValueError, one sentence, for what cannot be."""
    parser = console.Parser("minidrag page", "minidrag page [PHOTO] [options]")
    add = parser.add_argument
    add("--page", action="store_true", help="open the page, instead of one edit")
    add("image", nargs="?", metavar="PHOTO", help="an image to begin with (default: the one that ships)")
    add("--model", help="as for minidrag (default: sd15 for a PHOTO, else tiny; the page can change it)")
    for name in ("vae", "tokenizer", "device", "dtype"):
        add(f"--{name}", help="as for minidrag")
    add("--port", type=int, metavar="N", help=f"default: the first free one from {PORTS[0]}")
    add("--no-browser", action="store_true", help="print the address and open nothing")
    add("--host", default=LOCAL, help="address to listen at (default: %(default)s, this machine alone)")
    add("--expose", action="store_true", help="allow a --host that other machines can reach")
    parsed = parser.parse_args(arguments)
    if parsed.host not in (LOCAL, "localhost") and not parsed.expose:
        raise ValueError(
            f"--host {parsed.host} would let other machines in, and whoever has the address use this one: "
            "add --expose if you want that"
        )
    if parsed.image and not Path(parsed.image).is_file():
        raise ValueError(f"there is no file {parsed.image}")
    return parsed


def start_options(image: str | None, model: str | None) -> dict[str, Any]:
    """Options that the page starts with, as in run.json: the demo's drag, or a photo without one."""
    if image:
        return {"image": str(Path(image).resolve()), "mask": None, "drags": [], "model": model or "sd15"}
    values = read_json(DEMO)
    files = {name: str(DEMO.parent / values[name]) for name in ("image", "mask")}
    return values | files | {"model": model or values["model"]}


def listen(host: str, port: int | None, site: Site) -> Server:
    """A server at a port, or at the first free one of PORTS."""
    for number in [port] if port is not None else PORTS:
        try:
            return Server(host, number, site)
        except OverflowError:
            raise ValueError(f"--port must be 0 to 65535, got {number}") from None
        except OSError as error:
            reason = error
    raise ValueError(f"cannot listen at {host}:{port or PORTS[0]}: {reason.strerror}; give another --port")


def serve(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl-C. Raises ValueError, one sentence, for what cannot be."""
    start = start_options(arguments.image, arguments.model)
    site = Site(Store(*(Path(start[name]) for name in ("image", "mask") if start.get(name))), start)
    server = listen(arguments.host, arguments.port, site)
    print(f"page: {site.address}", "Ctrl-C ends it", sep="\n", flush=True)
    if arguments.expose:
        print("warning: other machines can reach this page: the address is its key", flush=True)
    threading.Thread(target=server.load, args=(arguments,), daemon=True).start()
    if not arguments.no_browser:
        threading.Thread(target=webbrowser.open, args=(site.address,), daemon=True).start()
    with suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        server.serve_forever()
    server.server_close()
    if site.trouble:
        raise ValueError(site.trouble)
    ended = site.engine is None
    with suppress(KeyboardInterrupt):  # once more, by someone who does not wait for the step
        print("stopping", flush=True)
        ended = site.engine is None or site.engine.close()
    if not ended:
        os._exit(0)  # in the middle of a step: PyTorch would abort while Python ends


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status."""
    return console.command(lambda: serve(parse(arguments)))
