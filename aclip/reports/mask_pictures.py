"""Pictures of kept patches: what the teacher looks at and what the student gets to see."""

import io
import unicodedata
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps, font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

MAX_SAMPLES = 8
MIN_CELL = 192
"""Least side of a shown image, pixels; smaller images are enlarged by a whole factor."""
GAP = 8
MARGIN = 20
TITLE_HEIGHT = 48
CAPTION_LINES = 2
LINE_HEIGHT = 20
FONT_SIZE = 9.5
DPI = 100
TEXT_COLOR = "#202124"
MUTED_COLOR = "#5f6368"
BORDER_GREY = 205
DROPPED_GREY = 228
"""What dropped patches fade to, and how far: enough is left to see what was there."""
DROPPED_OPACITY = 0.82
HEAT_OPACITY = 0.65
HEAT_PERCENTILE = 99
"""Scores above it share the brightest colour: one outlier patch must not darken the rest."""
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "Arial Unicode MS")
"""Tried in this order for each character; matplotlib brings the first."""
MISSING_GLYPH = "\N{WHITE SQUARE}"
MAX_CHARACTERS = 1000

Array = np.ndarray


@dataclass(frozen=True)
class Column:
    """Title, second line and (cell, cell, 3) uint8 pictures, one a sample."""

    title: str
    subtitle: str
    pictures: list[Array]


def picture_columns(
    images: Array,
    scores: Array | None,
    student_views: Array,
    keep_ids: Array,
    grid: int,
    random_ids: Array | None = None,
    attention_of: str = "teacher",
    words: str = "patches kept",
) -> list[Column]:
    """Draws the first eight samples.

    The columns are the image, the attention over it, each student view with the patches that it
    drops greyed out, and the first view under a random mask.

    Args:
        images: (n, 3, T, T) uint8, the teacher views.
        scores: (n, g, g) float, the attention on those views; None for no such column. What is not
            finite shows as the lowest. Colours span each image's own range.
        student_views: (n, V, 3, R, R) uint8.
        keep_ids: (n, V, K) int, kept patches of each view, ids in row-major order.
        grid: G, patches per side of a student view; divides R.
        random_ids: (n, K) int, what a random mask keeps of the first view; None for no such column.
        attention_of: whose scores they are.
        words: what is said of the number of patches in `keep_ids`.
    """
    images, views, keep_ids = (array[:MAX_SAMPLES] for array in (images, student_views, keep_ids))
    resolution = views.shape[-1]
    cell = resolution * -(-MIN_CELL // resolution)
    shown = [_enlarge(image, cell) for image in images]
    columns = [Column("Image", f"{images.shape[-1]} x {images.shape[-1]} pixels", shown)]
    if scores is not None:
        heat = [_heat_over(*pair) for pair in zip(shown, scores[:MAX_SAMPLES], strict=True)]
        title = f"{attention_of.capitalize()} attention"
        columns.append(Column(title, "bright where it is high", heat))
    masked = [
        (f"Student view {v + 1}", views[:, v], keep_ids[:, v], words) for v in range(views.shape[1])
    ]
    if random_ids is not None:
        masked.append(("Random mask", views[:, 0], random_ids[:MAX_SAMPLES], "patches kept"))
    for title, pictures, ids, kept_words in masked:
        pictures = [
            _grey_out(_enlarge(picture, cell), kept, grid)
            for picture, kept in zip(pictures, ids, strict=True)
        ]
        subtitle = f"{ids.shape[-1]} of {grid * grid} {kept_words}"
        columns.append(Column(title, subtitle, pictures))
    return columns


def draw_figure(columns: list[Column], captions: list[str]) -> Array:
    """Puts columns side by side, a row for each sample, its caption below.

    Args:
        captions: a text for each row, in any script; what does not fit into two lines is cut.

    Returns:
        (H, W, 3) uint8.
    """
    num_samples = len(columns[0].pictures)
    cell = len(columns[0].pictures[0])
    row_height = cell + GAP + CAPTION_LINES * LINE_HEIGHT + GAP
    width = 2 * MARGIN + len(columns) * (cell + GAP) - GAP
    height = MARGIN + TITLE_HEIGHT + num_samples * row_height

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    writer = _Writer(figure, canvas, width, height)
    for index, column in enumerate(columns):
        left = MARGIN + index * (cell + GAP)
        writer.write(left, MARGIN, column.title, weight="bold")
        writer.write(left, MARGIN + LINE_HEIGHT, column.subtitle, color=MUTED_COLOR)
    tops = [MARGIN + TITLE_HEIGHT + row * row_height for row in range(num_samples)]
    for top, caption in zip(tops, captions, strict=False):
        for number, line in enumerate(writer.wrap(caption, width - 2 * MARGIN, CAPTION_LINES)):
            writer.write(MARGIN, top + cell + GAP + number * LINE_HEIGHT, line)
    canvas.draw()
    page = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    for index, column in enumerate(columns):
        left = MARGIN + index * (cell + GAP)
        for top, picture in zip(tops, column.pictures, strict=True):
            # The border shows where a white picture ends.
            page[top - 1 : top + cell + 1, left - 1 : left + cell + 1] = BORDER_GREY
            page[top : top + cell, left : left + cell] = picture
    return page


def encode(array: Array, image_format: str = "PNG") -> bytes:
    """A (H, W, 3) uint8 array as PNG, or as WEBP, which is a tenth of it for a page."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, image_format, quality=85)
    return buffer.getvalue()


def _enlarge(image: Array, cell: int) -> Array:
    """(3, S, S) -> (cell, cell, 3), uint8."""
    resample = Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image.transpose(1, 2, 0)).resize((cell, cell), resample))


def _grey_out(picture: Array, kept: Array, grid: int) -> Array:
    is_dropped = np.ones(grid * grid, dtype=bool)
    is_dropped[kept] = False
    side = len(picture) // grid
    is_dropped = is_dropped.reshape(grid, grid).repeat(side, 0).repeat(side, 1)
    faded = _mix(_luma(picture), np.float32(DROPPED_GREY), DROPPED_OPACITY)
    return np.where(is_dropped[..., None], faded, picture)


def _heat_over(picture: Array, scores: Array) -> Array:
    scores = np.where(np.isfinite(scores), scores, np.nan).astype(np.float32)
    low = np.nanmin(scores) if np.isfinite(scores).any() else np.float32(0)
    scores = np.nan_to_num(scores, nan=low)
    top = np.percentile(scores, HEAT_PERCENTILE)
    heat = (scores - low) / max(top - low, np.finfo(np.float32).tiny)
    size = picture.shape[1::-1]
    smooth = Image.fromarray(heat.clip(0, 1)).resize(size, Image.Resampling.BICUBIC)
    colors = colormaps["inferno"](np.asarray(smooth).clip(0, 1))[..., :3] * 255
    return _mix(_luma(picture), colors, HEAT_OPACITY)


def _luma(picture: Array) -> Array:
    """(H, W, 1) float brightness, ITU-R BT.601."""
    return (picture @ np.array([0.299, 0.587, 0.114]))[..., None]


def _mix(below: Array, above: Array, opacity: float) -> Array:
    mixed = below * (1 - opacity) + above * opacity
    return np.broadcast_to(mixed, (*below.shape[:2], 3)).round().astype(np.uint8)


class _Writer:
    """Puts text on a page whose pixels are counted from the top left."""

    def __init__(self, figure: Figure, canvas: FigureCanvasAgg, width: int, height: int):
        self._figure, self._width, self._height = figure, width, height
        self._renderer = canvas.get_renderer()
        installed = {entry.name for entry in font_manager.fontManager.ttflist}
        self._families = [name for name in FONTS if name in installed]
        self._font = font_manager.FontProperties(family=self._families, size=FONT_SIZE)
        files = [font_manager.findfont(name) for name in self._families]
        self._known = {code for file in files for code in font_manager.get_font(file).get_charmap()}

    def write(self, x: int, y: int, text: str, **style) -> None:
        style = {"family": self._families, "size": FONT_SIZE, "color": TEXT_COLOR} | style
        # Captions may hold dollar signs, which would otherwise begin a formula.
        self._figure.text(
            x / self._width, 1 - y / self._height, text, va="top", parse_math=False, **style
        )

    def wrap(self, text: str, width: int, max_lines: int) -> list[str]:
        """Lines of at most `width` pixels, broken at spaces where possible; `...` where cut."""
        rest, lines = self._drawable(text), []
        while rest and len(lines) < max_lines:
            is_last = len(lines) == max_lines - 1
            line, rest = self._break(rest, width, "\N{HORIZONTAL ELLIPSIS}" if is_last else "")
            lines.append(line)
        return lines

    def _break(self, text: str, width: int, ending: str) -> tuple[str, str]:
        """The longest start of the text that fits, and what is left; a cut start gets `ending`."""
        if self._measure(text) <= width:
            return text, ""
        fits, too_long = 0, len(text)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self._measure(text[:middle] + ending) <= width:
                fits = middle
            else:
                too_long = middle
        space = text.rfind(" ", 0, fits + 1)
        end = space if space > 0 else max(1, fits)
        return text[:end].rstrip() + ending, text[end:].lstrip()

    def _measure(self, text: str) -> float:
        return self._renderer.get_text_width_height_descent(text, self._font, ismath=False)[0]

    def _drawable(self, text: str) -> str:
        """One line of characters that the fonts have; others become squares."""
        text = unicodedata.normalize("NFC", text[:MAX_CHARACTERS])
        drawable = []
        for character in text:
            category = unicodedata.category(character)
            if category in ("Cc", "Zl", "Zp"):
                drawable.append(" ")
            elif category != "Cf":  # invisible; some would turn the rest of the line around
                drawable.append(character if ord(character) in self._known else MISSING_GLYPH)
        return " ".join("".join(drawable).split())
