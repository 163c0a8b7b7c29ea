"""Answers to the page's requests.

A request is refused that lacks the token, names another host, or changes anything without being JSON from the
page itself. What the page may ask for is in three tables.
"""

import hmac
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from minidrag.page.history import match, to_png
from minidrag.system import console

if TYPE_CHECKING:
    from minidrag.page.serve import Server

HERE = Path(__file__).parent
STATIC = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
MEBIBYTE = 2**20
# In base64, which is a third longer than a file.
BODY = {"/picture": 64 * MEBIBYTE, "/mask": 16 * MEBIBYTE, "/draft": 16 * MEBIBYTE}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Refused(Exception):
    """A request that is not answered: status and one sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Guard(BaseHTTPRequestHandler):
    """Refuses what does not come from the page, and writes answers that nothing else can read."""

    server: "Server"  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "minidrag", ""
    timeout = 60  # seconds that a client may be silent

    def admit(self, token: str | None) -> None:
        """Refuse a request for another host, which a foreign page can make, and one without the token."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].lower() not in self.server.names:
            raise Refused(403, "this server answers only to its own address")
        with suppress(CookieError):
            cookies = SimpleCookie(self.headers.get("Cookie", ""))
            token = token or getattr(cookies.get(self.server.cookie), "value", None)
        if not token or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(403, "open the address that the command printed: it has the token of this session")

    def body(self, limit: int) -> bytes:
        """Body of a request that the page itself has sent, as JSON, of at most so many bytes."""
        if self.headers.get_all("Origin") != [f"http://{self.headers['Host']}"]:
            raise Refused(403, "only the page itself may ask for that")
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "the request must be JSON")
        lengths = self.headers.get_all("Content-Length") or []
        if "Transfer-Encoding" in self.headers or len(lengths) != 1 or not lengths[0].isdecimal():
            raise Refused(411, "the request must say how long it is")
        if len(lengths[0]) > 12 or int(lengths[0]) > limit:
            raise Refused(413, f"that is more than {limit // MEBIBYTE} MB: send a smaller file")
        content = self.rfile.read(int(lengths[0]))
        if len(content) < int(lengths[0]):
            raise ConnectionError("the body did not arrive whole")
        return content

    def send_json(self, values: Any) -> None:
        self.send(200, "application/json", json.dumps(values).encode())

    def say(self, status: int, sentence: object) -> None:
        self.send(status, "application/json", json.dumps({"error": " ".join(str(sentence).split())}).encode())

    def send(self, status: int, kind: str, content: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        about = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store"}
        for name, value in (about | HEADERS | (more or {})).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is not HTTP, or of another method than GET and POST."""
        self.close_connection = True
        self.say(code, message or "the request is malformed")

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the terminal quiet."""


class Handler(Guard):
    """Finds the answer to a request in the tables below."""

    def do_GET(self) -> None:
        self.answer(self.get)

    def do_POST(self) -> None:
        self.answer(self.post)

    def answer(self, respond: Callable[[], None]) -> None:
        """Answer a request, or say in one sentence why not."""
        try:
            respond()
        except Refused as error:
            self.say(error.status, error)
        except KeyError as error:
            self.say(404, f"there is no {str(error)[:80]}")
        except FileNotFoundError as error:
            self.say(404, f"{Path(error.filename or 'the file').name} is gone")
        except (ConnectionError, TimeoutError):
            raise
        except OSError as error:
            self.say(507 if error.errno else 400, console.reason(error))
        except (ValueError, RecursionError) as error:
            self.say(400, error)
        except Exception as error:  # a mistake in the program must not end the server
            print(f"minidrag: {self.path[:80]}, {type(error).__name__}: {error}", file=sys.stderr)
            self.say(500, f"a mistake in the program, {type(error).__name__}: {error}")

    def get(self) -> None:
        url = urlsplit(self.path)
        asked = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.admit(asked.get("token"))
        if url.path in STATIC:
            file, kind = STATIC[url.path]
            cookie = f"{self.server.cookie}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
            return self.send(200, kind, (HERE / file).read_bytes(), {"Set-Cookie": cookie})
        if url.path in ANSWERS:
            return self.send_json(ANSWERS[url.path](self.server, asked))
        if url.path not in FILES:
            raise Refused(404, "there is no such page")
        kind, content = FILES[url.path](self.server, asked)
        kept = {"Cache-Control": "private, max-age=86400"} if "v" in asked else {}
        self.send(200, kind, content, kept)

    def post(self) -> None:
        self.close_connection = True  # unless the whole body was read
        self.admit(None)
        path = urlsplit(self.path).path
        if path not in ACTIONS:
            raise Refused(404, "there is no such page")
        values = json.loads(self.body(BODY.get(path, MEBIBYTE)), parse_constant=refuse)
        self.close_connection = False
        if not isinstance(values, dict):
            raise ValueError("expected a JSON object")
        self.send_json(ACTIONS[path](self.server, values))


def refuse(constant: str) -> None:
    """Raise ValueError: what would be kept with NaN in it could not be read by a browser."""
    raise ValueError(f"{constant} is not a number")


def start(server: "Server", asked: dict[str, str]) -> dict[str, Any]:
    store = server.store
    return {"options": server.start, "draft": store.draft, "runs": str(store.place.parent)}


def state(server: "Server", asked: dict[str, str]) -> dict[str, Any]:
    if server.queue is None:
        return {"model": "", "jobs": [], "ahead": None}
    from minidrag.page.jobs import report

    return report(server.queue)


def preview(server: "Server", asked: dict[str, str]) -> tuple[str, bytes]:
    jobs = {str(job.number): job for job in server.working().jobs}
    picture = jobs[asked["job"]].picture
    if picture is None:
        raise KeyError("picture yet")
    return "image/png", to_png(picture)


def settings(server: "Server", asked: dict[str, str]) -> dict[str, Any]:
    terms = server.working().terms
    from minidrag.page.terms import settings

    return settings(terms)


def check(server: "Server", values: dict[str, Any]) -> dict[str, Any]:
    queue = server.working()
    from minidrag.page.jobs import check

    return check(queue, values)


def stop(server: "Server", values: dict[str, Any]) -> dict[str, Any]:
    if type(values.get("number")) is not int:
        raise ValueError("number must be that of a job")
    server.working().stop(values["number"])
    return {}


def submit(server: "Server", values: dict[str, Any]) -> dict[str, Any]:
    return {"number": server.working().submit(values).number}


ANSWERS: dict[str, Callable[["Server", dict[str, str]], Any]] = {
    "/start": start,
    "/settings": settings,
    "/state": state,
    "/history": lambda server, asked: server.store.history.entries(),
    "/run": lambda server, asked: server.store.history.run(asked["name"]),
}
FILES: dict[str, Callable[["Server", dict[str, str]], tuple[str, bytes]]] = {
    "/picture": lambda server, asked: server.store.picture(asked["image"]),
    "/preview": preview,
    "/file": lambda server, asked: server.store.history.file(asked["name"], asked["file"]),
    "/thumb": lambda server, asked: server.store.history.thumb(asked["name"]),
}
ACTIONS: dict[str, Callable[["Server", dict[str, Any]], Any]] = {
    "/picture": lambda server, values: server.store.add_picture(values["data"]),
    "/mask": lambda server, values: {"mask": server.store.add_mask(values["data"])},
    "/match": lambda server, values: match(server.store, values),
    "/draft": lambda server, values: server.store.keep_draft(values) or {},
    "/check": check,
    "/prepare": lambda server, values: server.working().prepare(values) or {},
    "/submit": submit,
    "/stop": stop,
}
