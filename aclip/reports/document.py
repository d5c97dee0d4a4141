"""Pages of text, tables and pictures: one HTML file that needs no network, or Markdown."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light }
body { margin: 0; background: #fff; color: #202124; font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1200px; margin: auto; padding: 16px; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem } h1, h2 { line-height: 1.25 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 14px; overflow-wrap: normal }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid #dadce0; text-align: right }
th:first-child, td:first-child { text-align: left }
td { font-variant-numeric: tabular-nums }
.gallery { display: grid; gap: 16px }
figure { margin: 0; min-width: 0 }
figcaption { font-size: 14px; color: #5f6368 }
img { display: block; width: 100%; height: auto }
pre { background: #f6f8fa; padding: 12px; font-size: 13px; white-space: pre-wrap }
"""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """An encoded image; `file` is where Markdown finds it, relative to the page."""

    label: str
    content: bytes
    file: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, as many in a row as fit when each is at least `width` pixels wide. A
    narrower page shrinks them to `least` pixels; below that, each picture scrolls in its place."""

    pictures: Sequence[Picture]
    width: int
    least: int = 0


Block = Heading | Text | Code | Table | Gallery


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one file; its images are in it."""
    body = "\n".join(_html(block) for block in blocks)
    # Without an icon the browser would ask for /favicon.ico.
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style></head>\n"
        f"<body><main>\n<h1>{html.escape(title)}</h1>\n{body}\n</main></body></html>\n"
    )


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The page as text; images are links to their files."""
    return "\n\n".join([f"# {title}", *(_markdown(block) for block in blocks)]) + "\n"


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Table(header, rows):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
            body = "".join(f"<tr>{line}</tr>\n" for line in lines)
            return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'
        case Gallery(pictures, width, least):
            columns = f"repeat(auto-fit, minmax(min(100%, {width}px), 1fr))"
            figures = "\n".join(_figure(picture, least) for picture in pictures)
            return f'<div class="gallery" style="grid-template-columns: {columns}">{figures}</div>'


def _figure(picture: Picture, least: int) -> str:
    kind = "webp" if picture.content[8:12] == b"WEBP" else "png"
    content = base64.b64encode(picture.content).decode()
    label = html.escape(picture.label)
    image = f'<img alt="{label}" style="min-width: {least}px" src="data:image/{kind};base64,'
    caption = f"<figcaption>{label}</figcaption>"
    return f'<figure><div class="wide">{image}{content}"></div>{caption}</figure>'


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Text(text):
            return text
        case Code(text):
            return f"```yaml\n{text.rstrip()}\n```"
        case Table(header, rows):
            lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
            return "\n".join(
                "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
                for line in lines
            )
        case Gallery(pictures):
            return "\n".join(f"![{picture.label}]({picture.file})" for picture in pictures)
