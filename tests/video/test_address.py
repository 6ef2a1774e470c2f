"""What a source is, by its spelling: a file, a stream, a camera; and what none of them may read."""

from pathlib import Path

import pytest

from statekv.config import SCHEMES
from statekv.errors import VideoError
from statekv.video.address import check_scheme, display_name, explain, local_path, locate
from statekv.video.file import probe

NETWORK = [scheme for scheme in SCHEMES if scheme != "file"]


def protocols(source):
    return locate(source).options["protocol_whitelist"].split(",")


@pytest.mark.parametrize("source", ["clip.mp4", "a: b.mp4", Path("folder/clip.mp4"), "concat:a.ts|b.ts"])
def test_a_file_is_a_file_whatever_its_name(source):
    address = locate(source)
    assert address.url == f"file:{source}"
    assert not address.live


def test_a_file_url_is_a_file():
    assert locate("file:///a%20b/clip.mp4").url == "file:/a b/clip.mp4"


@pytest.mark.parametrize("scheme", NETWORK)
def test_every_scheme_has_its_protocols_and_none_reads_files(scheme):
    found = protocols(f"{scheme.upper()}://host/live")
    assert scheme in found
    assert not {"file", "pipe", "concat", "subfile", "data"} & set(found)
    assert locate(f"{scheme}://host/live").returns


def test_who_is_live_and_who_sets_the_pace():
    live = {scheme for scheme in NETWORK if locate(f"{scheme}://host/x").live}
    paced = {scheme for scheme in NETWORK if locate(f"{scheme}://host/x").paced}
    assert live == set(NETWORK) - {"http", "https"}
    assert paced == {"http", "https", "tcp", "rtmp", "rtmps"}


def test_a_camera_is_asked_through_video4linux():
    address = locate("/dev/video3")
    assert (address.url, address.format, address.live, address.paced) == ("/dev/video3", "v4l2", True, False)


@pytest.mark.parametrize(
    "source",
    ["concat://a.ts|b.ts", "subfile,,start,0,end,9,,:///etc/passwd", "data://x", "concat:http://a|http://b", "pipe:0"],
)
def test_other_protocols_are_refused(source):
    with pytest.raises(VideoError, match="is not allowed") as caught:
        locate(source)
    assert "http" in caught.value.hint


def test_fewer_may_be_allowed():
    assert check_scheme("clip.mp4", ("file",)) == "file"
    with pytest.raises(VideoError, match="'https' is not allowed") as caught:
        check_scheme("https://host/clip.mp4", ("file", "rtsp"))
    assert caught.value.hint == "allowed: file, rtsp"


def test_a_camera_that_is_not_there():
    with pytest.raises(VideoError, match="no camera /dev/video987"):
        probe("/dev/video987")


INVALID = "invalid data found when processing input"


@pytest.mark.parametrize("source", ["clip.mp4", "a: b.mp4", Path("folder/clip.mp4")])
def test_files_are_local(source):
    assert local_path(source) == Path(source)


@pytest.mark.parametrize("source", ["http://host/clip.mp4", "rtsp://host/live", "pipe:0"])
def test_urls_and_pipes_are_not(source):
    assert local_path(source) is None


def test_names_hide_folders_and_secrets():
    assert display_name("/home/me/private/clip.mp4") == "clip.mp4"
    assert display_name("https://me:secret@host:8080/a/clip.mp4?token=abc") == "https://host/a/clip.mp4"


def test_a_silent_host_is_named_as_such():
    assert "no answer in time" in explain("rtsp://host/live", "immediate exit requested").message


def box(kind, body=b"", length=None):
    return (len(body) + 8 if length is None else length).to_bytes(4, "big") + kind + body


@pytest.mark.parametrize(
    ("content", "incomplete"),
    [
        (box(b"ftyp", b"isom") + box(b"mdat", b"x" * 50, length=5000), True),
        (box(b"ftyp", b"isom") + box(b"moov", b"x" * 50, length=5000), True),
        (box(b"ftyp", b"isom") + b"\0\0\0\1mdat" + (5000).to_bytes(8, "big"), True),
        (box(b"ftyp", b"isom") + box(b"moov", b"x" * 50), False),
        (b"just some text that is long enough", False),
        (b"tiny", False),
    ],
)
def test_an_mp4_without_its_index_is_recognised(tmp_path, content, incomplete):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    assert ("file is incomplete" in explain(path, INVALID).message) == incomplete
