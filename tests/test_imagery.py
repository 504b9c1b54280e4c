"""imagery.py: every format and corruption on small generated files with exact expectations, and the real rasters."""

import io
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.transform import Affine, from_origin
from rasterio.windows import Window

import imagery
from config import InputError
from imagery import (
    ImageError,
    ImageSettings,
    colour_histogram,
    guessed_bands,
    image_size,
    opened,
    read_image,
    read_rgb,
    tile_windows,
)

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
UTM = dict(crs="EPSG:32618", transform=Affine(10, 0, 500000, 0, -10, 4600000))
rng = np.random.default_rng(0)
# rasterio warns of the plain pictures this file writes, and of its own use of affine.
pytestmark = pytest.mark.filterwarnings(
    "ignore::rasterio.errors.NotGeoreferencedWarning", "ignore::PendingDeprecationWarning"
)


def real(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"real data ../shared/data/{name} is not here")
    return DATA / name


def write_tif(path, data, tags=None, names=None, colours=None, mask=None, gcps=None, **profile) -> Path:
    """data (C, H, W) to a TIFF."""
    count, height, width = data.shape
    profile = dict(driver="GTiff", count=count, height=height, width=width, dtype=data.dtype) | profile
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **profile) as dst:
        dst.write(data)
        dst.update_tags(**(tags or {}))
        for i, name in enumerate(names or [], 1):
            dst.set_band_description(i, name)
        if colours:
            dst.colorinterp = colours
        if mask is not None:
            dst.write_mask(mask)
        if gcps:
            dst.gcps = gcps
    return path


def stretched(x, low, high):
    """The stretch written out once more, in float64."""
    return np.rint(255 * np.clip((np.nan_to_num(x).astype(float) - low) / (high - low), 0, 1)).astype(int)


def photo(height=40, width=60) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 4, y * 5, (x + y) * 2], axis=-1).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- ordinary formats


@pytest.mark.parametrize("suffix, options", [("png", {}), ("webp", {"lossless": True}), ("bmp", {}), ("tif", {})])
def test_lossless_formats_come_back_exactly(tmp_path, suffix, options):
    rgb = photo()
    Image.fromarray(rgb).save(tmp_path / f"a.{suffix}", **options)
    picture = read_image(tmp_path / f"a.{suffix}")
    assert picture.rgb.dtype == np.uint8 and np.array_equal(picture.rgb, rgb)
    assert (picture.footprint, picture.window, picture.valid, picture.limits) == (None, None, 1.0, None)
    assert picture.path == str(tmp_path / f"a.{suffix}") and image_size(picture.path) == (40, 60)


def test_content_decides_not_the_name(tmp_path):
    rgb = photo()
    Image.fromarray(rgb).save(tmp_path / "really.png", format="PNG")
    write_tif(tmp_path / "geo.tif", rgb.transpose(2, 0, 1), **UTM)
    (tmp_path / "really.png").rename(tmp_path / "a.tif")
    (tmp_path / "geo.tif").rename(tmp_path / "b.jpg")
    assert np.array_equal(read_image(tmp_path / "a.tif").rgb, rgb)
    assert np.array_equal(read_image(tmp_path / "b.jpg").rgb, rgb)
    assert read_image(tmp_path / "b.jpg").footprint.crs == "EPSG:32618"


@pytest.mark.parametrize("name", ["a#b.tif", "a?b!c%20.tif", "zip:x.tif", "森林 1.tif", "[x]*.tif"])
def test_odd_names_are_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_tif(Path(name).absolute(), photo().transpose(2, 0, 1))
    assert np.array_equal(read_image(name).rgb, photo())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orientation):
    picture = Image.new("RGB", (32, 16), (0, 0, 255))
    picture.paste((255, 0, 0), (0, 0, 8, 8))  # a red mark in the stored upper left
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8769)[0x9003] = "2021:06:05 10:11:12"
    picture.save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    shown = read_image(tmp_path / "a.jpg")
    assert shown.rgb.shape[:2] == image_size(tmp_path / "a.jpg") == ((16, 32) if orientation < 5 else (32, 16))
    # EXIF 2.32, tag 274: the visual (row, column) corner at which the stored first pixel lies.
    row, col = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    corner = shown.rgb[-4 if row else 4, -4 if col else 4]
    assert corner[0] > 200 and corner[2] < 50
    assert shown.acquired == "2021-06-05T10:11:12"


def test_modes_become_rgb(tmp_path):
    grey = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)
    triple = np.repeat(grey[..., None], 3, axis=2)
    for mode, suffix in [("L", "png"), ("L", "tif"), ("P", "png"), ("P", "gif"), ("P", "tif")]:
        image = Image.fromarray(grey)
        image = image if mode == "L" else image.convert("RGB").quantize(256) if suffix != "gif" else image
        image.save(tmp_path / f"m.{suffix}")
        assert np.array_equal(read_image(tmp_path / f"m.{suffix}").rgb, triple), (mode, suffix)
    bits = Image.fromarray((grey > 100).astype(np.uint8) * 255).convert("1")
    for suffix in ("png", "tif"):  # one bit: white is 255, not 1
        bits.save(tmp_path / f"bits.{suffix}")
        assert np.array_equal(read_image(tmp_path / f"bits.{suffix}").rgb, (triple > 100) * np.uint8(255))
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # full magenta and yellow: red
    for suffix in ("tif", "jpg"):
        cmyk.save(tmp_path / f"c.{suffix}", **({"quality": 100} if suffix == "jpg" else {}))
        assert np.abs(read_image(tmp_path / f"c.{suffix}").rgb[4, 4].astype(int) - (255, 0, 0)).max() <= 2
    write_tif(tmp_path / "white.tif", grey[None], photometric="MINISWHITE")
    assert np.array_equal(read_image(tmp_path / "white.tif").rgb, 255 - triple)
    write_tif(tmp_path / "nibbles.tif", grey[None] % 16, nbits=4)
    assert np.array_equal(read_image(tmp_path / "nibbles.tif").rgb, triple % 16 * 17)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_alpha_is_the_mask(tmp_path, suffix):
    rgba = np.dstack([photo(), np.full((40, 60), 255, np.uint8)])
    rgba[:10, :, 3] = 0
    Image.fromarray(rgba).save(
        tmp_path / f"a.{suffix}", **({"lossless": True, "exact": True} if suffix == "webp" else {})
    )
    picture = read_image(tmp_path / f"a.{suffix}")
    assert not picture.rgb[:10].any() and np.array_equal(picture.rgb[10:], photo()[10:])
    assert picture.valid == 0.75


def test_grey_alpha_and_transparent_palette(tmp_path):
    la = Image.merge("LA", [Image.new("L", (4, 4), 90), Image.new("L", (4, 4), 255)])
    la.putpixel((0, 0), (90, 0))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([1, 2, 3, 90, 90, 90])
    palette.putpixel((0, 0), 0)
    la.save(tmp_path / "la.png"), la.save(tmp_path / "la.tif"), palette.save(tmp_path / "p.png", transparency=0)
    for name in ("la.png", "la.tif", "p.png"):
        picture = read_image(tmp_path / name)
        assert picture.valid == 15 / 16 and picture.rgb[0, 0].tolist() == [0, 0, 0], name
        assert picture.rgb[1, 1].tolist() == [90, 90, 90], name


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert (read_image(tmp_path / name).rgb == (255, 0, 0)).all(), name


def test_sixteen_bit_png_keeps_its_low_bits(tmp_path):
    data = rng.integers(0, 4096, (3, 30, 40)).astype(np.uint16)  # 12-bit values: the high byte alone is below 16
    for count in (1, 3):
        with rasterio.open(
            tmp_path / "a.png", "w", driver="PNG", count=count, height=30, width=40, dtype="uint16"
        ) as dst:
            dst.write(data[:count])
        picture = read_image(tmp_path / "a.png")
        for i in range(3):
            band = data[i % count]
            low, high = np.percentile(band[band > 0], (2, 98))
            assert np.array_equal(picture.rgb[..., i], stretched(band, low, high)), (count, i)


# ---------------------------------------------------------------------------------------------- stretch


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "uint32", "float32", "float64", "int8"])
def test_percentile_stretch_of_every_type(tmp_path, dtype):
    if dtype == "int8":
        data = rng.integers(-100, 100, (3, 50, 50)).astype(dtype)
    else:
        data = rng.normal(3000, 800, (3, 50, 50)).astype(dtype)
    picture = read_image(write_tif(tmp_path / "a.tif", data), ImageSettings(percentiles=(5, 95)))
    for i in range(3):
        low, high = np.percentile(data[i].astype(float), (5, 95))
        assert np.allclose(picture.limits[i], (low, high), rtol=1e-6)
        difference = np.abs(picture.rgb[..., i].astype(int) - stretched(data[i], low, high))
        exact = dtype in (
            "int32",
            "uint32",
            "float64",
        )  # the others are stretched in 32 bits, which settles a tie otherwise
        assert difference.max() <= 1 - exact and (difference > 0).mean() < 0.01
    assert picture.rgb.min() == 0 and picture.rgb.max() == 255


def test_nodata_and_nan_are_black_and_outside_the_stretch(tmp_path):
    data = rng.normal(0, 0.1, (3, 40, 40)).astype(np.float32)  # negative reflectance is legal data
    hole, holes = data.copy(), np.zeros((40, 40), bool)
    holes[:20] = True
    for fill, tag in ((-9999.0, -9999.0), (np.nan, np.nan), (np.nan, None), (np.inf, None), (7777.0, None)):
        hole[:, holes] = fill
        path = write_tif(tmp_path / f"{fill}{tag}.tif", hole, nodata=tag)
        picture = read_image(path, ImageSettings(nodata=7777.0 if fill == 7777 else None))
        assert picture.valid == 0.5 and not picture.rgb[holes].any(), (fill, tag)
        for i in range(3):
            low, high = np.percentile(data[i][~holes], (2, 98))
            assert np.abs(picture.rgb[..., i][~holes] - stretched(data[i][~holes], low, high)).max() <= 1


def test_one_missing_band_blackens_only_that_band(tmp_path):
    data = np.full((3, 4, 4), 50, np.uint8)
    data[2, 0, 0], data[:, 1, 1] = 0, 0
    picture = read_image(write_tif(tmp_path / "a.tif", data, nodata=0))
    assert picture.rgb[0, 0].tolist() == [50, 50, 0] and picture.rgb[1, 1].tolist() == [0, 0, 0]
    assert picture.valid == 15 / 16


def test_internal_mask(tmp_path):
    keep = np.zeros((40, 60), np.uint8)
    keep[:, :15] = 255
    picture = read_image(write_tif(tmp_path / "a.tif", photo().transpose(2, 0, 1), mask=keep))
    assert picture.valid == 0.25 and not picture.rgb[:, 15:].any()
    assert np.array_equal(picture.rgb[:, :15], photo()[:, :15])


@pytest.mark.parametrize(
    "dtype, fill", [("float32", -9999), ("float32", -3.4e38), ("float64", -32768), ("int16", -32768)]
)
def test_fills_of_signed_values_are_outside_the_stretch_untagged(tmp_path, dtype, fill):
    data = rng.normal(500, 100, (3, 40, 50)).astype(dtype)
    data[:, :, :10] = fill
    picture = read_image(write_tif(tmp_path / "a.tif", data))
    for i in range(3):
        assert picture.limits[i] == pytest.approx(np.percentile(data[i, :, 10:].astype(float), (2, 98)))
    assert not picture.rgb[:, :10].any() and picture.rgb[:, 10:].std() > 40


@pytest.mark.parametrize("pixels", [2**26, 1000 * 1000], ids=["whole", "patches"])
def test_the_stretch_does_not_depend_on_overviews(tmp_path, pixels):
    """Speckle averages out in overviews: limits measured there would turn half of a scene black or white."""
    data = rng.exponential(size=(1, 2048, 2048)).astype(np.float32)
    form = {"tiled": True, "blockxsize": 256, "blockysize": 256}
    plain, cloud = (write_tif(tmp_path / f"{name}.tif", data, **form) for name in ("plain", "cloud"))
    with rasterio.open(cloud, "r+") as out:
        out.build_overviews([2, 4, 8], rasterio.enums.Resampling.average)
    shown = [read_image(path, ImageSettings(max_pixels=pixels), window=(0, 0, 300, 300)) for path in (plain, cloud)]
    assert shown[0].limits == shown[1].limits and np.array_equal(shown[0].rgb, shown[1].rgb)
    assert shown[1].limits[0] == pytest.approx(np.percentile(data, (2, 98)), rel=0.1)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_land_that_changes_from_place_to_place_is_seen_in_patches(tmp_path, seed):
    """The limits of a huge file are measured on parts of it; 8 x 8 of them missed more than 2% of the range of such land."""
    waves = np.hypot(np.fft.fftfreq(1536)[:, None], np.fft.rfftfreq(1536)[None])
    waves[0, 0] = np.inf  # hills of every size, the large ones the highest
    noise = np.fft.rfft2(np.random.default_rng(seed).standard_normal((1536, 1536)))
    land = np.fft.irfft2(noise / waves**1.5, (1536, 1536))
    data = (8000 * (land - land.min()) / np.ptp(land) + 500).astype(np.uint16)
    path = write_tif(tmp_path / "a.tif", data[None], tiled=True, blockxsize=256, blockysize=256)
    shown = read_image(path, ImageSettings(max_pixels=1000 * 1000), window=(0, 0, 300, 300))
    low, high = np.percentile(data, (2, 98))
    assert shown.limits[0] == pytest.approx((low, high), abs=0.02 * (high - low))


def test_fixed_stretches(tmp_path):
    data = np.array([-500, 0, 750, 1500, 3000, 9000], np.int16).reshape(1, 2, 3)
    path = write_tif(tmp_path / "a.tif", data)
    shown = read_image(path, ImageSettings(stretch="reflectance")).rgb[..., 0]
    assert shown.ravel().tolist() == [0, 0, 64, 128, 255, 255]  # 63.75 and 127.5 rounded (to even)
    shown = read_image(path, ImageSettings(stretch="reflectance", reflectance=(-500, 9000))).rgb[..., 0]
    assert np.array_equal(shown, stretched(data[0], -500, 9000))
    for dtype, values, expected in [
        ("uint16", [0, 257, 65535], [0, 1, 255]),
        ("int16", [-1, 129, 32767], [0, 1, 255]),
        ("float32", [-1, 0.5, 2], [0, 128, 255]),
        ("uint8", [3, 4, 5], [3, 4, 5]),
    ]:
        path = write_tif(tmp_path / f"{dtype}.tif", np.array(values, dtype).reshape(1, 1, 3))
        assert read_image(path, ImageSettings(stretch="none")).rgb[0, :, 0].tolist() == expected, dtype


def test_percentile_stretch_of_a_photograph(tmp_path):
    rgb = photo() // 4 + 30
    Image.fromarray(rgb).save(tmp_path / "a.png")
    shown = read_image(tmp_path / "a.png", ImageSettings(stretch="percentile")).rgb
    for i in range(3):
        assert np.array_equal(shown[..., i], stretched(rgb[..., i], *np.percentile(rgb[..., i], (2, 98))))


def test_constant_empty_and_mostly_constant_bands(tmp_path):
    constant = write_tif(tmp_path / "a.tif", np.full((1, 8, 8), 10000, np.uint16))
    assert (read_image(constant).rgb == 128).all()  # grey, to stay apart from no data
    empty = read_image(write_tif(tmp_path / "b.tif", np.full((3, 8, 8), np.nan, np.float32)))
    assert empty.valid == 0 and not empty.rgb.any()
    rare = np.zeros((1, 100, 100), np.float32)
    rare[0, 5, 5] = 8
    shown = read_image(write_tif(tmp_path / "c.tif", rare)).rgb
    assert shown[5, 5].tolist() == [255] * 3 and shown.sum() == 3 * 255


def test_untagged_zero_fill_does_not_wash_out_counts(tmp_path):
    data = rng.integers(7000, 9000, (1, 60, 60)).astype(np.uint16)
    data[:, :20] = 0
    picture = read_image(write_tif(tmp_path / "a.tif", data))
    assert picture.limits[0] == tuple(np.percentile(data[data > 0], (2, 98)))
    assert not picture.rgb[:20].any() and picture.valid == 1  # untagged: black, but not known to be missing


def test_complex_radar_shows_its_amplitude(tmp_path):
    amplitude = np.arange(1, 401, dtype=np.float32).reshape(20, 20)
    data = (amplitude * np.exp(1j * rng.uniform(0, 6, (20, 20)))).astype(np.complex64)
    shown = read_image(write_tif(tmp_path / "a.tif", data[None])).rgb[..., 0]
    assert np.abs(shown - stretched(amplitude, *np.percentile(amplitude, (2, 98)))).max() <= 1
    whole = (np.full((1, 4, 4), 3 + 4j)).astype(np.complex64)
    path = write_tif(tmp_path / "b.tif", whole, dtype="complex_int16")  # Sentinel-1 SLC
    assert read_image(path, ImageSettings(stretch="reflectance", reflectance=(0, 10))).rgb[0, 0, 0] == 128


# ---------------------------------------------------------------------------------------------- bands


def test_complex_radar_keeps_its_amplitude_when_made_small(tmp_path):
    phase = np.exp(1j * np.random.default_rng(0).uniform(0, 6.28, (256, 256)))
    data = (np.repeat([100, 200], 128) * phase).astype(np.complex64)[None]
    path = write_tif(tmp_path / "a.tif", data)
    small = read_image(path, ImageSettings(stretch="reflectance", reflectance=(100, 200)), max_side=64).rgb[..., 0]
    assert small[:, :31].max() < 3 and small[:, 33:].min() > 252


def test_scattered_nan_that_no_tag_names_is_not_spread_when_made_small(tmp_path):
    data = np.random.default_rng(0).random((1, 512, 512)).astype(np.float32)
    data[:, np.random.default_rng(1).random((512, 512)) < 0.02] = np.nan
    path = write_tif(tmp_path / "a.tif", data)
    assert read_image(path).valid == pytest.approx(0.98, abs=0.01)
    assert read_image(path, max_side=64).valid == pytest.approx(0.98, abs=0.02)


def test_a_fourth_band_that_is_asked_for_is_no_mask(tmp_path):
    """GDAL calls band 4 of 4 alpha where nothing is said; near infrared is nothing over water."""
    data = np.full((4, 8, 8), 100, np.uint8)
    data[3, :, :4] = 0
    path = write_tif(tmp_path / "nir.tif", data)
    assert read_image(path, ImageSettings(bands="4,1,2")).valid == 1
    assert read_image(path, ImageSettings(bands="1,2,3")).valid == 0.5


def bands_of(tmp_path, count, settings="auto", **options) -> tuple:
    data = np.arange(count * 16, dtype=np.uint8).reshape(count, 4, 4)
    path = write_tif(tmp_path / "bands.tif", data, photometric="MINISBLACK", **options)
    picture = read_image(path, ImageSettings(bands=settings))
    assert np.array_equal(picture.rgb, np.moveaxis(data[[b - 1 for b in picture.bands]], 0, 2).repeat(1, 2)) or (
        len(picture.bands) == 1 and (picture.rgb == data[picture.bands[0] - 1][..., None]).all()
    )
    return picture.bands


def test_auto_bands(tmp_path):
    colour = ColorInterp
    assert bands_of(tmp_path, 1) == (1,)
    assert bands_of(tmp_path, 2) == (1,)
    assert bands_of(tmp_path, 7) == (1, 2, 3)
    bgra = [colour.blue, colour.green, colour.red, colour.undefined]
    assert bands_of(tmp_path, 4, colours=bgra) == (3, 2, 1)
    named = ["B02", "B03", "B04", "B8A"]
    assert bands_of(tmp_path, 4, names=named) == (3, 2, 1)
    assert bands_of(tmp_path, 4, names=named, colours=[colour.red, colour.green, colour.blue, colour.undefined]) == (
        3,
        2,
        1,
    )
    words = ["Red Edge 1", "near infra-red", "Blue", "Green band", "Band 4 (Red)"]
    assert bands_of(tmp_path, 5, names=words) == (5, 4, 3)
    # A bare B4 is red on Landsat 8, near infrared on Landsat 7: auto does not guess, a sensor knows.
    planet = ["coastal_blue", "blue", "green_i", "green", "yellow", "red", "rededge", "nir"]
    assert bands_of(tmp_path, 8, names=planet) == (6, 4, 2)
    worldview = ["Coastal Blue", "Blue", "Green", "Yellow", "Red", "Red Edge", "NIR1", "NIR2"]
    assert bands_of(tmp_path, 8, names=worldview) == (5, 3, 2)
    landsat = ["SR_B1", "SR_B2", "SR_B3", "SR_B4", "SR_B5"]
    assert bands_of(tmp_path, 5, names=landsat) == (1, 2, 3)
    assert bands_of(tmp_path, 5, "landsat8", names=landsat) == (4, 3, 2)
    assert bands_of(tmp_path, 5, "landsat7", names=landsat) == (3, 2, 1)


@pytest.mark.parametrize(
    "settings, count, expected",
    [
        ("4,3,2", 5, (4, 3, 2)),
        ("2", 3, (2,)),
        ("1,1,1", 1, (1, 1, 1)),
        ("sentinel2", 13, (4, 3, 2)),
        ("sentinel2", 12, (4, 3, 2)),
        ("sentinel2", 10, (3, 2, 1)),
        ("sentinel2", 4, (3, 2, 1)),
        ("landsat8", 7, (4, 3, 2)),
        ("landsat5", 7, (3, 2, 1)),
        ("naip", 4, (1, 2, 3)),
        ("planetscope", 8, (6, 4, 2)),
        ("worldview", 8, (5, 3, 2)),
        ("modis", 7, (1, 4, 3)),
        ("bgr", 5, (3, 2, 1)),
    ],
)
def test_chosen_bands(tmp_path, settings, count, expected):
    assert bands_of(tmp_path, count, settings) == expected


def test_the_fourth_band_of_a_sensor_is_no_mask(tmp_path):
    data = np.full((4, 8, 8), 90, np.uint8)
    data[3, :, :4] = 0  # near infrared over water
    path = write_tif(tmp_path / "rgbn.tif", data)
    assert rasterio.open(path).colorinterp[3] == ColorInterp.alpha, "what GDAL makes of it where nothing is said"
    for side in (None, 4):
        picture = read_image(path, ImageSettings(bands="naip"), max_side=side)
        assert picture.valid == 1 and (picture.rgb == 90).all()
    assert read_image(path).valid == read_image(path, ImageSettings(bands="rgb")).valid == 0.5
    data[:3, :2] = 0
    path = write_tif(tmp_path / "tagged.tif", data, nodata=0)
    assert read_image(path, ImageSettings(bands="naip")).valid == 0.75
    path = write_tif(tmp_path / "masked.tif", data, mask=np.eye(8) > 0)
    assert read_image(path, ImageSettings(bands="naip")).valid == 0.125


@pytest.mark.parametrize("settings, count", [("sentinel2", 3), ("4,3,2", 3), ("rgb", 2), ("9", 1)])
def test_too_few_bands_is_said(tmp_path, settings, count):
    with pytest.raises(ImageError, match=rf"bands\.tif: has {count} band\(s\)"):
        bands_of(tmp_path, count, settings)


# ---------------------------------------------------------------------------------------------- settings


def test_settings_survive_json():
    settings = ImageSettings("sentinel2", "reflectance", (1, 99), (-100, 4000.5), 0, 1000)
    again = ImageSettings.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert again == settings and hash(again) == hash(settings) and again.percentiles == (1.0, 99.0)
    assert ImageSettings.from_dict({}) == ImageSettings()


@pytest.mark.parametrize(
    "bad",
    [
        {"band": "auto"},
        {"bands": "sentinel9"},
        {"bands": "4,3"},
        {"bands": "0,1,2"},
        {"bands": [4, 3, 2]},
        {"stretch": "linear"},
        {"percentiles": [98, 2]},
        {"percentiles": [0, 101]},
        {"percentiles": [1]},
        {"reflectance": [0, "1"]},
        {"reflectance": [0, math.nan]},
        {"nodata": "0"},
        {"max_pixels": 0},
        {"max_pixels": True},
        [("bands", "auto")],
    ],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(InputError, match="image settings"):
        ImageSettings.from_dict(bad)


# ---------------------------------------------------------------------------------------------- windows and tiles


@pytest.mark.parametrize(
    "height, width, tile, stride", [(100, 70, 32, 24), (64, 64, 32, 32), (10, 90, 32, 32), (1, 1, 5, 2)]
)
def test_tile_windows_cover_everything(height, width, tile, stride):
    seen = np.zeros((height, width), int)
    windows = list(tile_windows(height, width, tile, stride))
    for c, r, w, h in windows:
        assert (w, h) == (min(tile, width), min(tile, height)) and c + w <= width and r + h <= height
        seen[r : r + h, c : c + w] += 1
    assert seen.min() >= 1 and len(set(windows)) == len(windows)
    assert (stride < tile) or (height % tile or width % tile) or seen.max() == 1


def test_tile_windows_are_exact():
    assert list(tile_windows(10, 25, 10, 10)) == [(0, 0, 10, 10), (10, 0, 10, 10), (15, 0, 10, 10)]
    for tile, stride in ((10, 11), (10, 0), (0, 0)):
        with pytest.raises(InputError, match="stride"):
            list(tile_windows(10, 10, tile, stride))


@pytest.mark.parametrize("kind", ["uint16.tif", "uint8.tif", "png"])
def test_tiles_and_windows_are_cut_from_the_scene(tmp_path, kind):
    if kind == "png":
        path = tmp_path / "a.png"
        Image.fromarray(photo()).save(path)
        settings = ImageSettings(stretch="percentile")
    else:
        ramp = (photo().astype(kind[:-4]) * 1).transpose(2, 0, 1)
        path, settings = write_tif(tmp_path / "a.tif", ramp, **UTM), ImageSettings()
    scene = read_image(path, settings)
    with opened(path, settings) as read:
        tiles = [read(window) for window in tile_windows(*image_size(path), 16, 12)]
    assert [t.window for t in tiles] == list(tile_windows(40, 60, 16, 12))
    for picture in tiles:
        c, r, w, h = picture.window
        assert np.array_equal(picture.rgb, scene.rgb[r : r + h, c : c + w]) and picture.limits == scene.limits
        assert np.array_equal(read_image(path, settings, window=picture.window).rgb, picture.rgb)
        if picture.footprint:
            left, top = 500000 + 10 * c, 4600000 - 10 * r
            assert picture.footprint.bounds == (left, top - 10 * h, left + 10 * w, top)
    assert (scene.footprint is None) == (kind == "png")


@pytest.mark.parametrize("window", [(0, 0, 61, 10), (-1, 0, 5, 5), (0, 0, 0, 5), (59, 39, 2, 1)])
def test_a_window_outside_is_refused(tmp_path, window):
    Image.fromarray(photo()).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png: window .* is not inside 60 x 40"):
        read_image(tmp_path / "a.png", window=window)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_max_side_averages(tmp_path, suffix):
    rgb = rng.integers(0, 255, (40, 60, 3)).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / f"a.{suffix}")
    small = read_image(tmp_path / f"a.{suffix}", max_side=15).rgb
    mean = rgb.reshape(10, 4, 15, 4, 3).mean(axis=(1, 3))
    assert small.shape == (10, 15, 3) and np.abs(small - mean).max() <= 1
    assert read_image(tmp_path / f"a.{suffix}", max_side=1000).rgb.shape == rgb.shape
    assert read_image(tmp_path / f"a.{suffix}", max_side=1).rgb.shape == (1, 1, 3)


def test_thumbnails_ignore_masked_pixels(tmp_path):
    data = np.full((1, 8, 8), 100, np.uint8)
    data[0, :, ::2] = 0
    picture = read_image(write_tif(tmp_path / "a.tif", data, nodata=0), max_side=4)
    assert (picture.rgb == 100).all() and picture.valid == 1


def test_palette_thumbnails_keep_their_colours(tmp_path):
    palette = Image.fromarray((np.indices((32, 32)).sum(0) % 2 * 2).astype(np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])  # 0 red, 2 blue; their mean number, 1, is green
    palette.save(tmp_path / "a.tif")
    shown = read_image(tmp_path / "a.tif", max_side=16).rgb
    assert shown[..., 1].max() == 0 and set(map(tuple, shown.reshape(-1, 3).tolist())) <= {(255, 0, 0), (0, 0, 255)}


def test_untagged_nodata_is_never_averaged_in(tmp_path):
    data = np.full((1, 9, 9), 100, np.uint8)
    data[0, :, ::2] = 7
    for path in (write_tif(tmp_path / "a.tif", data), tmp_path / "a.png"):
        if path.suffix == ".png":
            Image.fromarray(data[0]).save(path)
        shown = read_image(path, ImageSettings(nodata=7), max_side=3).rgb
        assert set(shown.ravel().tolist()) <= {0, 100}


def test_palette_takes_every_stretch(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 15, 30, 60])
    palette.save(tmp_path / "a.tif")
    shown = read_image(tmp_path / "a.tif", ImageSettings(stretch="reflectance", reflectance=(0, 60))).rgb
    assert shown[0, 0].tolist() == [64, 128, 255]  # 63.75 and 127.5 rounded
    assert (read_image(tmp_path / "a.tif", ImageSettings(stretch="percentile")).rgb == 128).all()


def test_a_huge_scene_is_measured_on_patches(tmp_path, monkeypatch):
    monkeypatch.setattr(imagery, "SAMPLE_SIDE", 128)
    monkeypatch.setattr(imagery, "PATCHES", 8)
    data = rng.integers(1, 60000, (1, 512, 512)).astype(np.uint16)
    path = write_tif(tmp_path / "a.tif", data, tiled=True, blockxsize=16, blockysize=16)
    picture = read_image(path, ImageSettings(max_pixels=4096), window=(0, 0, 64, 64))  # 512^2 > 16 x 4096: never whole
    starts = [int(i * (512 - 16) / 7) for i in range(8)]
    patches = np.stack([data[0, r : r + 16, c : c + 16] for r in starts for c in starts])
    assert picture.limits[0] == pytest.approx(tuple(np.percentile(patches, (2, 98))))


def test_a_rewritten_file_is_measured_again(tmp_path):
    first = write_tif(tmp_path / "a.tif", np.arange(100, dtype=np.uint16).reshape(1, 10, 10) + 1)
    before = read_image(first).limits
    write_tif(first, np.arange(100, dtype=np.uint16).reshape(1, 10, 10) + 1001)
    os.utime(first, ns=(1, 1))
    assert read_image(first).limits == tuple((low + 1000, high + 1000) for low, high in before)


def test_a_large_scene_never_enters_memory(tmp_path):
    # 20,000 x 20,000 uint16 in 3 bands: 2.4 GB decoded; the child may map 700 MB more than it starts with.
    side, path = 20000, tmp_path / "large.tif"
    profile = dict(driver="GTiff", count=3, height=side, width=side, dtype="uint16", tiled=True, sparse_ok=True)
    with rasterio.open(path, "w", compress="deflate", blockxsize=256, blockysize=256, **profile) as dst:
        block = np.arange(1, 256 * 256 + 1, dtype=np.uint16).reshape(256, 256).clip(1, 5000)
        for col in range(0, side - 256, 2560):
            dst.write(np.stack([block] * 3), window=((0, 256), (col, col + 256)))
    code = f"""
import resource, imagery
settings = imagery.ImageSettings(stretch="percentile")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 700 * 2**20,) * 2)
tiles = imagery.tile_windows(*imagery.image_size({str(path)!r}), 512, 512)
with imagery.opened({str(path)!r}, settings) as read:
    first = read(next(tiles)); second = read(next(tiles))
assert first.limits == second.limits and first.rgb.shape == (512, 512, 3) and first.rgb.max() == 255
try:
    imagery.read_image({str(path)!r}, settings)
except imagery.ImageError as error:
    print(error)
"""
    env = {**os.environ, "GDAL_CACHEMAX": "64", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "large.tif: 20000 x 20000 pixels would decode more than max_pixels" in done.stdout


@pytest.mark.parametrize("kind, missing", [("uint8", None), ("uint16", 0), ("float32", np.nan), ("photo", None)])
def test_limits_are_those_of_the_pixels_read(tmp_path, monkeypatch, kind, missing):
    """An image that is read whole is measured on what was read; a window of it has the same limits, from a reading apart."""
    data = rng.integers(1, 200, (3, 60, 80)).astype("uint8" if kind == "photo" else kind)
    if missing is not None:
        data[:, :9, :30] = missing
    path = tmp_path / ("a.png" if kind == "photo" else "a.tif")
    if kind == "photo":
        Image.fromarray(data.transpose(1, 2, 0)).save(path)
    else:
        write_tif(path, data, nodata=missing, **UTM)
    settings, calls = ImageSettings(stretch="percentile"), []
    imagery._measured.clear()
    part = read_image(path, settings, window=(20, 10, 30, 30))
    imagery._measured.clear()
    reader = imagery._Photo if kind == "photo" else imagery._Raster
    real = reader.read
    monkeypatch.setattr(reader, "read", lambda self, *a, **k: calls.append(a) or real(self, *a, **k))
    whole = read_image(path, settings)
    assert whole.limits == part.limits and np.array_equal(whole.rgb[10:40, 20:50], part.rgb)
    assert len(calls) == 1


def test_threads_agree(tmp_path):
    paths = [
        write_tif(tmp_path / f"{i}.tif", rng.integers(1, 9000, (3, 64, 64)).astype(np.uint16), **UTM) for i in range(4)
    ]
    expected = [read_image(path).rgb for path in paths]
    imagery._measured.clear()
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: read_image(paths[i % 4]).rgb, range(64)))
    assert all(np.array_equal(got[i], expected[i % 4]) for i in range(64))


def test_colour_histogram_counts_cells_of_32_levels():
    rgb = np.zeros((2, 4, 3), np.uint8)
    rgb[0, :2], rgb[1, 3] = (255, 40, 31), (0, 0, 32)
    found = colour_histogram(rgb)
    assert found.shape == (512,) and found.dtype == np.float32
    assert {int(i): float(found[i]) for i in found.nonzero()[0]} == {0: 0.625, 7 * 64 + 8: 0.25, 1: 0.125}


# ---------------------------------------------------------------------------------------------- footprint


def test_utm_footprint(tmp_path):
    path = write_tif(tmp_path / "a.tif", photo().transpose(2, 0, 1), tags={"ACQUISITION_DATE": "2020-07-01"}, **UTM)
    place = read_image(path).footprint
    assert place.crs == "EPSG:32618" and place.bounds == (500000, 4599600, 500600, 4600000)
    assert place.pixel_size_m == (10, 10) and place.acquired == "2020-07-01"
    # Central meridian of zone 18 is 75 W; 600 m are 0.0072 degrees of longitude at 41.55 N.
    west, _, east, north = place.lonlat_bounds
    degrees = 600 / (111320 * math.cos(math.radians(north)))
    assert west == pytest.approx(-75, abs=1e-9) and east - west == pytest.approx(degrees, rel=3e-3)
    lons, lats = zip(*place.polygon)
    assert len(place.polygon) == 5 and place.polygon[0] == place.polygon[-1]
    assert (min(lons), max(lats)) == pytest.approx((west, north), abs=1e-6)
    area = sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(place.polygon, place.polygon[1:]))
    assert area > 0  # counter-clockwise
    assert read_image(path, max_side=6).footprint == place


@pytest.mark.parametrize("latitude", [0.0, 45.0, -60.0])
def test_pixel_size_of_degrees(tmp_path, latitude):
    where = dict(crs="EPSG:4326", transform=from_origin(10, latitude + 0.005, 0.0001, 0.0001))
    size = read_image(write_tif(tmp_path / "a.tif", np.zeros((1, 100, 100), np.uint8), **where)).footprint.pixel_size_m
    # Length of a degree on WGS 84 by the usual cosine series (NGA), independent of the radii used in imagery.py.
    p = math.radians(latitude)
    lat = 111132.92 - 559.82 * math.cos(2 * p) + 1.175 * math.cos(4 * p) - 0.0023 * math.cos(6 * p)
    lon = 111412.84 * math.cos(p) - 93.5 * math.cos(3 * p) + 0.118 * math.cos(5 * p)
    assert size == pytest.approx((lon * 1e-4, lat * 1e-4), rel=1e-5)


def test_web_mercator_and_feet_are_true_metres(tmp_path):
    data = np.zeros((1, 10, 10), np.uint8)
    mercator = dict(crs="EPSG:3857", transform=from_origin(0, 8399737.9, 20, 20))  # 60 N: twice too large
    assert read_image(write_tif(tmp_path / "a.tif", data, **mercator)).footprint.pixel_size_m == pytest.approx(
        (10, 10), rel=5e-3
    )
    feet = dict(crs="EPSG:2263", transform=from_origin(980000, 200000, 1, 1))  # New York, US survey feet
    assert read_image(write_tif(tmp_path / "b.tif", data, **feet)).footprint.pixel_size_m == pytest.approx(
        (0.3048006,) * 2
    )


def test_rotated_and_gcp_footprints_agree(tmp_path):
    data = np.zeros((1, 50, 80), np.uint8)
    cos, sin = 10 * math.cos(math.radians(30)), 10 * math.sin(math.radians(30))
    turn = Affine(cos, sin, 500000, sin, -cos, 4600000)

    def at(c, r):
        return 500000 + cos * c + sin * r, 4600000 + sin * c - cos * r

    points = [GroundControlPoint(r, c, *at(c, r)) for r in (0, 25, 50) for c in (0, 80)]
    turned = read_image(write_tif(tmp_path / "a.tif", data, crs="EPSG:32618", transform=turn)).footprint
    by_points = read_image(write_tif(tmp_path / "b.tif", data, gcps=(points, "EPSG:32618"))).footprint
    assert by_points.crs == turned.crs and by_points.bounds == pytest.approx(turned.bounds)
    assert turned.pixel_size_m == pytest.approx((10, 10)) and by_points.pixel_size_m == pytest.approx((10, 10))
    assert np.allclose(by_points.polygon, turned.polygon, atol=1e-9)
    xs, ys = zip(*[at(*corner) for corner in ((0, 0), (80, 0), (0, 50), (80, 50))])
    assert turned.bounds == pytest.approx((min(xs), min(ys), max(xs), max(ys)))


def test_antimeridian(tmp_path):
    data = np.zeros((1, 10, 10), np.uint8)
    fiji = dict(crs="EPSG:32701", transform=from_origin(150000, 8100000, 10000, 10000))
    counted = dict(crs="EPSG:4326", transform=from_origin(179, -17, 0.2, 0.2))  # 179 to 181 degrees
    for i, where in enumerate((fiji, counted)):
        place = read_image(write_tif(tmp_path / f"{i}.tif", data, **where)).footprint
        west, _, east, _ = place.lonlat_bounds
        assert 177 < west < 180 and -180 < east < -178
        assert np.ptp([lon for lon, _ in place.polygon]) < 3
    points = [GroundControlPoint(row=r, col=c, x=x, y=-17 - r / 10) for c, x in ((0, 179), (10, -179)) for r in (0, 10)]
    place = read_image(write_tif(tmp_path / "g.tif", data, gcps=(points, "EPSG:4326"))).footprint
    assert place.lonlat_bounds == pytest.approx((179, -18, -179, -17))
    assert place.pixel_size_m[0] == pytest.approx(0.2 * 111320 * math.cos(math.radians(17.5)), rel=3e-3)


@pytest.mark.parametrize(
    "crs, left, top, step, box",
    [
        ("EPSG:4326", -180, 90, (36, 18), (-180, -90, 180, 90)),
        ("EPSG:4326", 0, 90, (36, 18), (-180, -90, 180, 90)),
        ("EPSG:3857", -20037508.3, 20037508.3, (4007501.7, 4007501.7), (-180, -85.0511, 180, 85.0511)),
        ("EPSG:3995", -1e5, 1e5, (2e4, 2e4), (-180, 88.698, 180, 90)),  # the North Pole lies inside
    ],
)
def test_the_whole_earth_and_the_pole(tmp_path, crs, left, top, step, box):
    where = dict(crs=crs, transform=from_origin(left, top, *step))
    place = read_image(write_tif(tmp_path / "a.tif", np.zeros((1, 10, 10), np.uint8), **where)).footprint
    assert place.lonlat_bounds == pytest.approx(box, abs=1e-3)
    if crs != "EPSG:3995":
        assert np.ptp([lon for lon, _ in place.polygon]) == pytest.approx(360, abs=1e-3)


def test_rounding_takes_no_box_off_the_earth(tmp_path):
    step = 0.166666666666667  # 1080 of them are 180.00000000000036
    where = dict(crs="EPSG:4326", transform=from_origin(-180, 90, step, step), sparse_ok=True)
    path = write_tif(tmp_path / "a.tif", np.zeros((1, 1080, 2160), np.uint8), **where)
    place = read_image(path, max_side=8).footprint
    assert place.lonlat_bounds == (-180, -90, 180, 90)
    assert max(abs(lat) for _, lat in place.polygon) == 90
    place = read_image(path, window=(1800, 900, 360, 180)).footprint
    assert place.lonlat_bounds[1] == -90 and -180 <= place.lonlat_bounds[2] <= 180


def test_no_place_is_no_error(tmp_path):
    data = np.zeros((1, 10, 10), np.uint8)
    local = 'LOCAL_CS["site",UNIT["metre",1]]'
    for i, where in enumerate(
        [
            {"transform": from_origin(5, 5, 1, 1)},  # position without CRS
            {"crs": "EPSG:4326"},  # CRS without position
            {"crs": local, "transform": from_origin(5, 5, 1, 1)},
            {"crs": "EPSG:4326", "transform": from_origin(500000, 4600000, 10, 10)},  # metres said to be degrees
        ]
    ):
        assert read_image(write_tif(tmp_path / f"{i}.tif", data, **where)).footprint is None, where


@pytest.mark.parametrize(
    "tags, expected",
    [
        ({"TIFFTAG_DATETIME": "2018:07:16 06:06:23"}, "2018-07-16T06:06:23"),
        ({"TIFFTAG_DATETIME": "2018:07:16 06:06:23", "ACQUISITION_DATE": "20180715"}, "2018-07-15"),
        ({"datetime": "2020-01-02T03:04:05.678Z"}, "2020-01-02T03:04:05+00:00"),
        ({"PRODUCT_START_TIME": "2020-01-02T03:04:05+02:00"}, "2020-01-02T03:04:05+02:00"),
        ({"ACQUISITION_DATE": "2020-06-30T23:30:00+0200"}, "2020-06-30T23:30:00+02:00"),
        ({"ACQUISITION_DATE": "2020-06-30 23:30 -05"}, "2020-06-30T23:30:00-05:00"),
        ({"ACQUISITION_DATE": "20200630T101031Z"}, "2020-06-30T10:10:31+00:00"),
        ({"ACQUISITION_DATE": "2020-06-30 9999"}, "2020-06-30"),
        ({"TIFFTAG_DATETIME": "0000:00:00 00:00:00"}, None),
        ({"ACQUISITION_DATE": "yesterday", "DATE": "2020-02-30"}, None),
    ],
)
def test_acquisition_time(tmp_path, tags, expected):
    picture = read_image(write_tif(tmp_path / "a.tif", np.zeros((1, 4, 4), np.uint8), tags=tags, **UTM))
    assert picture.acquired == picture.footprint.acquired == expected
    assert picture.written == (set(tags) == {"TIFFTAG_DATETIME"} and expected is not None)


def test_sidecar_files_are_neither_read_nor_written(tmp_path):
    path = write_tif(tmp_path / "a.tif", np.full((1, 4, 4), 7, np.uint8), crs="EPSG:32618")
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as dst:
        dst.write_mask(np.zeros((4, 4), bool))
    (tmp_path / "a.tfw").write_text("10\n0\n0\n-10\n500005\n4599995\n")
    (tmp_path / "a.tif.aux.xml").write_text(
        "<PAMDataset><Metadata><MDI key='DATE'>2020-01-01</MDI></Metadata></PAMDataset>"
    )
    with rasterio.open(path) as src:  # they are there for whoever looks
        assert src.bounds.left == 500000 and src.tags()["DATE"] and not src.dataset_mask().any()
    picture = read_image(path)
    assert picture.footprint is None and picture.acquired is None and (picture.rgb == 7).all() and picture.valid == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tfw", "a.tif", "a.tif.aux.xml", "a.tif.msk"]


# ---------------------------------------------------------------------------------------------- what must be refused


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("empty.tif", b"", "is empty"),
        ("page.jpg", b"\n<!DOCTYPE html><html>404</html>", "HTML page"),
        ("program.png", b"MZ\x90\0" + bytes(60), "Windows program"),
        ("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        ("drawing2.png", b'<?xml version="1.0"?><svg/>', "SVG"),
        ("scene.tif", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("scene.vrt", b"<VRTDataset rasterXSize='1' rasterYSize='1'/>", "gdal_translate"),
        ("code.ps", b"%!PS-Adobe-3.0 EPSF-3.0\n", "is not an image"),  # Pillow would run Ghostscript
        ("a.zip", b"PK\3\4" + bytes(30), "ZIP"),
        ("noise.png", b"\x00\x01\x02\x03\x04\x05", "is not an image"),
        ("head.png", b"\x89PNG\r\n\x1a\n", "cut short or damaged"),
        ("head.jpg", b"\xff\xd8\xff", "cut short or damaged"),
        ("head.tif", b"II*\0\x08\0\0\0", "cut short or damaged"),
        ("head.webp", b"RIFF\x04\0\0\0WEBP", "cut short or damaged"),
        ("head.gif", b"GIF89a", "cut short or damaged"),
        ("head.bmp", b"BM", "cut short or damaged"),
        ("head.jp2", b"\0\0\0\x0cjP  \r\n\x87\n", "cut short or damaged"),
    ],
)
def test_not_images(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    for call in (read_image, image_size, lambda p: opened(p, ImageSettings()).__enter__()(None)):
        with pytest.raises(ImageError, match=said) as caught:
            call(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_zero_size(tmp_path, size):
    (tmp_path / "a.png").write_bytes(png_of_size(*size))
    with pytest.raises(ImageError, match=r"a\.png"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("side", [9000, 12000, 60000])
def test_decompression_bombs(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png_of_size(side, side))
    side *= 4
    profile = dict(driver="GTiff", count=1, height=side, width=side, dtype="uint8", sparse_ok=True, compress="deflate")
    with rasterio.open(tmp_path / "bomb.tif", "w", blockysize=side, **profile):  # one strip holds it all
        pass
    with rasterio.open(tmp_path / "tiled.tif", "w", tiled=True, **profile):
        pass
    for name, max_side in (("bomb.png", None), ("bomb.png", 64), ("bomb.tif", 64), ("tiled.tif", None)):
        with pytest.raises(ImageError, match=rf"{name}: .*pixels"):
            read_image(tmp_path / name, max_side=max_side)
    assert not read_image(tmp_path / "tiled.tif", window=(0, 0, 32, 32)).rgb.any()


def test_max_pixels_lets_a_trusted_photograph_of_any_size_in(tmp_path):
    """Pillow's own limit of 179 million pixels is not asked."""
    (tmp_path / "a.png").write_bytes(png_of_size(16000, 12000))
    with pytest.raises(ImageError, match="max_pixels=67108864"):
        read_image(tmp_path / "a.png")
    with pytest.raises(ImageError, match="cut short"):  # the file holds no more
        read_image(tmp_path / "a.png", ImageSettings(max_pixels=4 * 10**8))


def test_bands_that_are_decoded_together_count(tmp_path):
    form = {"driver": "GTiff", "count": 20, "height": 256, "width": 256, "dtype": "uint8", "tiled": True, "blockxsize": 256,
            "blockysize": 256, "compress": "deflate"}  # fmt: skip
    limit = ImageSettings(max_pixels=256 * 256, bands="1,2,3", stretch="none")
    for layout in ("pixel", "band"):
        with rasterio.open(tmp_path / f"{layout}.tif", "w", interleave=layout, **form) as out:
            out.write(np.full((20, 256, 256), 9, np.uint8))
    assert (read_image(tmp_path / "band.tif", limit).rgb == 9).all()
    with pytest.raises(ImageError, match="max_pixels=65536"):
        read_image(tmp_path / "pixel.tif", limit)


def test_max_pixels_counts_what_is_decoded(tmp_path):
    path = write_tif(tmp_path / "a.tif", np.ones((1, 256, 256), np.uint8), tiled=True, blockxsize=128, blockysize=128)
    small = ImageSettings(max_pixels=128 * 128)
    assert read_image(path, small, window=(100, 100, 128, 128)).rgb.shape == (128, 128, 3)
    assert read_image(path, small, max_side=64).rgb.shape == (64, 64, 3)  # streams through 16 x max_pixels
    with pytest.raises(ImageError, match=r"max_pixels=16384.*search\.py index --max_pixels"):
        read_image(path, small)
    with pytest.raises(ImageError, match="max_pixels=16383"):
        read_image(path, ImageSettings(max_pixels=128 * 128 - 1), max_side=64)  # not even one tile


def encode(kind: str) -> bytes:
    buffer, rgb = io.BytesIO(), rng.integers(0, 255, (200, 300, 3)).astype(np.uint8)
    if kind in ("jpeg", "progressive"):
        Image.fromarray(rgb).save(buffer, "JPEG", progressive=kind == "progressive")
    elif kind in ("png", "webp", "gif", "bmp"):
        Image.fromarray(rgb).save(buffer, kind)
    else:
        options = {"tif": {}, "deflate": {"compress": "deflate"}, "jpegtif": {"compress": "jpeg", "tiled": True}}
        options |= {"tiled": {"tiled": True, "compress": "lzw", "blockxsize": 128, "blockysize": 128}}
        driver = {"png16": "PNG", "jp2": "JP2OpenJPEG"}.get(kind, "GTiff")
        data = rgb.transpose(2, 0, 1).astype("uint16" if kind == "png16" else "uint8")
        with rasterio.MemoryFile() as memory:
            profile = dict(driver=driver, count=3, height=200, width=300, dtype=data.dtype) | options.get(kind, {})
            with memory.open(**profile) as dst:
                dst.write(data)
            return memory.read()
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind",
    ["jpeg", "progressive", "png", "webp", "gif", "bmp", "tif", "deflate", "jpegtif", "tiled", "png16", "jp2"],
)
def test_truncated_files_never_give_half_a_picture(tmp_path, kind, capfd):
    whole = encode(kind)
    (tmp_path / "whole").write_bytes(whole)
    assert read_image(tmp_path / "whole").rgb.shape == (200, 300, 3)
    for part in (0.05, 0.3, 0.6, 0.9, 0.99):
        (tmp_path / "part").write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(ImageError, match=r"part: cannot be decoded"):
            read_image(tmp_path / "part")
    assert capfd.readouterr().err == ""


def test_gdal_is_quiet(tmp_path):
    """In a process of its own, where nothing has set up logging and warnings are shown."""
    (tmp_path / "a.tif").write_bytes(encode("deflate")[:9000])
    write_tif(tmp_path / "b.tif", np.zeros((1, 4, 4), np.uint8))
    code = f"""
import imagery
imagery.read_image({str(tmp_path / "b.tif")!r})
try:
    imagery.read_image({str(tmp_path / "a.tif")!r})
except imagery.ImageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "" and "a.tif: cannot be decoded" in done.stdout


def test_paths_that_are_no_files(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.tif")
    for path, said in [
        (tmp_path / "missing.tif", "no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe.tif", "is a device or pipe"),
        ("/dev/zero", "is a device or pipe"),
        ("http://example.org/a.tif", "is an address"),
        ("https://example.org/a.tif", "is an address"),
        ("s3://bucket/a.tif", "is an address"),
        ("/vsicurl/http://example.org/a.tif", "is an address"),
        ("zip+https://example.org/a.zip!a.tif", "is an address"),
        ("GTIFF_DIR:1:a.tif", "no such file"),
        ("a\0b.tif", "cannot be opened"),
        ("a" * 5000, "cannot be opened"),
        (None, "cannot be opened"),
        (0, "cannot be opened"),
    ]:
        with pytest.raises(ImageError, match=said):
            read_image(path)
    Image.fromarray(photo()).save(tmp_path / "a.png")

    def forbidden(*_):
        raise PermissionError

    monkeypatch.setattr(imagery, "open", forbidden, raising=False)
    with pytest.raises(ImageError, match=r"a\.png: may not be read"):
        read_image(tmp_path / "a.png")


def test_errors_cross_processes_and_are_input_errors():
    error = pickle.loads(pickle.dumps(imagery._error("a.tif", "is empty", "write it again")))
    assert isinstance(error, InputError) and type(error) is ImageError
    assert str(error) == "a.tif: is empty; write it again"


def test_no_file_is_left_open(tmp_path):
    paths = [tmp_path / "a.png", write_tif(tmp_path / "a.tif", np.arange(64, dtype=np.uint16).reshape(1, 8, 8))]
    Image.fromarray(photo()).save(paths[0])
    (tmp_path / "bad.tif").write_bytes(encode("deflate")[:9000])
    read_image(paths[1])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read_image(paths[0]), read_image(paths[1]), image_size(paths[0])
        with pytest.raises(ImageError):
            read_image(tmp_path / "bad.tif")
    assert len(os.listdir("/proc/self/fd")) <= before and threading.active_count() < 50


# ---------------------------------------------------------------------------------------------- real rasters


@pytest.mark.parametrize(
    "name, crs, size_m, valid",
    [
        ("cog_gcps.tif", "EPSG:4326", (200, 204), 1.0),
        ("cog_nodata_nan.tif", "EPSG:32610", (200, 200), 1 - 154085 / 549**2),  # 154,081 zeros tagged, 4 NaN not
        ("landsat_b2_uint16.tif", "EPSG:32621", (60, 60), 1.0),
        ("mosaic_uint16_a.tif", "EPSG:32618", (300.038, 300.038), None),
        ("mosaic_uint16_b.tif", "EPSG:32618", (300.039, 300.039), None),
        ("rgba_uint16.tif", "EPSG:32612", (1.38, 1.379), 1 - 133258 / (411 * 634)),
        ("rgbn_uint8.tif", "EPSG:32618", (5, 5), 1.0),
        ("sentinel_10band_float32.tif", "EPSG:32614", (30, 30), 1.0),
    ],
)
def test_real_rasters(name, crs, size_m, valid):
    path = real(f"geotiff/{name}")
    picture = read_image(path)
    with rasterio.open(path) as src:
        assert picture.rgb.shape == (*src.shape, 3) and image_size(path) == src.shape
        data = src.read(list(picture.bands))
        masks = (src.read_masks(list(picture.bands)) > 0) & np.isfinite(data)
        if src.crs:
            assert picture.footprint.bounds == pytest.approx(tuple(src.bounds))
    assert picture.footprint.crs == crs and picture.footprint.pixel_size_m == pytest.approx(size_m, rel=5e-3)
    assert picture.valid == pytest.approx(masks.any(axis=0).mean() if valid is None else valid, abs=1e-9)
    for i, mask in enumerate(masks):
        assert not picture.rgb[..., i][~mask].any()
        if picture.limits and picture.limits[i][0] < picture.limits[i][1] and max(data.shape) <= 1024:
            kept = data[i][mask & (data[i] > 0)] if data.dtype == np.uint16 else data[i][mask]
            assert picture.limits[i] == pytest.approx(tuple(np.percentile(kept, (2, 98))), rel=1e-5)
            assert np.abs(picture.rgb[..., i] - np.where(mask, stretched(data[i], *picture.limits[i]), 0)).max() <= 1
    assert 40 < picture.rgb[masks.any(axis=0)].mean() < 200  # neither black nor washed out


def test_real_mosaics_overlap_on_earth():
    a, b = (read_image(real(f"geotiff/mosaic_uint16_{x}.tif"), max_side=8).footprint.lonlat_bounds for x in "ab")
    assert a[0] < b[0] < a[2] < b[2] and max(a[1], b[1]) < min(a[3], b[3])


def test_real_sentinel1_time_and_place():
    place = read_image(real("geotiff/cog_gcps.tif")).footprint
    with rasterio.open(real("geotiff/cog_gcps.tif")) as src:
        points = src.gcps[0]
    assert place.acquired == "2018-07-16T06:06:23"
    box = (min(p.x for p in points), min(p.y for p in points), max(p.x for p in points), max(p.y for p in points))
    assert place.lonlat_bounds == pytest.approx(box, abs=0.03)  # the affine fit of 210 points: within 3 km of 200 km


def test_real_rsvqa_pixels_are_untouched():
    paths = sorted(real("rsvqa_geotiff").glob("*.tif"))
    assert len(paths) == 9
    for path in paths:
        picture = read_image(path)
        with rasterio.open(path) as src:
            assert np.array_equal(picture.rgb, src.read().transpose(1, 2, 0))
        size = 10 if path.name.startswith("lr") else 0.1524  # Sentinel-2, aerial; Web Mercator claims 15.8 m for 10
        assert picture.footprint.pixel_size_m == pytest.approx((size, size), rel=0.02)


def test_bands_that_nothing_names_are_said(tmp_path):
    data = np.random.default_rng(0).integers(1, 3000, (13, 8, 8), dtype=np.uint16)
    paths = []
    for name, count in (("unnamed", 13), ("three", 3)):
        paths.append(tmp_path / f"{name}.tif")
        with rasterio.open(paths[-1], "w", driver="GTiff", height=8, width=8, count=count, dtype="uint16") as out:
            out.write(data[:count])
    assert "unnamed.tif: has 13 bands" in imagery.guessed_bands(paths, ImageSettings())
    assert imagery.guessed_bands(paths[1:], ImageSettings()) is None
    assert imagery.guessed_bands(paths, ImageSettings(bands="sentinel2")) is None
    with rasterio.open(paths[0], "r+") as out:
        for band, name in ((2, "B02"), (3, "B03"), (4, "B04")):
            out.set_band_description(band, name)
    assert imagery.guessed_bands(paths, ImageSettings()) is None
    with rasterio.open(tmp_path / "B04.tif", "w", driver="GTiff", height=8, width=8, count=1, dtype="uint16") as out:
        out.write(data[:1])
    with pytest.raises(ImageError, match=r"1 band.*rio stack"):
        read_image(tmp_path / "B04.tif", ImageSettings(bands="sentinel2"))


def write_band(path, data, x=500_000, crs="EPSG:32633", **profile):
    """A file of one band, on a grid of 10 m."""
    transform = rasterio.transform.from_origin(x, 5_800_000, 10, 10)
    profile |= {"height": data.shape[0], "width": data.shape[1], "count": 1, "dtype": data.dtype}
    with rasterio.open(path, "w", driver="GTiff", crs=crs, transform=transform, **profile) as out:
        out.write(data, 1)


def joined(path, other, *, settings, **how):
    """Whether a scene of several files reads as the file that holds its red, green and blue."""
    picture, one = read_image(path, settings, **how), read_image(other, **how)
    assert picture.footprint == one.footprint and picture.limits == one.limits and picture.valid == one.valid
    return np.array_equal(picture.rgb, one.rgb)


@pytest.mark.parametrize(
    ("names", "bands"),
    [("S2A_1_B{:02}.tif", "auto"), ("B{:02}.tif", "auto"), ("HLS.S30.T32TQM.2020166T101559.v2.0.B{:02}.tif", "auto"),
     ("T33UUP_20200615_B{:02}_10m.tif", "auto"), ("LC08_L2SP_1_SR_B{}.TIF", "auto"), ("LE07_L1TP_1_B{}.TIF", "auto"),
     ("mine_B{}.tif", "landsat9"), ("mine_B{}.tif", "landsat5"), ("x & <y>_B{:02}.tif", "sentinel2")],
)  # fmt: skip
def test_a_scene_with_a_file_for_each_band(tmp_path, names, bands):
    data = np.random.default_rng(0).integers(1, 3000, (5, 40, 30), dtype=np.uint16)
    data[:, :3] = 0
    for band in range(1, 5):
        write_band(tmp_path / names.format(band), data[band], nodata=0)
    codes = (3, 2, 1) if "LE07" in names or bands == "landsat5" else (4, 3, 2)
    grid = dict(crs="EPSG:32633", transform=rasterio.transform.from_origin(500_000, 5_800_000, 10, 10), nodata=0)
    with rasterio.open(
        tmp_path / "one.tif", "w", driver="GTiff", height=40, width=30, count=3, dtype="uint16", **grid
    ) as out:
        out.write(data[list(codes)])
    red, settings = tmp_path / names.format(codes[0]), ImageSettings(bands=bands)
    for how in ({}, {"window": (5, 2, 20, 30)}, {"max_side": 10}):
        assert joined(red, tmp_path / "one.tif", settings=settings, **how)
    assert imagery.image_size(red) == (40, 30)
    alone = read_image(red, ImageSettings(bands="1")).rgb
    assert (alone[..., 0] == alone[..., 1]).all() and not (read_image(red, settings).rgb == alone).all()
    other = read_image(tmp_path / names.format(codes[1]), settings if bands == "auto" else ImageSettings()).rgb
    assert (other[..., 0] == other[..., 1]).all()  # only red's stands for the scene

    paths = sorted(tmp_path.iterdir())
    kept, note = imagery.join_bands(paths, settings)
    assert kept == [path for path in paths if path in (red, tmp_path / "one.tif")]
    assert note.startswith("scenes with a file for each band: 1;") and str(red) in note and "3 files" in note
    assert imagery.join_bands(paths, ImageSettings(bands="1")) == (paths, None)

    green, state = tmp_path / names.format(codes[1]), imagery.file_state(red, bands)
    for first, second in ((red, tmp_path / "x"), (green, red), (tmp_path / "x", green)):
        first.rename(second)
    assert imagery.file_state(red, bands) != state, "bands changed places: another picture"
    size, time = imagery.file_state(red, bands)
    os.utime(tmp_path / names.format(codes[1]), ns=(10**9,) * 2)  # older than red's
    assert imagery.file_state(red, bands) != (size, time) and size > 2 * red.stat().st_size
    assert imagery.file_state(red, "1") == (red.stat().st_size, red.stat().st_mtime_ns)


def test_files_that_are_only_numbered_like_bands(tmp_path):
    """Cells of a grid, pictures in colour, bands of other sizes: each is a picture of its own."""
    data = np.random.default_rng(0).integers(1, 255, (4, 12, 12), dtype=np.uint8)
    cells, sizes = tmp_path / "cells", tmp_path / "sizes"
    for folder in (cells, sizes):
        folder.mkdir()
    for band in (2, 3, 4):
        write_band(cells / f"cell_B{band:02}.tif", data[band - 1], x=500_000 + 120 * band)
        write_band(sizes / f"s_B{band:02}_10m.tif", data[band - 1, : 4 * band])
        Image.fromarray(data[:3].transpose(1, 2, 0)).save(tmp_path / f"street_B{band:02}.png")
        assert len(imagery.band_files(cells / f"cell_B{band:02}.tif", "auto")) == (3 if band == 4 else 1)
    for folder, name in ((cells, "cell_B04.tif"), (sizes, "s_B04_10m.tif")):
        assert not imagery.is_joined(folder / name, ImageSettings())
        rgb = read_image(folder / name).rgb
        assert np.array_equal(rgb, np.repeat(data[3][..., None], 3, axis=2))
        paths = sorted(folder.iterdir())
        kept, note = imagery.join_bands(paths, ImageSettings())
        assert kept == paths and "rio stack" in note
    assert np.array_equal(read_image(tmp_path / "street_B04.png").rgb, data[:3].transpose(1, 2, 0))
    photos = [tmp_path / f"street_B{band:02}.png" for band in (2, 3, 4)]
    rgb = sizes / "rgb"
    rgb.mkdir()
    for band in (2, 3, 4):  # in colour, and lying somewhere
        with rasterio.open(
            rgb / f"B{band:02}.tif", "w", driver="GTiff", height=12, width=12, count=3, dtype="uint8", **UTM
        ) as out:
            out.write(data[:3])
    for alone in (photos, sorted(rgb.iterdir())):
        assert imagery.join_bands(alone, ImageSettings())[0] == alone
    # Beside scenes of another name that do join.
    (sizes / "scene").mkdir()
    for band in (2, 3, 4):
        write_band(sizes / "scene" / f"S2_B{band:02}.tif", data[0])
    scene = sorted((sizes / "scene").iterdir())
    mixed = [*sorted(cells.iterdir()), *photos, *scene]
    assert imagery.join_bands(mixed, ImageSettings())[0] == [*mixed[:6], scene[-1]]
    broken = tmp_path / "x_B03.tif"
    write_band(tmp_path / "x_B04.tif", data[0])
    write_band(tmp_path / "x_B02.tif", data[1])
    broken.write_bytes(b"<html>")
    with pytest.raises(ImageError, match=r"x_B03\.tif: is an HTML page"):
        read_image(tmp_path / "x_B04.tif")


def test_a_mask_inside_the_red_file_is_kept(tmp_path):
    data = np.random.default_rng(0).integers(1, 255, (3, 12, 12), dtype=np.uint8)
    mask = np.full((12, 12), 255, np.uint8)
    mask[:4] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        for band in (2, 3, 4):
            write_band(tmp_path / f"B{band:02}.tif", data[band - 2])
            with rasterio.open(tmp_path / f"B{band:02}.tif", "r+") as out:
                out.write_mask(mask)
    picture = read_image(tmp_path / "B04.tif")
    assert imagery.is_joined(tmp_path / "B04.tif", ImageSettings()) and picture.valid == pytest.approx(2 / 3)
    assert np.array_equal(picture.rgb, data[::-1].transpose(1, 2, 0) * (mask[..., None] > 0))


def test_a_sentinel_2_product_is_one_picture(tmp_path):
    """As ESA publishes level 2A and level 1C: every band at up to three resolutions, and a picture in true colour."""
    data = np.random.default_rng(0).integers(1, 4000, (12, 12), dtype=np.uint16)
    for metres, bands in ((10, "B02 B03 B04 B08 TCI"), (20, "B02 B03 B04 B8A TCI"), (60, "B01 B02 B03 B04 TCI")):
        folder = tmp_path / f"S2A.SAFE/IMG_DATA/R{metres}m"
        folder.mkdir(parents=True)
        for band in bands.split():
            write_band(folder / f"T33UUP_20200615T101559_{band}_{metres}m.tif", data[: 120 // metres, : 120 // metres])
    (tmp_path / "S2B.SAFE/IMG_DATA").mkdir(parents=True)
    for band in ("B02", "B03", "B04", "B08", "TCI"):
        write_band(tmp_path / f"S2B.SAFE/IMG_DATA/T33UUP_20200620T101559_{band}.tif", data)
    write_band(tmp_path / "alone_TCI_10m.tif", data)
    paths = sorted(path for path in tmp_path.rglob("*.tif"))
    kept, note = imagery.join_bands(paths, ImageSettings())
    assert [path.name for path in kept] == [
        "T33UUP_20200615T101559_B04_10m.tif", "T33UUP_20200620T101559_B04.tif", "alone_TCI_10m.tif",
    ]  # fmt: skip
    assert note.startswith("scenes with a file for each band: 2;") and "18 files beside them are left out" in note
    coarse = [path for path in paths if "R10m" not in str(path)]
    assert imagery.join_bands(coarse, ImageSettings())[0][0].name == "T33UUP_20200615T101559_B04_20m.tif"


def test_limits_are_of_these_settings(tmp_path):
    path, values = tmp_path / "a.tif", np.arange(1, 10_001, dtype=np.uint16).reshape(100, 100)
    with rasterio.open(path, "w", driver="GTiff", width=100, height=100, count=1, dtype="uint16") as file:
        file.write(values, 1)
    one, two = (
        read_image(path, ImageSettings(stretch="percentile", percentiles=at)).limits for at in ((2, 98), (10, 90))
    )
    assert one != two


def test_bands_that_cannot_be_joined_are_said():
    patch = [f"x/S2A_45_B{band}.tif" for band in ("01", "02", "03", "8A")]
    kept, note = imagery.join_bands([*patch, "a.tif"], ImageSettings())
    assert kept == [*patch, "a.tif"] and "scenes with a file for each band: 1, such as x/S2A_45_B01.tif" in note
    for band in (2, 3, 4):
        patch.append(f"LC08_L2SP_SR_B{band}.TIF")
        patch.append(f"T33UUP_B0{band}_10m.jp2")
    assert imagery.join_bands(patch, ImageSettings())[1].startswith("scenes with a file for each band: 3,")
    assert imagery.join_bands(["harbour_B1.tif", "harbour_B2.tif", "farm_1.png"], ImageSettings())[1] is None


def test_bands_that_cannot_be_joined_are_said_beside_those_that_are(tmp_path):
    """Of Landsat 7 the thermal bands, twice, are not pictures of their own."""
    data = np.random.default_rng(0).integers(1, 255, (12, 12), dtype=np.uint8)
    for band in ("1", "2", "3", "4", "6_VCID_1", "6_VCID_2"):
        write_band(tmp_path / f"LE07_L1TP_1_02_T1_B{band}.TIF", data)
    patch = [tmp_path / f"rect_B{band}.tif" for band in ("01", "02", "03")]
    kept, note = imagery.join_bands([*sorted(tmp_path.glob("LE07*")), *patch], ImageSettings())
    assert [path.name for path in kept] == ["LE07_L1TP_1_02_T1_B3.TIF", *(path.name for path in patch)]
    assert "5 files beside them are left out" in note and "rect_B01.tif, each a grey picture by itself" in note
    for band, metres in (("02", 10), ("03", 10), ("04", 10), ("05", 20), ("06", 20), ("8A", 20)):
        write_band(tmp_path / f"T33UUP_B{band}_{metres}m.tif", data[: 120 // metres, : 120 // metres])
    kept, note = imagery.join_bands(sorted(tmp_path.glob("T33*")), ImageSettings())
    assert [path.name for path in kept] == ["T33UUP_B04_10m.tif"] and "grey" not in note


# ----------------------------------------------------------------------------------------------------
# Where little of a file is data


@pytest.mark.parametrize("nodata", [0, None])
def test_data_in_a_corner_of_a_huge_canvas_set_its_stretch(tmp_path, nodata):
    path, random = tmp_path / "canvas.tif", np.random.default_rng(0)
    profile = {"driver": "GTiff", "count": 1, "height": 9000, "width": 9000, "dtype": "uint16", "nodata": nodata}
    tiles = {"tiled": True, "blockxsize": 512, "blockysize": 512, "SPARSE_OK": True, "compress": "deflate"}
    land = random.normal(1500, 400, (600, 600)).clip(200, 4000).astype("uint16")
    with rasterio.open(path, "w", **profile, **tiles) as file:
        file.write(land, 1, window=Window(5000, 5000, 600, 600))
    with opened(path, ImageSettings()) as read:
        ((low, high),) = read((5000, 5000, 256, 256)).limits
    assert np.allclose((low, high), np.percentile(land, ImageSettings().percentiles), rtol=0.05)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float32"])
def test_two_values_are_black_and_white(tmp_path, dtype):
    mask = np.zeros((64, 64), dtype)
    mask[16:48, 16:48] = 200
    with rasterio.open(tmp_path / "mask.tif", "w", driver="GTiff", count=1, height=64, width=64, dtype=dtype) as file:
        file.write(mask, 1)
    shown = read_image(tmp_path / "mask.tif", ImageSettings(stretch="percentile")).rgb
    assert (shown == np.where(mask, 255, 0)[..., None]).all()


@pytest.mark.parametrize("fill", [-3.4028235e38, 9.969209968386869e36, np.nan, np.inf])
def test_marks_of_missing_data_are_no_data(tmp_path, fill, recwarn):
    land = np.random.default_rng(0).uniform(0, 0.4, (3, 64, 80)).astype("float32")
    land[:, :, :10] = fill
    with rasterio.open(tmp_path / "f.tif", "w", driver="GTiff", count=3, height=64, width=80, dtype="float32") as file:
        file.write(land)
    picture = read_image(tmp_path / "f.tif")
    assert (picture.rgb[:, :10] == 0).all() and picture.valid == pytest.approx(70 / 80)
    assert not [warning for warning in recwarn if "overflow" in str(warning.message)]


def test_a_picture_without_data_is_none(tmp_path):
    with rasterio.open(tmp_path / "n.tif", "w", driver="GTiff", count=3, height=20, width=20, dtype="float32") as file:
        file.write(np.full((3, 20, 20), np.nan, "float32"))
    with pytest.raises(ImageError, match=r"n\.tif.*no pixel of it holds data"):
        read_rgb(tmp_path / "n.tif")


def test_bands_numbered_from_blue_to_red_are_told_of(tmp_path):
    for names, told in ((("B2", "B3", "B4"), True), (("SR_B2", "SR_B3", "SR_B4"), True), (("B4", "B3", "B2"), False)):
        path = tmp_path / f"{names[0]}.tif"
        with rasterio.open(path, "w", driver="GTiff", count=3, height=9, width=9, dtype="uint16") as file:
            file.write(np.ones((3, 9, 9), "uint16"))
            file.descriptions = names
        assert bool(guessed_bands([path], ImageSettings())) == told, names


def test_eight_bits_are_no_reflectance(tmp_path):
    Image.new("RGB", (9, 9), (90, 90, 90)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"8 bits a band.*--stretch auto"):
        read_image(tmp_path / "a.png", ImageSettings(stretch="reflectance"))


@pytest.mark.parametrize("head, told", [(b"\0\0\0\x18ftypheic", "HEIC"), (b"CDF\1", "netCDF"), (b"GRIB", "GRIB")])
def test_pictures_of_other_kinds_are_called_by_their_name(tmp_path, head, told):
    (tmp_path / "a.tif").write_bytes(head + bytes(40))
    with pytest.raises(ImageError, match=told):
        read_image(tmp_path / "a.tif")


def test_a_name_that_is_not_utf8(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"\xba\xd3.tif")
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", count=1, height=9, width=9, dtype="uint8") as file:
        file.write(np.ones((1, 9, 9), "uint8"))
    os.rename(tmp_path / "a.tif", name)
    with pytest.raises(ImageError, match="name that is not UTF-8"):
        read_image(os.fsdecode(name))
