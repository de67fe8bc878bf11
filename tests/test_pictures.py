"""run/pictures.py: the models' pixels from every kind of image file; boxes; heat maps."""

import warnings

import numpy as np
import pytest
import torch

from configurator import UserError
from run import pictures
from run.pictures import Box

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")
try:  # the processor that uses Pillow; the other one uses torchvision if installed, which may round differently
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil as SiglipProcessor
except ImportError:
    from transformers import SiglipImageProcessor as SiglipProcessor


def picture(mode):
    values = np.random.default_rng(0).integers(0, 256, (40, 33, 4), dtype=np.uint8)
    rgba = Image.fromarray(values, "RGBA")
    if mode == "P with transparency":
        image = rgba.convert("RGB").quantize(16)
        image.info["transparency"] = 3
        return image
    if mode == "RGB with transparency":
        image = rgba.convert("RGB")
        image.info["transparency"] = tuple(values[0, 0, :3].tolist())
        return image
    if mode == "RGBA":
        return rgba
    return rgba.convert("LA") if mode == "LA" else rgba.convert("RGB").convert(mode)


def on_white(image):
    """Returns an image over white: alpha * colour + (1 - alpha) * white."""
    rgba = np.asarray(image.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    return Image.fromarray((rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "LA", "RGBA", "P", "P with transparency", "RGB with transparency",
                                  "CMYK", "YCbCr", "HSV", "F"])
@pytest.mark.parametrize("size", [28, 56])  # smaller and larger than the picture
def test_pixels_equal_the_reference_for_every_mode(mode, size):
    image = picture(mode)
    transparent = image.has_transparency_data
    reference = SiglipProcessor(size={"height": size, "width": size})
    expected = reference(images=on_white(image) if transparent else image.convert("RGB"), return_tensors="pt")
    found = pictures.pixels(image, size)
    assert found.dtype == torch.float32 and found.shape == (3, size, size)
    off = (found - expected.pixel_values[0]).abs()
    assert off.max() < (0.02 if transparent else 1e-6)  # on_white rounds differently, by a step or two of 2 / 255
    assert transparent == (mode in ("LA", "RGBA") or mode.endswith("transparency"))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_not_clipped(mode):
    grey = np.random.default_rng(0).integers(0, 256, (40, 33), dtype=np.uint8)
    wide = grey.astype(np.uint16) * 257
    if mode == "I":
        image = Image.fromarray(wide.astype(np.int32))
    else:
        image = Image.frombytes(mode, (33, 40), wide.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    assert image.mode == mode
    torch.testing.assert_close(pictures.pixels(image, 28), pictures.pixels(Image.fromarray(grey), 28), atol=0, rtol=0)


@pytest.mark.parametrize("most", [1, 255, 65535])
def test_floats_are_scaled_by_their_range(most, tmp_path):
    values = np.random.default_rng(0).random((40, 33)).astype(np.float32)
    values[0, 0] = 1
    Image.fromarray(values * np.float32(most)).save(tmp_path / "float.tif")
    found = np.asarray(pictures.read_image(tmp_path / "float.tif"))[..., 0]
    assert abs(found - 255 * values).max() <= 1
    for bad in (-0.1, 70000, np.nan):
        values[0, 0] = bad
        Image.fromarray(values).save(tmp_path / "bad.tif")
        with pytest.raises(UserError, match="bad.tif: can't be read: its values go from .*; expected are 0 to 1"):
            pictures.read_image(tmp_path / "bad.tif")


def test_the_first_frame_is_read_without_a_warning(tmp_path, monkeypatch):
    red, blue = (Image.new("RGB", (30, 20), color) for color in ("red", "blue"))
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[blue])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow warns above this and fails above its double
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pictures.read_image(tmp_path / "moving.gif").getpixel((3, 3)) == (255, 0, 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(UserError, match="moving.gif: can't be read: Image size .600 pixels. exceeds limit"):
        pictures.read_image(tmp_path / "moving.gif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_rotated_as_their_exif_says(orientation, tmp_path):
    from transformers.image_utils import load_image
    image, exif = picture("RGB"), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "photo.png", exif=exif)
    expected = load_image(str(tmp_path / "photo.png"))
    assert pictures.read_image(tmp_path / "photo.png").tobytes() == expected.tobytes()
    assert (expected.size == image.size) == (orientation < 5)


def test_files_that_are_not_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    picture("RGB").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    for name in ("missing.png", "text.png", "cut.png"):
        with pytest.raises(UserError, match=f"image = .*{name}: can't be read"):
            pictures.read_image(tmp_path / name)


@pytest.mark.parametrize("format", ["GIF", "PPM", "TIFF", "DDS", "JPEG", "PNG", "BMP", "WEBP", "TGA"])
def test_a_damaged_image_is_reported_in_one_line_whatever_pillow_raises(format, tmp_path):
    picture("RGB").save(tmp_path / "x", format)
    whole, rng, refused = (tmp_path / "x").read_bytes(), np.random.default_rng(0), 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.integers(0, min(len(whole), 100))] = rng.integers(0, 256)
        (tmp_path / "x").write_bytes(damaged[:rng.integers(1, 2 * len(whole))])
        try:
            pictures.read_image(tmp_path / "x")
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"image = {tmp_path / 'x'}: can't be read: ") and "\n" not in str(error)
    assert refused > 5


def test_boxes_are_parsed_into_pixels():
    answer = ("<loc0256><loc0128><loc0768><loc0512> cat ; <loc0000><loc0000><loc1023><loc1023> big dog;"
              "<loc0001><loc0002><loc0003><loc0004><seg001><seg127>  bird")
    boxes = pictures.parse_boxes(answer, width=200, height=100)
    assert boxes[0] == Box(25.0, 25.0, 100.0, 75.0, "cat")
    assert boxes[1] == Box(0, 0, 200 * 1023 / 1024, 100 * 1023 / 1024, "big dog")
    assert boxes[2].label == "bird" and len(boxes) == 3
    for nothing in ("", "a cat", "<loc0001><loc0002><loc0003> cat", "<loc0001><loc0002><loc0003><loc1024> cat",
                    "<loc0001><loc0002><loc0003><loc0004><loc0005> cat"):
        assert pictures.parse_boxes(nothing, 200, 100) == []
    text = " ; ".join(pictures.box_text(box, 200, 100) for box in boxes)
    assert pictures.parse_boxes(text, 200, 100) == boxes
    assert pictures.box_text(Box(-5, 0, 250, 100, "x"), 200, 100) == "<loc0000><loc0000><loc1023><loc1023> x"


def test_boxes_are_drawn_at_their_place():
    image = Image.new("L", (200, 100), 255)
    boxes = [Box(20, 30, 120, 90, "cat"), Box(190, 95, 150, 60, ""), Box(5, 5, 15, 15, "cat")]
    drawn = pictures.draw_boxes(image, boxes)
    assert image.getpixel((20, 60)) == 255  # draw_boxes has drawn on a copy
    assert drawn.mode == "RGB" and drawn.size == (200, 100)
    red, blue, white = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    assert [drawn.getpixel(at) for at in ((20, 60), (120, 60), (70, 90), (70, 60))] == [red, red, red, white]
    assert [drawn.getpixel(at) for at in ((150, 80), (190, 80), (5, 10))] == [blue, blue, red]
    label = np.array(drawn)[32:44, 22:40]
    assert (label == red).all(-1).any() and (label == white).all(-1).any()


@pytest.mark.parametrize("size", [(1, 5000), (20, 6000), (5000, 1)])
def test_the_heat_maps_of_a_narrow_image_have_a_limited_size(size, tmp_path):
    grid = pictures.draw_attention(Image.new("RGB", size, "red"), torch.rand(12, 9), "prompt", ["a"] * 12)
    assert grid.width == 5 * 232 and grid.height <= 3 * 478
    assert grid.getpixel((4, 26)) == (255, 0, 0)
    grid.save(tmp_path / "map.jpg")


def test_many_heat_maps_form_a_square_grid():
    many = pictures.draw_attention(Image.new("RGB", (9, 9)), torch.rand(255, 4), "prompt", ["a"] * 255, panel=9)
    assert many.size == (16 * 17, 16 * 39)


def test_a_heat_map_is_bright_where_the_weights_are_large():
    weights = torch.full((2, 9), 0.01)
    weights[0, 2] = weights[1, 6] = 0.5  # the upper right, the lower left
    gray = Image.new("RGB", (60, 60), (128, 128, 128))
    grid = np.array(pictures.draw_attention(gray, weights, "prompt", ["a", "b"], panel=60))
    assert grid.shape == (60 + 30, 3 * 68, 3)
    original, first, second = (grid[26:86, 68 * i + 4:68 * i + 64].astype(int) for i in range(3))
    assert (original == 128).all()
    for hot, panel in (((5, 55), first), ((55, 5), second)):
        cold = hot[1], hot[0]
        assert panel[hot][0] > 240 and panel[hot][1] > 200 and panel[hot][2] < 40
        assert abs(panel[cold] - 128).max() < 10
    captions = grid[4:24, 68:]
    assert (captions[:, :68] < 128).any() and (captions[:, 68:] < 128).any()
