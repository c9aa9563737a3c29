"""Image files: what cannot be read is one line, and pixels keep their meaning."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from tests.small import refusal
from tocom.data.images import fit_size, image_files, open_image
from tocom.errors import TocomError

GREY = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bits_of_grey_become_8(tmp_path, ending):
    Image.fromarray(GREY).save(tmp_path / f"x.{ending}")
    found = np.asarray(open_image(tmp_path / f"x.{ending}"))
    assert found.shape == (64, 64, 3)
    assert np.abs(found / 255 - GREY[..., None] / 65535).max() <= 0.5 / 255 + 1e-9


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_32_bits_are_refused(tmp_path, kind):
    Image.fromarray((GREY / 65535).astype(kind)).save(tmp_path / "x.tif")
    assert "save it with 8 bits a channel" in refusal(open_image, tmp_path / "x.tif")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", ["png", "ppm", "sgi", "dds", "qoi", "jpg", "bmp", "gif", "webp", "tif"])
def test_a_damaged_file_is_one_line_or_still_a_picture(tmp_path, ending, monkeypatch):
    """Every byte of the header, one after the other, and many lengths."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # a damaged size would take time and memory
    path = tmp_path / f"x.{ending}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in range(0, len(whole), 3)]
    for place in range(min(len(whole), 60)):
        damaged += [whole[:place] + bytes([value]) + whole[place + 1 :] for value in (0, 255, whole[place] ^ 1)]
    refused = []
    for content in damaged:
        path.write_bytes(content)
        try:
            assert open_image(path).mode == "RGB"
        except TocomError as error:
            refused.append(str(error))
    assert len(refused) > 5
    assert all(error.startswith(str(path)) and "\n" not in error for error in refused)


def test_only_endings_of_pictures_count_as_images(tmp_path):
    for name in ("a.JPG", "sub/b.png", "c.mpo", "notes.pdf", "features.h5", "clip.mpg", "x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in image_files(tmp_path)] == ["a.JPG", "c.mpo", "b.png"]


@given(width=st.integers(20, 90), height=st.integers(20, 90), size=st.sampled_from([14, 32, 33]))
@settings(max_examples=40, deadline=None)
def test_images_are_scaled_and_cut_to_the_pixel_as_torchvision_does(width, height, size):
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    wanted = Compose([Resize(int(size * 256 / 224), InterpolationMode.BICUBIC), CenterCrop(size)])(image)
    assert np.array_equal(fit_size(image, size), np.asarray(wanted).transpose(2, 0, 1))
    squashed = image.resize((size, size), Image.Resampling.BICUBIC)
    assert np.array_equal(fit_size(image, size, "squash"), np.asarray(squashed).transpose(2, 0, 1))
