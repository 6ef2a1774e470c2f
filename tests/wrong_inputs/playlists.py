"""Files that name other files, on disk and from a small server; and clips from a server that tells little or lies."""

from __future__ import annotations

import contextlib
import http.server
import random
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from statekv.errors import VideoWarning
from tests.talk import shared_engine
from tests.video.fixtures.clips import write_clip
from tests.wrong_inputs.trying import Try, WrongAnswerError

FRAMES = 10
_HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
_LISTS = {
    "m3u8": _HLS,
    "m3u8 without an end": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n",
    "m3u8 of m3u8": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{}\n",
    "m3u8 with a key": '#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{0}"\n#EXTINF:1,\n{0}\n#EXT-X-ENDLIST\n',
    "m3u8 with a map": '#EXTM3U\n#EXT-X-MAP:URI="{0}"\n#EXTINF:1,\n{0}\n#EXT-X-ENDLIST\n',
    "ffconcat": "ffconcat version 1.0\nfile '{}'\n",
    "ffconcat, many times": "ffconcat version 1.0\n" + "file '{0}'\n" * 3,
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5 RTP/AVP 96\na=x:{}\n",
    "mpd": '<?xml version="1.0"?><MPD><Period><AdaptationSet><Representation><BaseURL>{}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>",
    "edl": "# mpv EDL v0\n{}\n",
    "asx": '<asx version="3.0"><entry><ref href="{}"/></entry></asx>',
    "svg": '<svg xmlns="http://www.w3.org/2000/svg"><image href="{}"/></svg>',
}
_SUFFIXES = ("m3u8", "ffconcat", "mp4", "ts", "txt", "sdp", "mpd", "avi")


def tries(folder: Path, seed: int, count: int) -> Iterator[Try]:
    """So many, drawn at random; three in four are playlists on disk or over HTTP, one in four clips over HTTP."""
    drawn = random.Random(seed)
    (folder / "other").mkdir()
    secret = write_clip(folder / "other" / "secret.ts", range(FRAMES))
    clips = {
        f".{kind}": write_clip(folder / f"clip.{kind}", range(FRAMES)).read_bytes() for kind in ("mp4", "ts", "mkv")
    }
    with _Site() as site:
        site.pages["/secret.ts"] = {"body": secret.read_bytes()}
        for number in range(count):
            if number % 4 == 3:
                yield _clip(site, clips, number, drawn)
            else:
                yield _playlist(site, folder, secret, number, drawn)


def _playlist(site: _Site, folder: Path, secret: Path, number: int, drawn: random.Random) -> Try:
    suffix, (told, pattern) = drawn.choice(_SUFFIXES), drawn.choice(list(_LISTS.items()))
    name, remote = f"list{number}.{suffix}", drawn.random() < 0.3
    named = drawn.choice(
        [
            *(str(secret), "other/secret.ts", f"file://{secret}", f"file:{secret}", f"concat:{secret}", name),
            *(
                f"subfile,,start,0,end,0,,:{secret}",
                f"{site.url}/secret.ts",
                f"crypto:{secret}",
                "/etc/passwd",
                "data:,x",
            ),
            *(f"{site.url}/{name}", f"async:cache:{secret}", "/dev/zero", "pipe:0", "-", "tcp://127.0.0.1:1", "\0", ""),
        ]
    )
    text = pattern.format(named).encode()
    if remote:
        site.pages[f"/{name}"] = {"body": text}
        return Try(
            f"{told} that names {named}, at {name} over HTTP", partial(_no_video, f"{site.url}/{name}", site.url)
        )
    (folder / name).write_bytes(text)
    return Try(f"{told} that names {named}, as {name}", partial(_no_video, str(folder / name), None))


def _no_video(source: str, host: str | None) -> None:
    """Nothing that the list names may be seen, unless both come from one server."""
    seen = _watch(source)[0]
    if seen and host is None:
        raise WrongAnswerError(f"{seen} frames of what it names were seen")


def _clip(site: _Site, clips: dict[str, bytes], number: int, drawn: random.Random) -> Try:
    suffix = drawn.choice(list(clips))
    data = clips[suffix]
    page = {
        "body": data,
        "sized": drawn.random() < 0.5,
        "ranges": drawn.random() < 0.5,
        "missing": drawn.choice((0, 0, len(data) // 3)),
        "code": drawn.choice((200, 200, 200, 404, 500, 204)),
        "kind": drawn.choice(("video/mp4", "text/html", "application/vnd.apple.mpegurl", "")),
    }
    site.pages[f"/{number}{suffix}"] = page
    told = {name: value for name, value in page.items() if name != "body"}
    return Try(f"{suffix} over HTTP, {told}", partial(_all_or_a_word, f"{site.url}/{number}{suffix}"))


def _all_or_a_word(source: str) -> None:
    frames, warned = _watch(source)
    if frames != FRAMES and not warned:
        raise WrongAnswerError(f"{frames} frames, and no word")


def _watch(source: str) -> tuple[int, bool]:
    """How many frames were seen, and whether there was a warning."""
    with warnings.catch_warnings(record=True) as heard, shared_engine("internvl").open(source, fps=25.0) as session:
        warnings.simplefilter("always")
        session.watch()
        session.ask("What?", max_new_tokens=1)
    return session.frames, any(issubclass(each.category, VideoWarning) for each in heard)


class _Site:
    """A server on loopback. Of each page it says what its entry says, and no more."""

    def __init__(self) -> None:
        self.pages: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> _Site:
        pages = self.pages

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                _answer(self, pages.get(self.path, {"body": b"", "code": 404}))

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _answer(request: http.server.BaseHTTPRequestHandler, page: dict[str, Any]) -> None:
    body, code, first = page["body"], page.get("code", 200), 0
    asked = request.headers.get("Range", "")
    if code == 200 and page.get("ranges") and asked.startswith("bytes="):
        first, code = int(asked[6:].split("-")[0]), 206
    request.send_response(code)
    if page.get("kind"):
        request.send_header("Content-Type", page["kind"])
    if code == 206:
        request.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
    if page.get("sized", True):
        request.send_header("Content-Length", str(len(body) - first))
    request.end_headers()
    with contextlib.suppress(OSError):  # whoever asked has gone
        request.wfile.write(body[first : len(body) - page.get("missing", 0)] if code in (200, 206) else b"")
    request.close_connection = True
