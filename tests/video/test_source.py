from pathlib import Path

import pytest

from statekv.video.source import display_name, explain, local_path

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
