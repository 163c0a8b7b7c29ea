"""State that all requests share: the options to begin with, the files, the token, and the engine."""

import secrets
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidrag.page.store import Store
from minidrag.system import console

if TYPE_CHECKING:
    from minidrag.page.engine import Engine

LOCAL = "127.0.0.1"
STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}  # Windows' registry may differ


class Refused(Exception):
    """A request that is not answered: status and one sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Site:
    """The page of one server. Its engine follows once PyTorch is imported."""

    def __init__(self, store: Store, start: dict[str, Any]):
        self.store = store
        self.start = start  # options to begin with, as in run.json
        self.token = secrets.token_urlsafe(24)
        self.static = read_static()
        self.engine: Engine | None = None
        self.trouble = ""  # why there is no engine
        self.ready = threading.Event()

    def bind(self, host: str, port: int) -> None:
        """Note where the site is served."""
        self.address = f"http://{LOCAL if host == '0.0.0.0' else host}:{port}/?token={self.token}"
        self.names = {f"{name}:{port}" for name in own_names(host)}
        self.cookie = f"minidrag-{port}"  # cookies are shared between ports

    def load(self, fixed: dict[str, str | None]) -> None:
        """Import the method, load the model, and start the work. fixed: options of the command line."""
        try:
            from minidrag.page.engine import Engine  # late: importing PyTorch takes seconds

            engine = Engine(self.store, self.start["model"], fixed)
            with suppress(ValueError):  # a photo that cannot be read: opening it says so
                engine.prefetch(self.start | engine.validator.fixed)
            engine.thread.start()
            self.engine = engine
        except Exception as error:  # else the page would wait forever
            self.trouble = console.reason(error)
        self.ready.set()

    def loaded(self) -> "Engine":
        """Wait for the engine."""
        self.ready.wait(120)
        if self.engine is None:
            raise Refused(503, self.trouble or "the server is still starting: try again")
        return self.engine


def own_names(host: str) -> set[str]:
    """Names by which a request may call this server."""
    names = {LOCAL, "localhost", host.lower()}
    if host not in names - {host}:
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        with suppress(OSError):
            names |= set(socket.gethostbyname_ex(socket.gethostname())[2])
    return names


def read_static() -> dict[str, tuple[str, bytes]]:
    """Types and contents of the page's own files, by path of their URL."""
    files = {f"/{path.name}": path for path in STATIC.iterdir() if path.suffix in TYPES}
    files["/"] = files.pop("/index.html")
    return {url: (f"{TYPES[path.suffix]}; charset=utf-8", path.read_bytes()) for url, path in files.items()}
