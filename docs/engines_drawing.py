"""The data flow of both engines → docs/engines.svg: python docs/engines_drawing.py."""

from pathlib import Path

EXITS = (2, 0, 1, 0, 2, 0, 1, 0)  # of eight images, in their order
COLOURS = ("#43a047", "#fb8c00", "#5c6bc0")
CELL, GAP, WIDTH, BOTTOM = 18, 4, 440, 252


def text(x: float, y: float, words: str, size: int = 13, weight: str = "normal", anchor: str = "start") -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="#222">{words}</text>'
    )


def box(x: float, y: float, width: float, colour: str, label: str = "") -> str:
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{CELL}" rx="3" fill="{colour}"/>'
    inside = f'<text x="{x + width / 2}" y="{y + 13}" font-size="11" text-anchor="middle" fill="#fff">{label}</text>'
    return shape + inside


def compact(left: float = 10) -> list[str]:
    """A column of images for each stage; after it those that exit are named."""
    parts = [text(left, 24, "compact: the batch shrinks at every exit", 15, "bold")]
    for stage in range(3):
        x = left + stage * 120
        here = [i for i, taken in enumerate(EXITS) if taken >= stage]
        parts.append(text(x, 52, f"stage {stage}"))
        parts += [box(x, 62 + row * (CELL + GAP), 60, COLOURS[EXITS[i]], f"{i}") for row, i in enumerate(here)]
        leaving = ", ".join(str(i) for i in here if EXITS[i] == stage)
        parts.append(text(x, BOTTOM, f"exit {stage}: {leaving}", 12))
        if stage < 2:
            parts.append(text(x + 82, 76, "→", 18))
    return parts


def resident(left: float = 10, top: float = 300) -> list[str]:
    """A line of images for each core, each as long as the stages that it runs."""
    parts = [text(left, top, "resident: each core carries one image to its exit", 15, "bold")]
    ends = [0.0, 0.0]
    for image, taken in enumerate(EXITS):
        core = ends.index(min(ends))
        width = 42 * (taken + 1)
        parts.append(box(left + 52 + ends[core], top + 20 + core * 30, width - GAP, COLOURS[taken], f"{image}"))
        ends[core] += width
    parts += [text(left, top + 34 + core * 30, f"core {core}") for core in range(2)]
    for taken, colour in enumerate(COLOURS):
        x = left + 52 + taken * 90
        parts += [box(x, top + 84, 20, colour), text(x + 26, top + 97, f"exit {taken}", 12)]
    return parts


if __name__ == "__main__":
    height = BOTTOM + 160
    size = f'width="{WIDTH}" height="{height}"'
    parts = "\n".join([*compact(), *resident()])
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">\n'
        f'<rect {size} fill="#fff"/>\n{parts}\n</svg>\n'
    )
    (Path(__file__).parent / "engines.svg").write_text(svg)
