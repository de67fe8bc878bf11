"""Pictures: read, made into tensors, drawn on; and the boxes that an answer names.

Axes: B batch, H and W height and width in pixels, N patches of the image, A tokens of an answer.
"""

import math
import re
import warnings
from typing import NamedTuple

from configurator import UserError

LOCATIONS = [f"<loc{i:04}>" for i in range(1024)]  # of box corners, in 1024ths of the image's height or width
SEGMENTS = [f"<seg{i:03}>" for i in range(128)]  # codes of a mask inside its box


def read_image(path):
    """The picture at `path`, upright and in RGB. Raises UserError if there is none."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("images need Pillow: pip install pillow") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a size, or of damage, that it copes with
            with Image.open(path) as image:
                return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise nothing more specific
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"image = {path}: can't be read: {reason}") from None


def to_rgb(image):
    """A PIL image of any mode in RGB: turned as its EXIF says, its transparency on white, scaled to 8 bits."""
    from PIL import Image, ImageOps
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # Pillow would cut all above 255
        image = eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def eight_bits(image):
    """A PIL image of integers up to 65535, or of floats up to 1, 255 or 65535: the least that holds them all."""
    import numpy as np
    from PIL import Image
    values = np.asarray(image)
    low, high = values.min(), values.max()
    most = next((most for most in (1, 255, 65535) if high <= most), 0) if image.mode == "F" else 65535
    if not 0 <= low <= high <= most:
        raise UserError(f"its values go from {low:g} to {high:g}; from 0 to 1, to 255 or to 65535 is expected")
    return image if most == 255 else Image.fromarray((values * (255 / most)).round().astype(np.uint8))


def pixels(image, size):
    """A PIL image as (3, size, size) in [-1, 1], float32; resized without regard to its proportions, as SigLIP does."""
    import numpy as np
    import torch
    from PIL import Image
    image = to_rgb(image).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1  # (H, W, 3) -> (3, H, W)


class Box(NamedTuple):
    """Pixels from the left and top edges; not rounded."""
    left: float
    top: float
    right: float
    bottom: float
    label: str


def parse_boxes(answer, width, height):
    """The boxes in an answer such as "<loc0256><loc0128><loc0768><loc0512> cat ; <loc...> dog", in pixels.

    An object's four locations are top, left, bottom, right. Segment tokens are skipped, and so is what is no box.
    """
    boxes = []
    for part in answer.split(";"):
        match = re.fullmatch(r"\s*" + 4 * r"<loc(\d{4})>" + r"(?:<seg\d{3}>)*([^<>]*)", part)
        if match and max(map(int, match.groups()[:4])) < 1024:
            top, left, bottom, right = (int(number) / 1024 for number in match.groups()[:4])
            boxes.append(Box(left * width, top * height, right * width, bottom * height, match[5].strip()))
    return boxes


def box_text(box, width, height):
    """The inverse of `parse_boxes`, for one box: its four location tokens and the label."""
    corners = (box.top / height, box.left / width, box.bottom / height, box.right / width)
    return "".join(LOCATIONS[min(1023, max(0, round(1024 * corner)))] for corner in corners) + f" {box.label}"


def box_iou(answer, truth):
    """For every box in either answer, its best overlap with a box of the same label in the other; the mean of these."""
    found, right = parse_boxes(answer, 1, 1), parse_boxes(truth, 1, 1)
    best = []
    for boxes, others in ((found, right), (right, found)):
        for box in boxes:
            best.append(max((overlap(box, other) for other in others if other.label == box.label), default=0.0))
    return sum(best) / len(best) if best else float(answer == truth)


def overlap(a, b):
    """Intersection over union of two boxes."""
    width, height = min(a.right, b.right) - max(a.left, b.left), min(a.bottom, b.bottom) - max(a.top, b.top)
    shared = max(0.0, width) * max(0.0, height)
    areas = sum((box.right - box.left) * (box.bottom - box.top) for box in (a, b))
    return shared / (areas - shared) if areas > shared else 0.0


def draw_boxes(image, boxes):
    """A copy of a PIL image in RGB with the boxes and their labels on it."""
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
        draw.rectangle(draw.textbbox(where, box.label, font_size=font_size), fill=color)
        draw.text(where, box.label, fill="white", font_size=font_size)
    return image


def draw_attention(image, weights, prompt, tokens, panel=224):
    """A picture of a PIL image and its prompt, followed by a heat map on the image for each token of the answer.

    weights: (A, N), of `image_attention`; each map is brightest at its own maximum. Beside a token stands the share of
    its attention that the image had. panel: width in pixels of one map, whose height is at most twice that.
    """
    from PIL import Image
    image = to_rgb(image)
    scale = min(panel / image.width, 2 * panel / image.height)
    image = image.resize([max(1, round(side * scale)) for side in image.size])
    panels = [caption(image, prompt, panel)]
    for row, token in zip(weights, tokens):
        panels.append(caption(heat_map(image, row), f"{token.strip() or repr(token)}  {row.sum():.0%}", panel))
    columns, (width, height) = max(min(5, len(panels)), math.isqrt(len(panels))), panels[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(panels) / columns) * height), "white")
    for i, picture in enumerate(panels):
        grid.paste(picture, (i % columns * width, i // columns * height))
    return grid


def heat_map(image, weights):
    """A PIL image in grey, and over it from red to yellow the weights (N,) of its patches, the largest opaque."""
    from PIL import Image, ImageOps
    side = math.isqrt(len(weights))
    heat = (weights / weights.max() * 255).round().byte().reshape(side, side)
    heat = Image.fromarray(heat.numpy()).resize(image.size)
    gray = ImageOps.grayscale(image).convert("RGB")
    return Image.composite(ImageOps.colorize(heat, "red", "yellow"), gray, heat)


def caption(image, text, width, margin=4, line=22):
    """A PIL image with a white margin and above it a line of text, all in pixels; text too long is cut off."""
    from PIL import Image, ImageDraw
    framed = Image.new("RGB", (width + 2 * margin, image.height + 2 * margin + line), "white")
    framed.paste(image, (margin, margin + line))
    ImageDraw.Draw(framed).text((margin, margin), text, fill="black", font_size=14)
    return framed


