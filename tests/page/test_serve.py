"""Requests that the page's server refuses, and that nothing that is sent can bring it down."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image
from support.command import ROOT, listing, raising
from support.page import SCREENSHOT, Client, code_texts, serving

from minidrag.page import serve
from minidrag.page.handler import ACTIONS, ANSWERS, BODY, FILES
from minidrag.page.serve import listen, main
from minidrag.page.site import LOCAL, STATIC, Site, read_static
from minidrag.page.store import Store

GETS = [*read_static(), *ANSWERS, *FILES]


@pytest.fixture
def client(workdir: Path, untrained: Path) -> Iterator[Client]:
    with serving(workdir / "photo.png", untrained) as client:
        yield client


@pytest.fixture(scope="module")
def shared(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """One server for all that it refuses."""
    place = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        Image.new("RGB", (96, 80)).save("photo.png")
        with serving(place / "photo.png", untrained) as client:
            yield client


# What is refused


@pytest.mark.parametrize("path", GETS)
def test_a_request_without_the_token_is_refused(shared: Client, path: str) -> None:
    for cookie in (None, f"{shared.site.cookie}=wrong", "=;\x01bad"):
        status, _, content = shared.ask("GET", path, Cookie=cookie)
        assert status == 403 and b"open the address" in content
    assert shared.ask("GET", f"{path}?token=wrong", Cookie=None)[0] == 403
    assert shared.ask("GET", f"{path}?token={'é'.encode().hex()}", Cookie=None)[0] == 403


@pytest.mark.parametrize("path", [*ACTIONS])
def test_an_action_is_refused_that_does_not_come_from_the_page(shared: Client, path: str) -> None:
    own = f"{LOCAL}:{shared.port}"
    assert shared.ask("POST", path, b"{}", Cookie=None)[0] == 403
    for origin in (None, "null", "http://evil.example", f"https://{own}", f"http://localhost:{shared.port}"):
        assert shared.ask("POST", path, b"{}", Origin=origin)[0] == 403, origin
    for kind in (None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert shared.ask("POST", path, b"{}", Content_Type=kind)[0] == 415, kind
    assert shared.ask("POST", f"{path}?token={shared.site.token}", b"{}", Cookie=None)[0] == 403


def test_a_request_for_another_host_is_refused(shared: Client) -> None:
    port = shared.port
    for host in (
        None,
        "",
        "evil.example",
        f"evil.example:{port}",
        LOCAL,
        f"{LOCAL}:1",
        f"{LOCAL}:{port}.evil",
    ):
        assert shared.ask("GET", "/", Host=host)[0] == 403, host
    assert shared.ask("GET", "/", Host=f"LOCALHOST:{port}")[0] == 200
    two = f"GET / HTTP/1.1\r\nHost: {LOCAL}:{port}\r\nHost: evil.example\r\n\r\n"
    assert b" 403 " in raw(shared, two.encode()).splitlines()[0]


@pytest.mark.parametrize(
    ("length", "status"),
    [(None, 411), ("-1", 411), ("1e3", 411), ("²", 411), ("9" * 30, 413), ("999999999", 413)],
)
def test_a_body_is_refused_that_is_too_long_or_says_no_length(
    shared: Client, length: str | None, status: int
) -> None:
    encoded = length.encode("latin-1", "replace").decode("latin-1") if length else None
    assert shared.ask("POST", "/draft", b"", Content_Length=encoded)[0] == status


def test_a_body_in_chunks_is_refused(shared: Client) -> None:
    assert shared.ask("POST", "/draft", b"2\r\n{}\r\n0\r\n\r\n", Transfer_Encoding="chunked")[0] == 411


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"1", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' + b"9" * 9000 + b"}"]
    + [b'{"a": NaN}', b'{"a": -Infinity}'],
)
def test_what_is_not_a_json_object_is_refused(shared: Client, body: bytes) -> None:
    for path in ACTIONS:
        status, _, content = shared.ask("POST", path, body)
        assert status == 400 and len(json.loads(content)["error"]) < 200, (path, body[:20])


def test_only_known_images_can_be_named(client: Client, workdir: Path) -> None:
    Image.new("RGB", (96, 80)).save(workdir.parent / "secret.png")
    for name in ("/etc/passwd", "../secret.png", str(workdir.parent / "secret.png"), "photo.png", "", "\0"):
        assert client.ask("GET", f"/image?name={name}".replace("\0", "%00"))[0] == 404, name
        for path in ("/check", "/prefetch", "/submit"):
            client.post(path, client.options(image=name), status=400)
            client.post(path, client.options(mask=name or "no"), status=400)
    for query in (
        "name=..&file=photo.png",
        "name=../work&file=edited.png",
        "name=photo-1&file=../../photo.png",
        "",
    ):
        assert client.ask("GET", f"/file?{query}")[0] == 404
        assert client.ask("GET", f"/thumb?{query}")[0] == 404
    for path in ("/page/serve.py", "/../demo.py", "//etc/passwd", "/runs/", "/runs/.page/draft.json"):
        assert client.ask("GET", path)[0] == 404


@pytest.mark.parametrize(
    "values",
    [
        {"model": "other/model"},
        {"model": None},
        {"model": []},
        {"device": "cuda"},
        {"dtype": "float16"},
        {"vae": "somewhere"},
        {"lora": "/tmp/x.safetensors"},
        {"image": []},
        {"mask": {}},
        {"drags": []},
        {"drags": [{"handle": [1, 2]}]},
        {"drags": [{"handle": [1e999, 2], "target": [1, 2]}]},
        {"drags": [{"handle": [500, 2], "target": [1, 2]}]},
        {"config": {"steps": 0}},
        {"config": {"unknown": 1}},
        {"config": []},
        {"seed": -1},
        {"seed": "x"},
        {"prompt": 3},
        {"surprise": 1},
    ],
)
def test_options_are_refused_that_the_command_would_refuse(shared: Client, values: dict[str, Any]) -> None:
    answer = shared.post("/submit", shared.options(**values), status=400)
    assert "Traceback" not in answer["error"] and "run.json" not in answer["error"]
    assert shared.get("/state")["jobs"] == []


def test_images_are_refused_that_the_command_refuses(client: Client, workdir: Path) -> None:
    Image.new("1", (9000, 9000)).save("bomb.png")
    Image.new("RGB", (20, 20)).save("small.png")
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:200])
    Path("page.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    before = listing(workdir)
    for name, words in (("bomb", "too large"), ("small", "at least 64"), ("cut", "cannot be read")):
        answer = client.post("/image", {"data": encoded(Path(f"{name}.png"))}, status=400)
        assert words in answer["error"] and answer["error"].startswith("the image "), answer
    client.post("/image", {"data": encoded(Path("page.svg"))}, status=400)
    for data in ("?", "AAA", 3, None, ["x"]):
        client.post("/image", {"data": data}, status=400)
    client.post("/image", {}, status=404)
    assert listing(workdir) == before


def encoded(file: Path) -> str:
    import base64

    return base64.b64encode(file.read_bytes()).decode()


def test_answers_carry_the_headers_that_keep_others_out(shared: Client) -> None:
    for path, wanted in (("/", 200), ("/state", 200), ("/nowhere", 404)):
        status, headers, _ = shared.ask("GET", path, Origin="http://evil.example")
        assert status == wanted
        assert headers["Content-Security-Policy"].startswith("default-src 'self';")
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
        assert not [name for name in headers if name.startswith("Access-Control")]
    assert "HttpOnly; SameSite=Strict" in shared.ask("GET", f"/?token={shared.site.token}")[1]["Set-Cookie"]


def test_the_page_asks_nobody_else_and_has_no_inline_script() -> None:
    text = "".join(content.decode() for _, content in read_static().values())
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
    html = (STATIC / "index.html").read_text(encoding="utf-8")
    assert "<style" not in html and ' style="' not in html and " onclick" not in html
    assert html.count("<script") == 1 and 'src="/main.js"' in html
    assert "eval(" not in text and "innerHTML" not in text


def test_the_page_says_image() -> None:
    assert "picture" not in "".join(content.decode() for _, content in read_static().values()).lower()


def test_the_screenshot_shows_the_texts_of_today(shared: Client) -> None:
    """Else take it again: see screenshot.py."""
    with Image.open(SCREENSHOT) as image:
        image.load()
        texts = json.loads(image.info["texts"])
    assert len(texts) > 30 and "Run" in texts
    code = code_texts(shared)
    assert [text for text in texts if text not in code] == []


def test_all_modules_are_requested_at_once() -> None:
    html = (STATIC / "index.html").read_text(encoding="utf-8")
    assert {path.name for path in STATIC.glob("*.js")} == set(re.findall(r'(?:href|src)="/(\w+\.js)"', html))


def test_static_files_have_their_types(shared: Client) -> None:
    for path, wanted in (("/", "text/html"), ("/page.css", "text/css"), ("/main.js", "text/javascript")):
        assert shared.ask("GET", path)[1]["Content-Type"] == f"{wanted}; charset=utf-8"


# What is sent in bad form


def raw(client: Client, content: bytes) -> bytes:
    """Answer of the server to bytes."""
    with socket.create_connection((LOCAL, client.port), timeout=20) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        try:
            while part := connection.recv(65536):
                found += part
        except ConnectionError:
            pass
        return found


def test_malformed_requests_leave_no_trace(
    client: Client, workdir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own, rng = f"{LOCAL}:{client.port}", Random(5)
    before = listing(workdir)
    sound = (
        f"POST /submit HTTP/1.1\r\nHost: {own}\r\nOrigin: http://{own}\r\nContent-Type: application/json\r\n"
        f"Cookie: {client.site.cookie}={client.site.token}\r\nContent-Length: 30\r\n\r\n"
        '{"image": 1, "prompt": "tree"}'
    ).encode()
    for _ in range(200):
        content = bytearray(sound)
        for _ in range(rng.randint(1, 12)):
            at = rng.randrange(len(content))
            content[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 4))
        raw(client, bytes(content[: rng.randint(1, len(content))]))
    assert client.get("/state")["jobs"] == [] and listing(workdir) == before
    said = capfd.readouterr()
    assert "Traceback" not in said.err and "mistake" not in said.err


def test_slow_senders_hold_up_nobody(client: Client) -> None:
    slow = [socket.create_connection((LOCAL, client.port), timeout=20) for _ in range(150)]
    for number, connection in enumerate(slow):
        connection.sendall(b"POST /mask HTTP/1.1\r\nHost: "[: number % 30])
    assert [client.ask("GET", path)[0] for path in ("/", "/state", "/history")] == [200] * 3
    for connection in slow:
        connection.close()


@pytest.mark.parametrize(
    "values",
    [
        {"image": 3},
        {"prompt": ["x"]},
        {"mask": {}},
        {"result": []},
        {"result": {"remaining": "x", "distances": 3}},
        {"result": {"remaining": ["x"]}},
        {"result": {"seconds": [1], "losses": [0.0]}},
        {"result": {"seconds": {"inversion": "x"}, "losses": [0.0]}},
        {"config": {"steps": -1}, "result": {"seconds": {"inversion": 1.0}, "losses": [0.0]}},
        {"config": [], "result": {"seconds": {"inversion": 1.0}, "losses": [0.0]}},
        {"sha256": [1]},
        {"drags": 1, "time": "x"},
    ],
)
def test_a_strange_run_json_breaks_nothing(shared: Client, values: dict[str, Any]) -> None:
    folder = shared.site.store.folder.parent / "strange-1"
    folder.mkdir(parents=True, exist_ok=True)
    run = {"model": shared.site.start["model"], "device": "cpu", "drags": [{}], "config": {}} | values
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "edited.png").write_bytes(b"no image")
    for path in ("/history", "/state", "/start"):
        shared.get(path)
    assert shared.post("/check", shared.options())["error"] is None
    assert shared.ask("GET", f"/image?name={shared.site.start['image']}")[0] == 200
    status, _, said = shared.ask("GET", "/thumb?name=strange-1")
    assert status in (400, 404) and b"mistake" not in said and b"None" not in said


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_among_the_runs_is_not_waited_for(shared: Client) -> None:
    runs = shared.site.store.folder.parent
    (runs / "pipe-1").mkdir(parents=True)
    (runs / "pipe-2").mkdir()
    run = {"model": "tiny", "drags": [{}], "image": str(runs / "pipe-1" / "edited.png")}
    (runs / "pipe-1" / "run.json").write_text(json.dumps(run))
    os.mkfifo(runs / "pipe-1" / "edited.png")
    os.mkfifo(runs / "pipe-2" / "run.json")
    names = [entry["name"] for entry in shared.get("/history")]
    assert "pipe-1" in names and "pipe-2" not in names
    for path in ("/thumb?name=pipe-1", "/file?name=pipe-1&file=edited.png", f"/image?name={run['image']}"):
        assert shared.ask("GET", path)[0] in (400, 404)


def test_a_full_disk_is_said_in_a_sentence(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(28, "No space left on device", "runs/.page/draft.json")
    monkeypatch.setattr("minidrag.page.store.write_json", raising(full))
    assert client.post("/draft", {}, status=507) == {
        "error": "runs/.page/draft.json: No space left on device"
    }
    monkeypatch.undo()
    assert client.post("/draft", {"x": 1}) == {} and client.get("/start")["draft"] == {"x": 1}


def test_a_mistake_in_the_program_ends_only_the_request(
    client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ANSWERS, "/state", raising(ZeroDivisionError("x")))
    status, _, content = client.ask("GET", "/state")
    assert status == 500 and json.loads(content) == {
        "error": "a mistake in the program, ZeroDivisionError: x"
    }
    monkeypatch.undo()
    assert client.get("/state")["jobs"] == []
    assert "Traceback" not in capsys.readouterr().err


def test_many_tabs_at_once(client: Client) -> None:
    def tab(number: int) -> list[int]:
        client.post("/draft", {"tab": number})
        return [client.ask("GET", path)[0] for path in ("/", "/state", "/history", "/settings")]

    with ThreadPoolExecutor(24) as tabs:
        assert [*tabs.map(tab, range(48))] == [[200] * 4] * 48
    assert client.get("/start")["draft"]["tab"] in range(48)


# How it starts


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["missing.png"], "there is no file missing.png"),
        (["--port", "70000"], "--port must be 0 to 65535"),
        (["--port", "x"], "invalid int value"),
        (["--unknown"], "unrecognized arguments"),
        (["--host", "0.0.0.0"], "would let other machines in"),
        (["--host", "203.0.113.7", "--expose"], "cannot listen at 203.0.113.7"),
    ],
)
def test_a_wrong_command_ends_with_a_sentence(
    options: list[str], words: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(workdir)
    assert main(["--page", "--no-browser", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("minidrag: ") and words in error and error.count("\n") == 1
    assert listing(workdir) == before


def test_the_first_free_port_is_taken_and_a_given_one_is_not_shared(workdir: Path) -> None:
    first = listen(LOCAL, None, Site(Store(), {"model": "tiny"}))
    second = listen(LOCAL, None, Site(Store(), {"model": "tiny"}))
    ports = [server.server_address[1] for server in (first, second)]
    assert ports[0] < ports[1] and set(ports) < set(serve.PORTS)
    with pytest.raises(ValueError, match=r"Address already in use.*give another --port"):
        listen(LOCAL, ports[0], Site(Store(), {"model": "tiny"}))
    first.server_close()
    second.server_close()


def test_the_page_is_there_before_pytorch() -> None:
    code = "import sys; import minidrag.page.serve; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_file_of_the_page_is_served_and_in_the_package() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"minidrag.page" = ["static/*"' in declared
    served = {"/index.html" if path == "/" else path for path in read_static()}
    assert served == {f"/{path.name}" for path in STATIC.iterdir()}
    assert set(BODY) <= set(ACTIONS)
