"""The walkthrough's plan of the house, drawn anew from the imports: python docs/rooms.py

A room is a folder of the package, with what is in it, or a file in its root. It stands on the floor above all rooms
that it imports, to which lines lead; those that follow from others (A imports B, B imports C) are faint.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path

HOUSE = Path(__file__).parent.parent / "statekv"
PICTURE = Path(__file__).parent / "img" / "rooms.svg"
ROOMS = {path.stem for path in HOUSE.iterdir() if path.is_dir() or path.suffix == ".py"} - {"__init__", "__main__"}
WIDTH, ROW, BOX_WIDTH, BOX_HEIGHT = 1000, 78, 132, 44


def imported(file: Path) -> Iterator[str]:
    """Rooms that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "statekv" and (room := rest.split(".")[0]) in ROOMS:
                yield room


def rooms() -> tuple[dict[str, set[str]], dict[str, int]]:
    """What each room imports, and its lines."""
    uses: dict[str, set[str]] = {}
    lines: dict[str, int] = {}
    for file in sorted(HOUSE.rglob("*.py")):
        room = file.relative_to(HOUSE).with_suffix("").parts[0]
        if room not in ROOMS:
            continue
        uses.setdefault(room, set()).update(imported(file))
        lines[room] = lines.get(room, 0) + len(file.read_text(encoding="utf-8").splitlines())
    return {room: used - {room} for room, used in uses.items()}, lines


def floors(uses: dict[str, set[str]]) -> dict[str, int]:
    """Floor of each room, from 0.

    Raises:
        SystemExit: rooms import each other in a circle.
    """
    found: dict[str, int] = {}
    while len(found) < len(uses):
        ready = [room for room, used in uses.items() if room not in found and used <= found.keys()]
        if not ready:
            raise SystemExit(f"a circle among {sorted(uses.keys() - found.keys())}")
        found |= {room: max((found[used] + 1 for used in uses[room]), default=0) for room in ready}
    return found


def reaches(uses: dict[str, set[str]], start: str) -> set[str]:
    """Every room that one stands on, directly or not."""
    return uses[start] | {far for room in uses[start] for far in reaches(uses, room)}


def draw(uses: dict[str, set[str]], lines: dict[str, int]) -> str:
    """The plan as SVG."""
    floor = floors(uses)
    top = max(floor.values())
    place: dict[str, tuple[float, float]] = {}
    for level in range(top + 1):
        row = sorted(room for room in floor if floor[room] == level)
        for i, room in enumerate(row):
            # Every other row a little aside, so that lines pass between boxes.
            shift = 0.12 if level % 2 else -0.12
            place[room] = (WIDTH * (i + 1 + shift) / (len(row) + 1), 40 + (top - level) * ROW)
    drawn = []
    for room, used in uses.items():
        implied = {far for near in used for far in reaches(uses, near)}
        for other in sorted(used):
            (x, y), (to_x, to_y) = place[room], place[other]
            y, to_y = y + BOX_HEIGHT / 2, to_y - BOX_HEIGHT / 2
            bend = (to_y - y) / 2
            kind = "faint" if other in implied else "plain"
            path = f"M{x:.0f} {y:.0f}C{x:.0f} {y + bend:.0f} {to_x:.0f} {to_y - bend:.0f} {to_x:.0f} {to_y:.0f}"
            drawn.append((kind == "plain", f'<path class="{kind}" d="{path}"/>'))
    boxes = []
    for room, (x, y) in place.items():
        corner = f'x="{x - BOX_WIDTH / 2:.0f}" y="{y - BOX_HEIGHT / 2:.0f}"'
        boxes.append(f'<rect {corner} width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>')
        boxes.append(f'<text class="name" x="{x:.0f}" y="{y - 2:.0f}">{escape(room)}</text>')
        boxes.append(f'<text class="lines" x="{x:.0f}" y="{y + 14:.0f}">{lines[room]:,} lines</text>')
    height = 80 + top * ROW
    style = (
        ".plain{stroke:#4466aa;stroke-width:1.6;fill:none}.faint{stroke:#99a;stroke-width:.6;fill:none;opacity:.55}"
        "rect{fill:#f6f7fb;stroke:#4466aa}text{text-anchor:middle;font-family:monospace;fill:#223}"
        ".name{font-size:15px;font-weight:bold}.lines{font-size:11px}"
    )
    body = "\n".join([line for _, line in sorted(drawn)] + boxes)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"><style>{style}</style>'
    return f'{head}\n<rect width="{WIDTH}" height="{height}" style="fill:#fff;stroke:none"/>\n{body}\n</svg>\n'


def main() -> None:
    uses, lines = rooms()
    PICTURE.write_text(draw(uses, lines), encoding="utf-8")
    arrows, levels = sum(map(len, uses.values())), max(floors(uses).values()) + 1
    print(f"{PICTURE}: {len(uses)} rooms on {levels} floors, {arrows} arrows, {sum(lines.values()):,} lines")


if __name__ == "__main__":
    main()
