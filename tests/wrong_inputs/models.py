"""Folders of models in which one thing is not as it was written."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import statekv
from tests.talk import some_frames
from tests.tiny import FAMILIES, tiny
from tests.wrong_inputs.trying import Try

ODD: list[Any] = [
    *(None, True, 0, -1, 3, 10**9, 10**30, 1.5, float("nan"), float("inf"), "", "x", [], {}, [1], {"x": 1}),
    *([[]], [None], "\0", "\udcff"),
]
GONE = object()
_NOT_JSON = (b"", b"{", b"[]", b"null", b"\xff\xfe{}", b'"x"', b"1" * 5000, b"[" * 5000, b'{"a": 1e999}', b"{}")
_TEMPLATES = (
    *("", "{{", "{% for %}", "{{ 1/0 }}", "{{ nothing.at.all }}", "{{ raise_exception('no') }}", "{{ '<video>' * 2 }}"),
    *(
        "{% for i in range(10**5) %}{{ messages }}x{% endfor %}",
        "{{ 'x' * 10**7 }}",
        "{{ messages[7].content }}",
        "\udcff",
    ),
    *("{{ ''.__class__.__mro__ }}", "{% include 'x' %}", "{{ messages | nosuch }}", "<video><|video_pad|>"),
)


def tries(folder: Path, seed: int, count: int) -> Iterator[Try]:
    """So many folders of the families in turn, drawn at random."""
    drawn = random.Random(seed)
    whole = {family: tiny(family).save(folder / family) for family in FAMILIES}
    for number in range(count):
        family = FAMILIES[number % len(FAMILIES)]
        told, spoil = _spoiling(whole[family], drawn)
        target = folder / "spoiled"
        yield Try(f"{family}: {told}", partial(_ask, whole[family], target, spoil))


def _ask(whole: Path, target: Path, spoil: Callable[[Path], object]) -> None:
    """Load a copy of the folder with a fault in it, and ask the model about two frames."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(whole, target)
    spoil(target)
    session = statekv.load(str(target), max_new_tokens=2).open()
    session.push(some_frames(2))
    session.ask("What?")


def _spoiling(whole: Path, drawn: random.Random) -> tuple[str, Callable[[Path], object]]:
    """One fault, in words and as what makes it."""
    ways = (_value, _value, _value, _value, _bytes, _flip, _missing, _template, _weights)
    return drawn.choice(ways)(whole, drawn)


def _texts(whole: Path) -> list[Path]:
    return sorted(path for path in whole.iterdir() if path.suffix == ".json")


def _value(whole: Path, drawn: random.Random) -> tuple[str, Callable[[Path], object]]:
    """A value of another kind, or none, somewhere in one of the files; half the time in the configuration."""
    file = drawn.choice([*(path.name for path in _texts(whole)), *["config.json"] * 5])
    values = json.loads((whole / file).read_text(encoding="utf-8"))
    place = drawn.choice(list(places(values)))
    value = drawn.choice([*ODD, GONE, GONE])

    def spoil(target: Path) -> None:
        (target / file).write_text(json.dumps(changed(values, place, value)), encoding="utf-8")

    return f"{file} {'.'.join(map(str, place))} {'gone' if value is GONE else f'= {value!r}'}", spoil


def places(values: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand in JSON."""
    items: Any = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in list(items)[:60]:  # of a vocabulary the first ones
        yield (*above, key)
        yield from places(value, (*above, key))


def changed(values: Any, place: tuple[Any, ...], value: Any) -> Any:
    """The same JSON with another value there, or without it."""
    found = copy.deepcopy(values)
    spot = found
    for key in place[:-1]:
        spot = spot[key]
    if value is GONE:
        del spot[place[-1]]
    else:
        spot[place[-1]] = value
    return found


def _bytes(whole: Path, drawn: random.Random) -> tuple[str, Callable[[Path], object]]:
    """Something else than JSON, or a half of it."""
    file = drawn.choice(_texts(whole)).name
    data = (whole / file).read_bytes()
    other = drawn.choice([*_NOT_JSON, data[: len(data) // 2], data * 2])
    return f"{file} is {other[:20]!r}, {len(other)} bytes", lambda target: _rewrite(target / file, other)


def _flip(whole: Path, drawn: random.Random) -> tuple[str, Callable[[Path], object]]:
    """A bit in a file; of the weights in what describes them."""
    path = drawn.choice(sorted(whole.iterdir()))
    data = bytearray(path.read_bytes())
    place = drawn.randrange(min(len(data), 3000)) * 8 + drawn.randrange(8)
    data[place // 8] ^= 1 << place % 8
    return f"{path.name} bit {place} flipped", lambda target: _rewrite(target / path.name, bytes(data))


def _missing(whole: Path, drawn: random.Random) -> tuple[str, Callable[[Path], object]]:
    """A file is gone, a folder, another one, or goes by another name."""
    name, other = (path.name for path in drawn.sample(sorted(whole.iterdir()), 2))
    ways: dict[str, Callable[[Path], object]] = {
        f"{name} gone": lambda target: (target / name).unlink(),
        f"{name} a folder": lambda target: instead(target / name),
        f"{name} under the name of {other}": lambda target: (target / name).replace(target / other),
        f"{name} a link to itself": lambda target: instead(target / name, link=name),
    }
    told = drawn.choice(sorted(ways))
    return told, ways[told]


def _template(whole: Path, drawn: random.Random) -> tuple[str, Callable[[Path], object]]:
    template = drawn.choice(_TEMPLATES)

    def spoil(target: Path) -> None:
        for name in ("chat_template.json", "chat_template.jinja"):
            (target / name).unlink(missing_ok=True)
        (target / "chat_template.jinja").write_bytes(template.encode(errors="surrogateescape"))

    return f"chat template {template!r}", spoil


def _weights(whole: Path, drawn: random.Random) -> tuple[str, Callable[[Path], object]]:
    """A tensor of another shape or dtype, under another name, or none."""
    path = whole / "model.safetensors"
    name = drawn.choice(sorted(load_file(path)))
    ways: dict[str, Callable[[torch.Tensor], dict[str, torch.Tensor]]] = {
        "empty": lambda weight: {name: weight[:0]},
        "shorter": lambda weight: {name: weight[1:]},
        "flat": lambda weight: {name: weight.flatten()},
        "with an axis more": lambda weight: {name: weight[None]},
        "turned": lambda weight: {name: weight.transpose(0, -1).contiguous()},
        "int64": lambda weight: {name: weight.long()},
        "bool": lambda weight: {name: weight.bool()},
        "complex64": lambda weight: {name: weight.to(torch.complex64)},
        "float8": lambda weight: {name: weight.to(torch.float8_e4m3fn)},
        "float64": lambda weight: {name: weight.double()},
        "NaN": lambda weight: {name: weight * float("nan")},
        "renamed": lambda weight: {f"{name}x": weight},
        "gone": lambda weight: {},
    }
    told = drawn.choice(sorted(ways))

    def spoil(target: Path) -> None:
        tensors = load_file(target / path.name)
        tensors |= {key: tensor.clone() for key, tensor in ways[told](tensors.pop(name)).items()}
        save_file(tensors, target / path.name, metadata={"format": "pt"})

    return f"{name} {told}", spoil


def _rewrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def instead(path: Path, link: str = "") -> None:
    """A folder, or a link, where the file was."""
    path.unlink()
    if link:
        path.symlink_to(link)
    else:
        path.mkdir()
