"""Answers to the page's requests.

A request is refused that lacks the token, names another host, or changes anything without being JSON from the
page itself. What the page may request is in three tables.
"""

import hmac
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from minidrag.page.history import to_png
from minidrag.page.site import Refused, Site
from minidrag.system import console
from minidrag.system.files import parse_json

MEBIBYTE = 2**20
# In base64, which is a third longer than a file.
BODY = {"/image": 64 * MEBIBYTE, "/mask": 16 * MEBIBYTE, "/draft": 16 * MEBIBYTE}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
Query = dict[str, str]
Values = dict[str, Any]


class Guard(BaseHTTPRequestHandler):
    """Refuses what does not come from the page, and writes answers that nothing else can read."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "minidrag", ""
    timeout = 60  # seconds that a client may be silent

    def __init__(self, site: Site, *connection: Any):
        self.site = site
        super().__init__(*connection)  # which handles the requests

    def admit(self, token: str | None) -> None:
        """Refuse a request for another host, which a foreign page can make, and one without the token."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].lower() not in self.site.names:
            raise Refused(403, "this server answers only to its own address")
        with suppress(CookieError):
            cookies = SimpleCookie(self.headers.get("Cookie", ""))
            token = token or getattr(cookies.get(self.site.cookie), "value", None)
        if not token or not hmac.compare_digest(token.encode(), self.site.token.encode()):
            raise Refused(403, "open the address that the command printed: it has the token of this session")

    def body(self, limit: int) -> bytes:
        """Read the body of a request of the page itself: JSON of at most `limit` bytes."""
        if self.headers.get_all("Origin") != [f"http://{self.headers['Host']}"]:
            raise Refused(403, "only the page itself may request that")
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

    def send_refusal(self, status: int, sentence: object) -> None:
        self.send(status, "application/json", json.dumps({"error": " ".join(str(sentence).split())}).encode())

    def send(self, status: int, kind: str, content: bytes, more: Query | None = None) -> None:
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store"}
        self.send_response(status)
        for name, value in (headers | HEADERS | (more or {})).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is not HTTP, or of another method than GET and POST."""
        self.close_connection = True
        self.send_refusal(code, message or "the request is malformed")

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
            self.send_refusal(error.status, error)
        except KeyError as error:
            self.send_refusal(404, f"there is no {str(error)[:80]}")
        except FileNotFoundError as error:
            self.send_refusal(404, f"{Path(error.filename or 'the file').name} is gone")
        except (ConnectionError, TimeoutError):
            raise
        except OSError as error:
            self.send_refusal(507 if error.errno else 400, console.reason(error))
        except ValueError as error:
            self.send_refusal(400, error)
        except Exception as error:  # a mistake in the program must not end the server
            print(f"minidrag: {self.path[:80]}, {type(error).__name__}: {error}", file=sys.stderr)
            self.send_refusal(500, f"a mistake in the program, {type(error).__name__}: {error}")

    def get(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.admit(query.get("token"))
        if url.path in self.site.static:
            cookie = f"{self.site.cookie}={self.site.token}; HttpOnly; SameSite=Strict; Path=/"
            return self.send(200, *self.site.static[url.path], {"Set-Cookie": cookie})
        if url.path in ANSWERS:
            return self.send_json(ANSWERS[url.path](self.site, query))
        if url.path not in FILES:
            raise Refused(404, "no such page")
        kind, content = FILES[url.path](self.site, query)
        caching = {"Cache-Control": "private, max-age=86400"} if "v" in query else {}
        self.send(200, kind, content, caching)

    def post(self) -> None:
        self.close_connection = True  # unless the whole body was read
        self.admit(None)
        path = urlsplit(self.path).path
        if path not in ACTIONS:
            raise Refused(404, "no such page")
        values = parse_json(self.body(BODY.get(path, MEBIBYTE)), "the request")
        self.close_connection = False
        if not isinstance(values, dict):
            raise ValueError("expected a JSON object")
        self.send_json(ACTIONS[path](self.site, values))


def start(site: Site, query: Query) -> Values:
    return {"options": site.start, "draft": site.store.draft, "runs": str(site.store.history.folder)}


def image(site: Site, query: Query) -> tuple[str, bytes]:
    path = site.store.known()[query["name"]]
    return site.store.plain(path) or site.loaded().inputs.image(query["name"])


def preview(site: Site, query: Query) -> tuple[str, bytes]:
    jobs = {str(job.number): job for job in site.loaded().queue.jobs}
    preview = jobs[query["job"]].preview
    if preview is None:
        raise KeyError("preview yet")
    return "image/png", to_png(preview)


def stop(site: Site, values: Values) -> Values:
    if type(values.get("number")) is not int:
        raise ValueError("number must be that of a job")
    site.loaded().queue.stop(values["number"])
    return {}


ANSWERS: dict[str, Callable[[Site, Query], Any]] = {
    "/start": start,
    "/settings": lambda site, query: site.loaded().validator.settings(),
    "/state": lambda site, query: site.loaded().state(),
    "/history": lambda site, query: site.store.history.entries(),
    "/run": lambda site, query: site.loaded().inputs.run(query["name"]),
}
FILES: dict[str, Callable[[Site, Query], tuple[str, bytes]]] = {
    "/image": image,
    "/preview": preview,
    "/file": lambda site, query: site.store.history.file(query["name"], query["file"]),
    "/thumb": lambda site, query: site.store.history.thumb(query["name"]),
}
ACTIONS: dict[str, Callable[[Site, Values], Any]] = {
    "/image": lambda site, values: {"image": site.loaded().inputs.add_image(values["data"])},
    "/mask": lambda site, values: {"mask": site.loaded().inputs.add_mask(values["data"])},
    "/match": lambda site, values: site.loaded().inputs.match(values),
    "/draft": lambda site, values: site.store.write_draft(values) or {},
    "/check": lambda site, values: site.loaded().check(values),
    "/prefetch": lambda site, values: site.loaded().prefetch(values) or {},
    "/submit": lambda site, values: {"number": site.loaded().submit(values)},
    "/stop": stop,
}
