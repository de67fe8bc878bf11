"""Reads images, makes tensors of them, draws boxes and attention on them, and parses the boxes in answers.

Axes: B batch, H and W height and width in pixels, N patches of the image, A tokens of an answer.
"""

import base64
import contextlib
import functools
import io
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from configurator import UserError
from run.files import reason

LOCATIONS = [f"<loc{i:04}>" for i in range(1024)]  # box corners, in 1024ths of the image's height or width
SEGMENTS = [f"<seg{i:03}>" for i in range(128)]  # codes of the mask inside a box
FONTS = ("DejaVuSans.ttf", "Arial.ttf", "arial.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf")
MOST_SIDE = 2400  # pixels of a map's longer side
SMALL = 9  # pixels: the smallest letters
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO")  # not EPS, which Ghostscript would run


def read_image(path):
    """Returns the PIL image in the file, upright and in RGB. Raises UserError if it can't be read."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise UserError("images need Pillow: pip install pillow") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large or damaged files that Pillow can read
            with Image.open(path, formats=FORMATS) as image:
                return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise many different errors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, UnidentifiedImageError):
            reason = f"it is not a picture in one of the formats {', '.join(FORMATS)}"
        raise UserError(f"image = {path}: can't be read: {reason}") from None


def to_rgb(image):
    """Returns a PIL image of any mode in RGB: rotated as its EXIF says, transparency over white, scaled to 8 bits."""
    from PIL import Image, ImageOps
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # Pillow would clip values above 255
        image = eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def eight_bits(image):
    """Scales the values of a PIL image of mode I, I;16 or F, a grey one, so that its white becomes 255.

    White in an image of integers is 65535. In one of floats it is 1, 255 or 65535: the smallest that no value exceeds.
    Returns mode L, or if white is 255 the image itself, in mode F. Raises UserError for values below 0 or above 65535.
    """
    import numpy as np
    from PIL import Image
    values = np.asarray(image)
    low, high = values.min(), values.max()
    most = next((most for most in (1, 255, 65535) if high <= most), 0) if image.mode == "F" else 65535
    if not 0 <= low <= high <= most:
        raise UserError(f"its values go from {low:g} to {high:g}; expected are 0 to 1, 0 to 255 or 0 to 65535")
    return image if most == 255 else Image.fromarray((values * (255 / most)).round().astype(np.uint8))


def pixels(image, size):
    """Returns a PIL image as (3, size, size), float32 in [-1, 1]. Stretches it to a square, as SigLIP does."""
    import numpy as np
    import torch
    from PIL import Image
    image = to_rgb(image).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1  # (H, W, 3) -> (3, H, W)


class Box(NamedTuple):
    """Edges in pixels from the left and from the top of the image, not rounded."""
    left: float
    top: float
    right: float
    bottom: float
    label: str


def parse_boxes(answer, width, height):
    """Returns the boxes in an answer such as "<loc0256><loc0128><loc0768><loc0512> cat ; <loc...> dog", in pixels.

    The four locations are top, left, bottom, right. Skips segment tokens, and parts that are not boxes.
    """
    boxes = []
    for part in answer.split(";"):
        match = re.fullmatch(r"\s*" + 4 * r"<loc(\d{4})>" + r"(?:<seg\d{3}>)*([^<>]*)", part)
        if match and max(map(int, match.groups()[:4])) < 1024:
            top, left, bottom, right = (int(number) / 1024 for number in match.groups()[:4])
            boxes.append(Box(left * width, top * height, right * width, bottom * height, match[5].strip()))
    return boxes


def box_text(box, width, height):
    """Returns a box as text: four location tokens and the label. The inverse of `parse_boxes` for one box."""
    corners = (box.top / height, box.left / width, box.bottom / height, box.right / width)
    return "".join(LOCATIONS[min(1023, max(0, round(1024 * corner)))] for corner in corners) + f" {box.label}"


def box_iou(answer, truth):
    """Returns the mean, over the boxes of both answer texts, of the best IoU with a box of its label in the other.

    A box whose label the other text lacks counts 0. If neither text has boxes: 1.0 if the texts are equal, else 0.0.
    """
    found, right = parse_boxes(answer, 1, 1), parse_boxes(truth, 1, 1)
    best = []
    for boxes, others in ((found, right), (right, found)):
        for box in boxes:
            best.append(max((overlap(box, other) for other in others if other.label == box.label), default=0.0))
    return sum(best) / len(best) if best else float(answer == truth)  # without boxes: 1 if the texts are equal


def overlap(a, b):
    """Returns the intersection over union (IoU) of two boxes."""
    width, height = min(a.right, b.right) - max(a.left, b.left), min(a.bottom, b.bottom) - max(a.top, b.top)
    shared = max(0.0, width) * max(0.0, height)
    areas = sum((box.right - box.left) * (box.bottom - box.top) for box in (a, b))
    return shared / (areas - shared) if areas > shared else 0.0


@functools.cache
def font(size):
    """A PIL font of this size in pixels: the first of FONTS on this machine, else Pillow's own, which lacks accents."""
    from PIL import ImageFont
    for name in FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def draw_boxes(image, boxes):
    """Returns a copy of a PIL image in RGB, with boxes and labels drawn on it."""
    from PIL import ImageDraw
    image = to_rgb(image)
    draw, line = ImageDraw.Draw(image), max(2, min(image.size) // 150)
    colors = ("red", "blue", "green", "darkorange", "purple", "teal")
    labels = list(dict.fromkeys(box.label for box in boxes))
    for box in boxes:
        color = colors[labels.index(box.label) % len(colors)]
        left, top, right, bottom = *map(min, box[:2], box[2:4]), *map(max, box[:2], box[2:4])
        draw.rectangle((left, top, right, bottom), outline=color, width=line)
        font_size = max(10, min(image.size) // 25)
        where = (left + line, top + line)
        draw.rectangle(draw.textbbox(where, box.label, font=font(font_size)), fill=color)
        draw.text(where, box.label, fill="white", font=font(font_size))
    return image


def draw_attention(image, weights, prompt, names, panel=224):
    """Returns a grid of panels: the PIL image with its prompt, then a heat map for each of A names.

    weights: (A, N), such as from `image_attention`, N patches; each map is scaled to its own maximum. Each picture fits
    panel x 2 panel pixels, plus a margin.
    """
    image = to_rgb(image)
    scale = min(panel / image.width, 2 * panel / image.height)
    image = image.resize([max(1, round(side * scale)) for side in image.size])
    panels = [caption(image, prompt, panel)]
    panels += [caption(heat_map(image, row), name, panel) for row, name in zip(weights, names)]
    return in_grid(panels, max(min(5, len(panels)), math.isqrt(len(panels))))


def heat_map(image, weights):
    """Returns a PIL image in grey under a heat map, red to yellow, whose opacity is weights / their maximum. weights:
    (N,), one for each patch, row by row; the image has as many rows of patches as columns."""
    from PIL import Image, ImageOps
    side = math.isqrt(len(weights))
    heat = (weights / weights.max() * 255).round().byte().reshape(side, side)
    heat = Image.fromarray(heat.numpy()).resize(image.size)
    gray = ImageOps.grayscale(image).convert("RGB")
    return Image.composite(ImageOps.colorize(heat, "red", "yellow"), gray, heat)


def draw_map(weights, rows, columns, cell=0, marks=()):
    """Returns a PIL image of weights (T, S), white for 0 to blue for the largest, with names of its rows and columns.

    A row's name is on its left; a column's name is above it, written upwards. cell: the side of a square, in pixels; 0:
    30, or less for many. Where the squares are smaller than text, only every so many have a name. marks: the (row,
    column) of squares with a red frame.
    """
    from PIL import Image, ImageDraw, ImageOps
    cell = cell or max(6, min(30, MOST_SIDE // max(len(rows), len(columns))))
    size, gap = max(SMALL, cell // 2), max(3, cell // 4)
    high = max(cell, size + 2)  # of a name
    step = -(-high // cell)  # of the names
    ruler = ImageDraw.Draw(Image.new("L", (1, 1)))
    left, top = (2 * gap + max(int(ruler.textlength(name, font=font(size))) for name in names[::step])
                 for names in (rows, columns))
    shades = (weights / weights.max() * 255).round().byte()
    shades = ImageOps.colorize(Image.fromarray(shades.numpy()), "white", "midnightblue")
    picture = Image.new("RGB", (left + cell * len(columns) + gap, top + cell * len(rows) + gap), "white")
    picture.paste(shades.resize((cell * len(columns), cell * len(rows)), Image.Resampling.NEAREST), (left, top))
    draw = ImageDraw.Draw(picture)
    for i, name in list(enumerate(rows))[::step]:
        draw.text((left - gap, top + cell * i + cell // 2), name, fill="black", font=font(size), anchor="rm")
    for i, name in list(enumerate(columns))[::step]:
        label = Image.new("RGB", (top, high), "white")
        ImageDraw.Draw(label).text((gap, high // 2), name, fill="black", font=font(size), anchor="lm")
        picture.paste(label.rotate(90, expand=True), (left + cell * i + cell // 2 - high // 2, 0))
    draw.rectangle((left, top, left + cell * len(columns), top + cell * len(rows)), outline="gray")
    for row, column in marks:
        corner = left + cell * column, top + cell * row
        draw.rectangle((*corner, corner[0] + cell, corner[1] + cell), outline="red", width=cell // 10)
    return picture


def draw_maps(maps, rows, columns, across=0):
    """Returns a grid of small maps, each under its title. maps: {title: weights (T, S)}. rows, columns: see `draw_map`.

    across: how many stand side by side; 0: about as many as below one another. Each map is scaled to its own maximum.
    """
    across = across or math.ceil(len(maps)**0.5)
    small = max(1, min(12, MOST_SIDE // across // max(len(rows), len(columns))))
    pictures = [draw_map(weights, rows, columns, small) for weights in maps.values()]
    panels = [caption(picture, title, max(picture.width, 120)) for title, picture in zip(maps, pictures)]
    return in_grid(panels, across)


def in_grid(panels, across):
    """Returns a PIL image of panels of one size, line by line, `across` of them in each."""
    from PIL import Image
    width, height = panels[0].size
    grid = Image.new("RGB", (across * width, math.ceil(len(panels) / across) * height), "white")
    for i, picture in enumerate(panels):
        grid.paste(picture, (i % across * width, i // across * height))
    return grid


def caption(image, text, width, margin=4, line=22):
    """Returns a PIL image under a line of text, in a frame width + 2 * margin pixels wide. Longer text is cut off."""
    from PIL import Image, ImageDraw
    framed = Image.new("RGB", (width + 2 * margin, image.height + 2 * margin + line), "white")
    framed.paste(image, (margin, margin + line))
    ImageDraw.Draw(framed).text((margin, margin), text, fill="black", font=font(14))
    return framed


def data_url(picture, most):
    """Returns a PIL image, made at most `most` pixels wide and high, as a text that a page shows as an image."""
    small, file = picture.copy(), io.BytesIO()
    small.thumbnail((most, most))
    small.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def save_picture(picture, path):
    """Writes a PIL image to the file `path`. Returns a line that says so. Raises UserError if it can't be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except (OSError, ValueError, OverflowError) as error:  # without errno: the format can't hold so large a picture
        hint = "" if getattr(error, "errno", None) else f"; a .png holds its {picture.width} x {picture.height} pixels"
        raise UserError(f"{path} can't be written: {reason(error)}{hint}") from None
    return f"wrote {path}"
