"""Serve the page to this machine's browser, and to nobody else.

    python demo.py --page [PHOTO] [--model MODEL] [--port N] [--no-browser]

Nothing here imports PyTorch at the top: the page is there before the model.
"""

import argparse
import os
import secrets
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidrag.page.handler import Handler, Refused
from minidrag.page.history import read_json
from minidrag.page.store import Store
from minidrag.system import console

if TYPE_CHECKING:
    from minidrag.page.jobs import Queue

HERE = Path(__file__).parent
DEMO = HERE.parent / "tiny/demo/drag.json"
PORTS = range(7860, 7960)
LOCAL = "127.0.0.1"


class Server(ThreadingHTTPServer):
    """The page's server; its queue comes once PyTorch is imported."""

    daemon_threads = True
    request_queue_size = 128  # a page asks for its pictures all at once
    allow_reuse_address = os.name != "nt"  # on Windows it would share the port with another program

    def __init__(self, host: str, port: int, store: Store, start: dict[str, Any]):
        super().__init__((host, port), Handler)
        self.store, self.start, self.token = store, start, secrets.token_urlsafe(24)
        self.queue: Queue | None = None
        self.trouble = ""  # why there is no queue
        self.ready = threading.Event()
        port = self.server_address[1]
        self.names = {f"{name}:{port}" for name in own_names(host)}
        self.cookie = f"minidrag-{port}"  # cookies are shared between ports

    @property
    def address(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{LOCAL if host == '0.0.0.0' else host}:{port}/?token={self.token}"

    def load(self, arguments: argparse.Namespace) -> None:
        """Import what is slow, load the model, and take up the work."""
        try:
            from minidrag.page.jobs import Queue

            fixed = {name: getattr(arguments, name) for name in ("vae", "tokenizer", "device", "dtype")}
            queue = Queue(self.store, self.start["model"], fixed)
            with suppress(ValueError):  # a photo that cannot be read: the page says so when it shows it
                queue.prepare(self.start | queue.terms.fixed, "load")
            queue.worker.start()
            self.queue = queue
        except Exception as error:  # else the page would wait for ever
            self.trouble = console.reason(error)
            threading.Thread(target=self.shutdown).start()
        self.ready.set()

    def working(self) -> "Queue":
        """The queue, as soon as it is there."""
        self.ready.wait(120)
        if self.queue is None:
            raise Refused(503, self.trouble or "the program is still starting: try again")
        return self.queue

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception() if sys.version_info >= (3, 11) else sys.exc_info()[1]
        if not isinstance(error, OSError):  # a browser that went away
            print(f"minidrag: a request failed, {type(error).__name__}: {error}", file=sys.stderr)


def own_names(host: str) -> set[str]:
    """Names under which this server may be asked for."""
    names = {LOCAL, "localhost", host.lower()}
    if host not in names - {host}:
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        with suppress(OSError):
            names |= set(socket.gethostbyname_ex(socket.gethostname())[2])
    return names


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ValueError, one sentence, for what cannot be."""
    parser = console.Parser("demo.py --page", "demo.py --page [PHOTO] [options]")
    add = parser.add_argument
    add("--page", action="store_true", help="open the page, instead of one edit")
    add("image", nargs="?", metavar="PHOTO", help="an image to begin with (default: the one that ships)")
    add("--model", help="as for demo.py (default: sd15 for a PHOTO, else tiny; the page can change it)")
    for name in ("vae", "tokenizer", "device", "dtype"):
        add(f"--{name}", help="as for demo.py")
    add("--port", type=int, metavar="N", help=f"default: the first free one from {PORTS[0]}")
    add("--no-browser", action="store_true", help="print the address and open nothing")
    add("--host", default=LOCAL, help="address to listen at (default: %(default)s, this machine alone)")
    add("--expose", action="store_true", help="allow a --host that other machines can reach")
    given = parser.parse_args(arguments)
    if given.host not in (LOCAL, "localhost") and not given.expose:
        raise ValueError(
            f"--host {given.host} would let other machines in, and whoever has the address use this one: "
            "add --expose if you want that"
        )
    if given.image and not Path(given.image).is_file():
        raise ValueError(f"there is no file {given.image}")
    return given


def start_options(image: str | None, model: str | None) -> dict[str, Any]:
    """Options that the page starts with, as in run.json: the demo's drag, or a photo without one."""
    if image:
        return {"image": str(Path(image).resolve()), "mask": None, "drags": [], "model": model or "sd15"}
    values = read_json(DEMO)
    files = {name: str(DEMO.parent / values[name]) for name in ("image", "mask")}
    return values | files | {"model": model or values["model"]}


def listen(host: str, port: int | None, store: Store, start: dict[str, Any]) -> Server:
    """A server at a port, or at the first free one of PORTS."""
    for number in [port] if port is not None else PORTS:
        try:
            return Server(host, number, store, start)
        except OverflowError:
            raise ValueError(f"--port must be 0 to 65535, got {number}") from None
        except OSError as error:
            reason = error
    raise ValueError(f"cannot listen at {host}:{port or PORTS[0]}: {reason.strerror}; give another --port")


def serve(given: argparse.Namespace) -> None:
    """Serve until Ctrl-C. Raises ValueError, one sentence, for what cannot be."""
    start = start_options(given.image, given.model)
    store = Store(*(Path(start[name]) for name in ("image", "mask") if start.get(name)))
    server = listen(given.host, given.port, store, start)
    print(f"page: {server.address}", "Ctrl-C ends it", sep="\n", flush=True)
    if given.expose:
        print("warning: other machines can reach this page: the address is its key", flush=True)
    threading.Thread(target=server.load, args=(given,), daemon=True).start()
    if not given.no_browser:
        threading.Thread(target=webbrowser.open, args=(server.address,), daemon=True).start()
    with suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        server.serve_forever()
    server.server_close()
    if server.trouble:
        raise ValueError(server.trouble)
    ended = server.queue is None
    with suppress(KeyboardInterrupt):  # once more, by someone who does not wait for the step
        print("stopping", flush=True)
        ended = server.queue is None or server.queue.close()
    if not ended:
        os._exit(0)  # in the middle of a step: PyTorch would abort while Python ends


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status."""
    return console.command(lambda: serve(parse(arguments)))
