"""The page's server in this process, and a client that asks it as a browser does."""

import base64
import html
import http.client
import json
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.command import ROOT

from minidrag import tiny
from minidrag.app.options import read_options
from minidrag.page.serve import listen
from minidrag.page.site import LOCAL, Site, read_static
from minidrag.page.store import Store

SCREENSHOT = ROOT / "minidrag/page/screenshot.png"
QUICK: dict[str, Any] = {
    "steps": 4,
    "inversion_steps": 3,
    "lora_steps": 2,
    "lora_batch": 1,
    "warp_start": False,
    "drag_levels": 1,
    "scale_radii": False,
    "drag_steps": 2,
    "size": 64,
}


class Client:
    """Sends requests with the token and the headers of the page, unless given others."""

    def __init__(self, site: Site, port: int):
        self.site = site
        self.port = port

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, and content. headers: by name with _ for -; None leaves one of the usual out."""
        own = f"{LOCAL}:{self.port}"
        usual: dict[str, str | None] = {"Host": own, "Cookie": f"{self.site.cookie}={self.site.token}"}
        if method == "POST":
            usual |= {"Origin": f"http://{own}", "Content-Type": "application/json"}
            usual["Content-Length"] = str(len(body or b""))
        usual |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection(LOCAL, self.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in usual.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        status, _, content = self.ask("GET", path)
        assert status == 200, (path, content)
        return json.loads(content)

    def post(self, path: str, values: Any, status: int = 200) -> Any:
        actual, _, content = self.ask("POST", path, json.dumps(values).encode())
        assert actual == status, (path, actual, content)
        return json.loads(content)

    def upload(self, path: str, file: Path) -> Any:
        return self.post(path, {"data": base64.b64encode(file.read_bytes()).decode()})

    def options(self, **values: Any) -> dict[str, Any]:
        """Options of a quick edit of the image that the page begins with."""
        drags = [{"handle": [30, 40], "target": [48, 42]}]
        usual = {"drags": drags, "prompt": "", "config": QUICK, "seed": 0}
        return self.site.start | usual | self.site.loaded().validator.fixed | values

    def job(self, number: int) -> dict[str, Any]:
        return next(job for job in self.get("/state")["jobs"] if job["number"] == number)

    def wait(self, number: int) -> dict[str, Any]:
        """A job once it is over."""
        return until(lambda: (job := self.job(number))["state"] not in ("waiting", "running") and job)


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Value of a condition once it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        threading.Event().wait(0.02)
    return value


@contextmanager
def serving(image: Path, model: str | Path, **start: Any) -> Iterator[Client]:
    """A client of a server in the current folder."""
    values = {"image": str(image.resolve()), "mask": None, "drags": [], "model": str(model), **start}
    store = Store(*(Path(values[name]) for name in ("image", "mask") if values[name]))
    site = Site(store, values)
    server = listen(LOCAL, 0, site)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    server.load(Namespace(vae=None, tokenizer=None, device="cpu", dtype=None))
    try:
        yield Client(site, server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        site.loaded().close()


@contextmanager
def serving_demo() -> Iterator[Client]:
    """A client of a server that begins with the demo's image and drag, in the current folder."""
    demo = read_options({"base": tiny.DEMO / "drag.json"})
    assert demo.image
    drags = [{"handle": handle, "target": target} for handle, target in demo.drags]
    with serving(
        demo.image, "tiny", mask=str(demo.mask), prompt=demo.prompt, drags=drags, config={}
    ) as client:
        yield client


def code_texts(client: Client) -> str:
    """Every text of the page that is written in its code, and what the form is made of."""
    static = [html.unescape(content.decode()) for _, content in read_static().values()]
    return "\n".join([*static, json.dumps(client.get("/settings"), ensure_ascii=False)])
