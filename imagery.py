"""The one reader of every image: photographs (JPEG, PNG, WebP, GIF, BMP) and rasters (GeoTIFF, 16-bit PNG, JPEG 2000).

    picture = read_image("scene.tif", ImageSettings(bands="sentinel2"), max_side=512)
    picture.rgb         # (H, W, 3) uint8, black where the file holds no data
    picture.footprint   # where on Earth, or None

A file goes to GDAL (rasterio) or to Pillow by its first bytes, never by its name. The file of a red band stands for the
scene whose green and blue lie beside it in files of their own (`band_files`). What happens to the pixels then is one road
for all: choose bands, mask what is not data, stretch to 8 bits. The stretch belongs to the scene, not to the window, so a
tile looks as it does in its scene; and it is written down in `ImageSettings`, which every checkpoint and index carries, so
use sees what training saw.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from xml.sax.saxutils import escape

import numpy as np
import rasterio
from PIL import Image, ImageOps
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_gcps
from rasterio.warp import transform as warp_points
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from config import InputError

# A plain picture has no place on Earth, which is no reason to warn. `max_pixels` guards against bombs.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
Image.MAX_IMAGE_PIXELS = None  # else nothing above 179 million is opened, whatever `max_pixels` says

GDAL_OPTIONS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # the file alone: no .aux.xml, .tfw, .msk or .ovr beside it
    "GDAL_PAM_ENABLED": "NO",  # and none written beside it
    "GDAL_CACHEMAX": 256 * 2**20,  # bytes of decoded blocks a process; GDAL's 5% of the memory are 80% in 16 readers
}
# Counts up where a file and settings give other pixels than before, which caches and indexes must not mix.
RENDERING = 3
FILLS = (-9999, -32768, -32767, -(2**31))  # what signed and real numbers mark missing data by, tagged or not
LARGEST = 1e30  # from here on a real number is a mark of missing data: ESRI's -3.4e38, netCDF's 9.97e36
PATCHES = 16  # on a side, where the stretch of a huge file is measured on parts of it
SAMPLE_SIDE = 1024  # the stretch is measured on at most SAMPLE_SIDE^2 pixels: 1M give a percentile to ~0.01%
STREAM_FACTOR = 16  # a decimated read streams block by block, so it may pass through more than it returns
MAGIC = {  # first bytes: (format as Pillow names it, GDAL driver or None for Pillow)
    b"II*\0": ("TIFF", "GTiff"),
    b"MM\0*": ("TIFF", "GTiff"),
    b"II+\0": ("TIFF", "GTiff"),  # BigTIFF
    b"MM\0+": ("TIFF", "GTiff"),
    b"\0\0\0\x0cjP  ": ("JPEG2000", "JP2OpenJPEG"),
    b"\xff\x4f\xff\x51": ("JPEG2000", "JP2OpenJPEG"),
    b"\x89PNG\r\n\x1a\n": ("PNG", None),
    b"\xff\xd8\xff": ("JPEG", None),
    b"GIF8": ("GIF", None),
    b"BM": ("BMP", None),
}
NOT_IMAGES = {  # what people do hand in: (what it is, what to do)
    b"version https://git-lfs": ("a Git LFS pointer, not the image itself", "run `git lfs pull`"),
    b"<svg": ("an SVG drawing, not pixels", "export it as PNG"),
    b"<!doctype html": ("an HTML page, probably of a failed download", "fetch the image again"),
    b"<html": ("an HTML page, probably of a failed download", "fetch the image again"),
    b"<vrtdataset": (
        "a GDAL virtual raster, which names other files",
        "write it out with `gdal_translate x.vrt x.tif`",
    ),
    b"ehfa_header_tag": ("an ERDAS Imagine file", "convert it with `gdal_translate x.img x.tif`"),
    b"<?xml": ("an XML document such as SVG or metadata, not pixels", "give the image itself"),
    b"mz": ("a Windows program, not an image", "remove it"),
    b"\x7felf": ("a program, not an image", "remove it"),
    b"%pdf": ("a PDF document, not an image", "export the page as PNG"),
    b"pk\3\4": ("a ZIP archive, not an image", "unpack it first"),
    b"\x1f\x8b": ("a gzip archive, not an image", "unpack it first"),
    b"\x89hdf": ("an HDF5 or netCDF-4 file", "convert a variable to GeoTIFF with gdal_translate"),
    b"cdf": ("a netCDF file", "convert a variable to GeoTIFF with gdal_translate"),
    b"\x0e\x03\x13\x01": ("an HDF4 file", "convert a variable to GeoTIFF with gdal_translate"),
    b"grib": ("a GRIB file", "convert a message to GeoTIFF with gdal_translate"),
    b"nitf": ("a NITF file", "convert it with `gdal_translate x.ntf x.tif`"),
    b"rar!": ("a RAR archive, not an image", "unpack it first"),
}
HEIF = re.compile(rb"....ftyp(?:heic|heix|heim|hevc|mif1|msf1|avif|avis)", re.DOTALL)
# Where red, green and blue are: (the sensor's own numbers of R, G, B, looked for in descriptions such as "B04" or
# "SR_B4"; for files that name nothing, {bands in the file: 1-based indexes of R, G, B}, where 0 is any count).
_OLI = ((4, 3, 2), {6: (3, 2, 1), 7: (4, 3, 2), 10: (4, 3, 2), 11: (4, 3, 2)})
_TM = ((3, 2, 1), {6: (3, 2, 1), 7: (3, 2, 1), 8: (3, 2, 1), 9: (3, 2, 1)})
SENSORS = {
    # Sentinel-2 MSI (ESA, Sentinel-2 User Handbook): 13 = L1C B01-B12 with B8A; 12 = L2A, the same without B10;
    # 11 = L2A with one NIR band; 10 = the 10 m and 20 m bands B02 B03 B04 B05 B06 B07 B08 B8A B11 B12 (as in
    # BigEarthNet); 6 = B02 B03 B04 B8A B11 B12 (as in HLS chips); 4 = the 10 m bands B02 B03 B04 B08.
    "sentinel2": ((4, 3, 2), {n: (3, 2, 1) for n in (4, 6, 10)} | {n: (4, 3, 2) for n in (11, 12, 13)}),
    # Landsat (USGS, "What are the band designations for the Landsat satellites?"). OLI: 11 = B1-B11, 10 = without
    # the panchromatic B8, 7 = surface reflectance B1-B7, 6 = B2-B7. TM and ETM+: B1 B2 B3 are blue, green, red.
    "landsat8": _OLI,
    "landsat9": _OLI,
    "landsat5": _TM,
    "landsat7": _TM,
    "naip": (None, {3: (1, 2, 3), 4: (1, 2, 3)}),  # USDA NAIP: R G B (NIR)
    # Planet, "PlanetScope instruments": 4 = B G R NIR; 8 = coastal, B, green I, G, yellow, R, red edge, NIR.
    "planetscope": (None, {4: (3, 2, 1), 8: (6, 4, 2)}),
    # Maxar WorldView-2/3 multispectral: 4 = B G R NIR; 8 = coastal, B, G, yellow, R, red edge, NIR1, NIR2.
    "worldview": (None, {4: (3, 2, 1), 8: (5, 3, 2)}),
    "modis": ((1, 4, 3), {7: (1, 4, 3)}),  # NASA MOD09 surface reflectance, bands 1-7
    "rgb": (None, {0: (1, 2, 3)}),
    "bgr": (None, {0: (3, 2, 1)}),
}


class ImageError(InputError):
    """An image that cannot be used. The message names the file, what is wrong with it and what to do."""


def _error(path, what: str, remedy: str) -> ImageError:
    return ImageError(f"{path}: {what}; {remedy}")


# ------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class ImageSettings:
    """How pixels become RGB. Recorded in every checkpoint and index. Raises InputError on a bad value."""

    bands: str = "auto"
    """"auto": bands whose description names red, green, blue (or B04, B03, B02), else the colour interpretation,
    else the first three, else the first as grey. "4,3,2" or "1": 1-based indexes. Or a sensor of `SENSORS`."""
    stretch: str = "auto"
    """"auto": 8 bits as they are, anything else "percentile". "percentile": per band, over the whole scene.
    "reflectance": the fixed range below, the same for every scene. "none": the full range of an integer type,
    0 to 1 for floats."""
    percentiles: tuple[float, float] = (2.0, 98.0)
    """Percentiles of the valid pixels that become black and full brightness."""
    reflectance: tuple[float, float] = (0.0, 3000.0)
    """Black and full brightness in the file's own units. Sentinel-2 stores reflectance x 10000, and land rarely
    reflects above 0.3 in the visible. From processing baseline 04.00 (2022) on, its files hold +1000."""
    nodata: float | None = None
    """A value that holds no data although the file does not tag it, such as the untagged 0 around Landsat scenes."""
    max_pixels: int = 2**26
    """Most pixels (67 million, 8192 x 8192) decoded into memory at once: guards against decompression bombs."""

    def __post_init__(self):
        def pair(name, low, high):
            value = getattr(self, name)
            ok = isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))
            if not (ok and low <= value[0] < value[1] <= high):
                raise InputError(f"image settings: {name}={value!r}; expected two rising numbers in {low} to {high}")
            object.__setattr__(self, name, (float(value[0]), float(value[1])))

        pair("percentiles", 0, 100)
        pair("reflectance", -math.inf, math.inf)
        indexes = r"[1-9]\d*( *, *[1-9]\d* *, *[1-9]\d*)?"
        known = isinstance(self.bands, str) and (self.bands in ("auto", *SENSORS) or re.fullmatch(indexes, self.bands))
        if not known:
            raise InputError(
                f'image settings: bands={self.bands!r}; expected "auto", one or three 1-based band numbers such as '
                f'"4,3,2", or one of {", ".join(SENSORS)}'
            )
        if self.stretch not in ("auto", "percentile", "reflectance", "none"):
            raise InputError(
                f"image settings: stretch={self.stretch!r}; expected auto, percentile, reflectance or none"
            )
        if self.nodata is not None and not _is_number(self.nodata):
            raise InputError(f"image settings: nodata={self.nodata!r}; expected a number or nothing")
        if type(self.max_pixels) is not int or self.max_pixels < 1:
            raise InputError(f"image settings: max_pixels={self.max_pixels!r}; expected a whole number above 0")

    def to_dict(self) -> dict:
        """JSON-ready; `from_dict` restores an equal object."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> "ImageSettings":
        """Raises InputError on an unknown key or a bad value; absent keys take their defaults."""
        if not isinstance(values, dict):
            raise InputError(f"image settings: expected an object, got {type(values).__name__}")
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise InputError(f"image settings: unknown {', '.join(map(str, unknown))}; written by a newer version?")
        return cls(**values)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ------------------------------------------------------------------------------------------------------------
# What comes back


@dataclass(frozen=True)
class Footprint:
    """Where a picture lies on Earth."""

    crs: str
    """"EPSG:32618", or WKT where there is no code."""
    bounds: tuple[float, float, float, float]
    """left, bottom, right, top in `crs`; for a rotated scene the box around it."""
    lonlat_bounds: tuple[float, float, float, float]
    """west, south, east, north in degrees (WGS 84); west > east where the box crosses the antimeridian, as in
    GeoJSON (RFC 7946, section 5.2)."""
    pixel_size_m: tuple[float, float]
    """Width and height on the ground, in metres, of one pixel of the file at the centre (`max_side` does not
    change it)."""
    acquired: str | None
    """ISO 8601 date or time, if tagged."""
    polygon: tuple[tuple[float, float], ...]
    """(lon, lat) of the corners upper left, lower left, lower right, upper right and upper left again: for a north-up
    file counter-clockwise, as GeoJSON wants. Longitudes run on past 180 where the scene crosses the antimeridian."""


@dataclass(frozen=True)
class Picture:
    """An image, ready for a model."""

    rgb: np.ndarray
    """(H, W, 3) uint8; 0 where there is no data."""
    footprint: Footprint | None
    path: str
    window: tuple[int, int, int, int] | None
    """(col_off, row_off, width, height) in pixels of the file; None for the whole."""
    valid: float
    """Fraction, 0 to 1, of the pixels that hold data in at least one band shown."""
    bands: tuple[int, ...] = ()
    """1-based indexes of the bands shown: three, or one for grey."""
    limits: tuple[tuple[float, float], ...] | None = None
    """Per band, the values that became 0 and 255; None where 8 bits were taken as they are."""
    acquired: str | None = None
    """As in the footprint, and also for photographs, which have none."""
    written: bool = False
    """`acquired` is TIFFTAG_DATETIME or EXIF's DateTime, which many programs set to when they wrote the file."""


# ------------------------------------------------------------------------------------------------------------
# Opening: by content


def _sniff(path) -> tuple[str, str | None]:
    """(format, GDAL driver or None for Pillow) from the first bytes; ImageError for anything but an image file."""
    try:
        mode = os.stat(os.fspath(path)).st_mode
        if not stat.S_ISREG(mode):  # before open(): opening a named pipe would wait for ever
            kind = "a folder" if stat.S_ISDIR(mode) else "a device or pipe"
            raise _error(path, f"is {kind}, not a file", "give the path of one image")
        with open(path, "rb") as file:
            head = file.read(1024)
    except PermissionError:
        raise _error(path, "may not be read", "check its permissions") from None
    except (FileNotFoundError, NotADirectoryError):
        if re.match(r"(?i)/vsi|[a-z][a-z0-9+.-]+:/", str(path)):
            raise _error(path, "is an address, not a file", "download it and give the local path") from None
        raise _error(path, "no such file", "check the path") from None
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise _error(path, f"cannot be opened ({error})", "check the path") from None
    for magic, (name, driver) in MAGIC.items():
        if head.startswith(magic):
            # Pillow cuts 16-bit RGB to its high byte, which turns 12-bit imagery black; GDAL keeps all 16 bits.
            return name, "PNG" if name == "PNG" and head[24:25] == b"\x10" else driver
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP", None
    if not head:
        raise _error(path, "is empty (0 bytes)", "fetch or write it again")
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, (what, remedy) in NOT_IMAGES.items():
        if start.startswith(magic):
            raise _error(path, f"is {what}", remedy)
    if HEIF.match(head):
        raise _error(path, "is a HEIC or AVIF picture", "save it as PNG or JPEG")
    raise _error(path, f"is not an image (starts with {head[:8]!r})", "give a PNG, JPEG, WebP, TIFF or GeoTIFF")


@contextlib.contextmanager
def _guard(path):
    """Around calls into GDAL and Pillow: whatever they raise on a file's bytes becomes an ImageError naming it."""
    try:
        yield
    except ImageError:
        raise
    except UnicodeEncodeError:
        raise _error(path, "has a name that is not UTF-8, which GDAL does not open", "rename the file") from None
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        reason = reason.replace(os.path.abspath(path), "file")[:200]
        raise _error(path, f"cannot be decoded: cut short or damaged ({reason})", "fetch or write it again") from error


@contextlib.contextmanager
def _gdal(path):
    """`_guard` around calls into GDAL, with our options."""
    with _guard(path), rasterio.Env(**GDAL_OPTIONS):
        yield


class _Raster:
    """A file read by GDAL: any number of bands of any type, by windows and through overviews."""

    def __init__(self, path, driver: str, bands: str | None = None, overviews: bool = True):
        """bands: as `ImageSettings.bands`, for a scene of several files; None: the file alone. overviews: whether smaller
        copies in the file are read where they are large enough."""
        self.path = path
        with _gdal(path):
            # Absolute, so that a name such as "zip:x.tif" is never taken for an address; one driver only.
            options = {} if overviews else {"OVERVIEW_LEVEL": "NONE"}
            self.src = rasterio.open(os.path.abspath(path), driver=driver, **options)
            tags = {**self.src.tags(ns="IMAGERY"), **self.src.tags()}
            if bands and (joined := _virtual(band_files(path, bands))):
                self.src.close()
                self.src = rasterio.open(joined, driver="VRT")
            self.height, self.width = self.src.shape
            self.names = [description or "" for description in self.src.descriptions]
            self.colours = list(self.src.colorinterp)
            self.palette = self.src.colormap(1) if self.colours[0] == ColorInterp.palette else None
            kind = "complex64" if self.src.dtypes[0].startswith("complex") else self.src.dtypes[0]
            self.dtype = np.dtype("uint8" if self.palette else kind)
            self.overviews = self.src.overviews(1) if overviews else []
            self.acquired, self.written = _acquisition_time(tags)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.src.close()

    def check(self, window, out, limit: int):
        """Raise ImageError where reading `window` (c, r, w, h) as `out` (H, W) would decode too much."""
        ratio = min(window[3] / out[0], window[2] / out[1])
        level = max((o for o in self.overviews if o <= ratio), default=1)
        block = max(rows * cols for rows, cols in self.src.block_shapes)  # one strip or tile is decoded as a whole
        together = self.src.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE") in ("PIXEL", "TILE")
        deep = self.src.count if together else 1  # bands that are decoded with it
        streamed = max(window[2] * window[3] / level**2, block * deep)
        if max(out[0] * out[1], block) > limit or streamed > limit * STREAM_FACTOR:
            raise _too_large(self.path, self.height, self.width, limit)

    def read(self, bands, window, out, settings, nearest=False):
        """Bands of `window` as `out` (H, W): data (C, H, W) in the file's type and mask (C, H, W), True for data."""
        nodata = settings.nodata
        # GDAL marks band 4 of 4 as alpha where nothing is said; a sensor with files of four bands measures in it, and so
        # does a band that is asked for by its number.
        _, layouts = SENSORS.get(settings.bands, (None, {}))
        flags = self.src.mask_flag_enums
        named = len(self.colours) in layouts or any(self.colours[band - 1] == ColorInterp.alpha for band in bands)
        measured = named and any(MaskFlags.alpha in flags[band - 1] for band in bands)
        # Averaging is the honest way down, but the mean of two palette numbers is some third colour, that of radar's
        # complex numbers of random phases is nothing, and GDAL leaves out of a mean only what the file itself marks as
        # missing.
        nearest = nearest or self.palette or nodata is not None or measured or self.dtype.kind == "c"
        with _gdal(self.path):  # one call for pixels and mask: nodata tags, alpha bands, internal masks
            ways = [Resampling.average, Resampling.nearest]
            for resampling in ways[1:] if nearest or tuple(out) == (window[3], window[2]) else ways:
                read = self.src.read(
                    list(bands), window=Window(*window), out_shape=(len(bands), *out), resampling=resampling,
                    masked=not measured,
                )  # fmt: skip
                if self.dtype.kind != "f" or (np.abs(np.ma.filled(read, 0)) < LARGEST).all():
                    break  # else one NaN that no tag names made all NaN that it was averaged with
            white_is_zero = self.src.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
            bits = int(self.src.tags(bands[0], ns="IMAGE_STRUCTURE").get("NBITS", 8))
        data, mask = np.ma.getdata(read), ~np.ma.getmaskarray(read)
        if np.iscomplexobj(data):  # radar: show the amplitude
            data = np.abs(data)
        if data.dtype.kind == "f":
            mask &= np.abs(data) < LARGEST  # nor NaN
        if nodata is not None:
            mask &= data != nodata
        if self.palette:
            table = np.zeros((max(self.palette) + 1, 4), np.uint8)
            table[list(self.palette)] = list(self.palette.values())
            colour = table[np.minimum(data[0], len(table) - 1)].transpose(2, 0, 1)  # (4, H, W)
            return colour[:3], np.repeat(mask[:1] & (colour[3:] > 0), 3, axis=0)
        if data.dtype == np.uint8 and bits < 8:  # 1, 2 or 4 bits: 0 to 1 would look black
            data = (data.astype(np.uint16) * 255 // (2**bits - 1)).astype(np.uint8)
        if white_is_zero and data.dtype.kind == "u":
            data = np.iinfo(data.dtype).max - data
        return data, mask

    def footprint(self, window) -> "Footprint | None":
        """None without a usable CRS and position; ground control points give an affine least-squares fit."""
        with contextlib.suppress(ImageError), _gdal(self.path):  # a local CRS or nonsense is no reason to fail
            crs, transform, (points, points_crs) = self.src.crs, self.src.transform, self.src.gcps
            if points and points_crs and (not crs or transform.is_identity):
                if points_crs.is_geographic and np.ptp([p.x for p in points]) > 180:  # across the antimeridian
                    for p in points:
                        p.x %= 360
                crs, transform = points_crs, from_gcps(points)
            if crs and not transform.is_identity:
                return _footprint(crs, transform, window, self.acquired)
        return None


class _Photo:
    """A file read by Pillow: 8-bit grey or RGB, decoded whole (once); JPEG and WebP turned as EXIF says."""

    dtype, overviews, acquired, written, decoded = np.dtype("uint8"), [], None, False, None

    def __init__(self, path, name: str):
        self.path = path
        with _guard(path):
            self.raw = Image.open(path, formats=[name])
            self.orientation = self.raw.getexif().get(0x0112, 1) if name in ("JPEG", "WEBP") else 1
        self.width, self.height = self.raw.size[::-1] if self.orientation in (5, 6, 7, 8) else self.raw.size
        rgb = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
        self.colours = [ColorInterp.gray] if self.raw.mode in ("1", "L", "LA") else rgb
        self.names = [""] * len(self.colours)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.raw.close()

    def check(self, window, out, limit: int):
        """Raise ImageError where the image, which is always decoded whole, is too large."""
        if self.height * self.width > limit:
            raise _too_large(self.path, self.height, self.width, limit)

    def _decode(self):
        with _guard(self.path):
            self.raw.load()  # the first frame
            image, exif = self.raw, self.raw.getexif()
            if self.orientation != 1:
                image = ImageOps.exif_transpose(image)
            times = {"DATETIMEORIGINAL": exif.get_ifd(0x8769).get(0x9003), "TIFFTAG_DATETIME": exif.get(0x0132)}
            self.acquired, self.written = _acquisition_time(times)
            self.alpha = None
            if image.has_transparency_data:
                image = image.convert("RGBA")
                self.alpha = image.getchannel("A")
            self.decoded = image.convert("L" if len(self.colours) == 1 else "RGB")

    def read(self, bands, window, out, settings, nearest=False):
        """As `_Raster.read`."""
        nodata = settings.nodata
        if self.decoded is None:
            self._decode()
        c, r, w, h = window
        resampling = Image.Resampling.NEAREST if nearest or nodata is not None else Image.Resampling.BOX

        def cut(image):
            if (h, w) == out:
                return np.array(image if image.size == (w, h) else image.crop((c, r, c + w, r + h)))
            return np.array(image.resize(out[::-1], resampling, (c, r, c + w, r + h)))

        data, chosen = np.atleast_3d(cut(self.decoded)), [b - 1 for b in bands]
        if chosen != [*range(data.shape[2])]:  # a copy, and of a slow layout
            data = data[..., chosen]
        data = data.transpose(2, 0, 1)
        mask = np.ones(data.shape, bool) if self.alpha is None else np.repeat(cut(self.alpha)[None] > 0, len(data), 0)
        return data, mask if nodata is None else mask & (data != nodata)

    def footprint(self, window) -> None:
        """A photograph does not say where its pixels lie."""
        return None


def _open(path, settings: ImageSettings | None = None) -> _Raster | _Photo:
    """settings: whose bands to look for in the files beside, too; None: the file alone."""
    name, driver = _sniff(path)
    return _Raster(path, driver, settings and settings.bands) if driver else _Photo(path, name)


def _too_large(path, height: int, width: int, limit: int) -> ImageError:
    what = f"{width} x {height} pixels would decode more than max_pixels={limit}"
    remedy = "or raise max_pixels (search.py index --max_pixels) for a trusted file"
    return _error(path, what, f"read windows of a tiled GeoTIFF with overviews, {remedy}")


# ------------------------------------------------------------------------------------------------------------
# Bands and stretch


def _choose_bands(scene, settings: ImageSettings) -> tuple[int, ...]:
    """1-based indexes of red, green, blue, or of one grey band."""
    count, names, choice = len(scene.colours), scene.names, settings.bands
    if choice == "auto":
        if found := _known_bands(scene):
            return found
        plain = [i + 1 for i, colour in enumerate(scene.colours) if colour != ColorInterp.alpha]
        return tuple(plain[:3]) if len(plain) >= 3 else tuple(plain[:1]) or (1,)
    if choice not in SENSORS:
        found = tuple(int(part) for part in choice.split(","))
    else:
        codes, layouts = SENSORS[choice]
        found = _named(names, codes) or layouts.get(count) or layouts.get(0)
        if not found and count == 1:
            what = f'has 1 band, and bands="{choice}" looks for red, green and blue'
            raise _error(
                scene.path, what, "join the three files: `rio stack -f GTiff B04.tif B03.tif B02.tif -o rgb.tif`"
            )
        if not found:
            known = ", ".join(map(str, sorted(layouts)))
            what = f'has {count} band(s), and bands="{choice}" knows files of {known}'
            raise _error(scene.path, what, 'give the numbers of its red, green and blue, such as bands="3,2,1"')
    if max(found) > count:
        raise _error(scene.path, f'has {count} band(s), but bands="{choice}" needs {max(found)}', "choose others")
    return found


def _known_bands(scene) -> tuple[int, int, int] | None:
    """Indexes of red, green and blue by the bands' descriptions or else by their colours."""
    wanted = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    if found := _named(scene.names, (4, 3, 2), two_digits=True):
        return found
    if all(colour in scene.colours for colour in wanted):
        return tuple(scene.colours.index(colour) + 1 for colour in wanted)
    return None


def guessed_bands(paths: list, settings: ImageSettings) -> str | None:
    """What to say of files whose bands nothing names, of which the first three are shown; None where all is known. Looks at
    some thirty of `paths`."""
    for path in paths[:: max(1, len(paths) // 16)] if settings.bands == "auto" else ():
        with contextlib.suppress(ImageError), _open(path) as scene:
            plain = [colour for colour in scene.colours if colour != ColorInterp.alpha]
            # Three that a sensor's numbers name from short to long waves, B2, B3, B4, are blue, green, red.
            codes = [int(found[1]) for name in scene.names if (found := re.search(r"(?:^|_)b(\d+)$", name.lower()))]
            rising = len(codes) == 3 and codes == sorted(codes)
            if (len(plain) > 3 or rising) and not _known_bands(scene):
                named = "none of which it calls red, green or blue" if any(scene.names) else "that it does not name"
                return (
                    f"{path}: has {len(plain)} bands {named}; 1, 2 and 3 are shown as red, green and blue. If they"
                    f" are not: --bands {'|'.join(SENSORS)}, or numbers such as 4,3,2"
                )
    return None


# T33UUP_B04_10m.jp2, S2A_36QWD/B04.tif, LC08_SR_B4.TIF
ONE_BAND = re.compile(
    r"(?:^|(?<=[._/\\]))(?:S[RT]_)?B(\d{1,2}|8A)(?:_VCID_[12])?(?=(?:_\d+m)?\.(?:tiff?|jp2)$)", re.IGNORECASE
)

# Where a Sentinel-2 product has a scene at 10, 20 and 60 m, IMG_DATA/R20m/T33UUP_20200615_B04_20m.jp2, and in true colour.
GRID = re.compile(r"(?<=[/\\])R\d+m(?=[/\\])|_(\d+)m(?=\.\w+$)")
TRUE_COLOUR = re.compile(r"TCI(?=(?:_\d+m)?\.(?:tiff?|jp2)$)")


def band_files(path, bands: str) -> list[str]:
    """The files of red, green and blue of a scene with a file for each band, where `path` is that of red and the others lie
    beside it; else [path]. bands: as in `ImageSettings`: "auto" knows Sentinel-2 and HLS by two digits, Landsat by the name's
    beginning, and numbers mean the file alone."""
    folder, name = os.path.split(os.path.abspath(path))
    found = ONE_BAND.search(name)
    if not found or not found[1].isdigit():
        return [str(path)]
    codes = SENSORS[bands][0] if bands in SENSORS else None
    if bands == "auto":
        named = {r"L[CO]0?[89]": "landsat8", r"L[TE]0?[457]": "landsat7"}
        sensor = next((sensor for start, sensor in named.items() if re.match(start, name)), None)
        sensor = sensor or ("sentinel2" if len(found[1]) == 2 else None)
        codes = sensor and SENSORS[sensor][0]
    if not codes or int(found[1]) != codes[0]:
        return [str(path)]
    start, end = found.span(1)
    files = [os.path.join(folder, f"{name[:start]}{code:0{end - start}d}{name[end:]}") for code in codes]
    return files if all(map(os.path.isfile, files)) else [str(path)]


def file_state(path, bands: str = "auto") -> tuple[int, int]:
    """(bytes, time of change in ns) of a file; of several that make its picture the sum, and a number made of all of theirs: a
    band may be replaced by an older file, or change places with another. Raises OSError."""
    stats = [os.stat(file) for file in band_files(path, bands)]
    if len(stats) == 1:
        return stats[0].st_size, stats[0].st_mtime_ns
    all_of_them = repr([(stat.st_size, stat.st_mtime_ns) for stat in stats]).encode()
    number = int.from_bytes(hashlib.blake2b(all_of_them, digest_size=7).digest(), "big")
    return sum(stat.st_size for stat in stats), number


def _virtual(files: list[str]) -> str | None:
    """A GDAL virtual raster of the single bands of several files; None where they do not lie on one grid on Earth: files that
    are only numbered so."""
    if len(files) == 1:
        return None
    bands, grids, mask = [], set(), ""
    for file, colour in zip(files, ("Red", "Green", "Blue")):
        _, driver = _sniff(file)
        if driver is None:
            return None
        with rasterio.open(file, driver=driver) as src:
            grids.add((src.shape, src.crs, src.transform, src.dtypes))
            nodata = "" if src.nodata is None else f"<NoDataValue>{src.nodata!r}</NoDataValue>"
            (height, width), kind = src.block_shapes[0], src.dtypes[0]
            if colour == "Red" and MaskFlags.per_dataset in src.mask_flag_enums[0]:
                mask = (
                    '<MaskBand><VRTRasterBand dataType="Byte"><SimpleSource>'
                    f"<SourceFilename>{escape(file)}</SourceFilename><SourceBand>mask,1</SourceBand></SimpleSource>"
                    "</VRTRasterBand></MaskBand>"
                )
        kind = "Byte" if kind == "uint8" else kind.capitalize().replace("Uint", "UInt")
        bands.append(
            f'<VRTRasterBand dataType="{kind}" band="{len(bands) + 1}" blockXSize="{width}" blockYSize="{height}">'
            f"<Description>{colour}</Description>{nodata}<ColorInterp>{colour}</ColorInterp>"
            f"<SimpleSource><SourceFilename>{escape(file)}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>"
            "</VRTRasterBand>"
        )
    ((height, width), crs, transform, kinds), *others = grids
    if others or not crs or len(kinds) != 1 or kinds[0].startswith("complex"):
        return None
    place = ", ".join(map(repr, transform.to_gdal()))
    return (
        f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}"><SRS>{escape(crs.to_wkt())}</SRS>'
        f"<GeoTransform>{place}</GeoTransform>{''.join(bands)}{mask}</VRTDataset>"
    )


def is_joined(path, settings: ImageSettings) -> bool:
    """Whether the files of `band_files` make one picture. Raises ImageError."""
    with _open(path, settings) as scene:
        return isinstance(scene, _Raster) and scene.src.driver == "VRT"


def join_bands(paths: list, settings: ImageSettings) -> tuple[list, str | None]:
    """(the paths, without those of the other bands of scenes that the file of the red band stands for; what to say of scenes
    with a file for each band, or None). Opens some sixteen of the scenes, to see whether files that are named so are bands."""
    scenes: dict[str, list] = {}
    for path in paths:
        if ONE_BAND.search(os.path.basename(path)):
            scenes.setdefault(ONE_BAND.sub("", str(path)), []).append(path)
    reds = {}
    for scene, files in scenes.items():
        if red := [path for path in files if len(band_files(path, settings.bands)) > 1]:
            reds[scene] = red[0]
    kinds: dict[str, list] = {}  # scenes of one naming: S2A_1_B04.tif and S2A_2_B04.tif, not dem_B04.tif
    for scene, red in reds.items():
        kinds.setdefault(re.sub(r"\d+", "0", os.path.basename(red)), []).append(scene)
    for alike in kinds.values():
        for scene in alike[:: max(1, len(alike) // 16)]:
            with contextlib.suppress(ImageError):
                if is_joined(reds[scene], settings):
                    break
        else:
            for scene in alike:
                del reds[scene]
    joined = {GRID.sub("", scene) for scene in reds}
    apart = [
        files[0]
        for scene, files in scenes.items()
        if GRID.sub("", scene) not in joined and len(files) >= 3 and not settings.bands[0].isdigit()
    ]
    named = "`--bands sentinel2` (or landsat8, ...) makes one of B4, B3 and B2 that have one grid and a CRS; others "
    grey = (
        f"scenes with a file for each band: {len(apart)}, such as {apart[0]}, each a grey picture by itself;"
        f" {named if settings.bands == 'auto' else ''}join first, `rio stack -f GTiff B04.tif B03.tif B02.tif -o rgb.tif`"
    ) if apart else None  # fmt: skip
    if not reds:
        return paths, grey
    whole = [files for scene, files in scenes.items() if GRID.sub("", scene) in joined]  # at all resolutions
    others = {path for files in whole for path in files} - set(reds.values())
    same: dict[str, list[str]] = {}  # one place and time at several resolutions: the finest stands for all, and for TCI
    for scene in sorted(reds, key=lambda scene: int((GRID.findall(scene) or [0])[-1] or 0)):
        same.setdefault(GRID.sub("", scene), []).append(scene)
    others |= {reds.pop(scene) for _, *coarser in same.values() for scene in coarser}
    others |= {
        path for path in paths if (name := TRUE_COLOUR.sub("", str(path))) != str(path) and GRID.sub("", name) in same
    }
    left_out = f"; {len(others)} files beside them are left out (--bands 1: each by itself)" if others else ""
    return [path for path in paths if path not in others], (
        f"scenes with a file for each band: {len(reds)}; red, green and blue are one picture under the name of red's, such as"
        f" {next(iter(reds.values()))}{left_out}" + (f"\n{grey}" if grey else "")
    )


def _named(names, codes, two_digits=False) -> tuple[int, int, int] | None:
    """Indexes of the bands described as red, green and blue, or by the sensor's numbers. With `two_digits` only as
    "B04", Sentinel-2's way: a bare "B4" is red on Landsat 8 and near infrared on Landsat 7."""
    words = [set(re.findall(r"[a-z0-9]+", name.lower())) for name in names]
    other = {"edge", "infra", "ir", "nir", "swir", "coastal"}  # "red edge", "infra-red", "coastal blue"

    def find(colour, code):
        spelt = {f"b{code:02d}"} | (set() if two_digits else {f"b{code}"}) if code else set()
        sure = [i for i, w in enumerate(words) if w & spelt or w == {colour}]  # "green", before PlanetScope's "green_i"
        hits = sure or [i for i, w in enumerate(words) if colour in w and not w & other]
        return hits[0] + 1 if hits else None

    found = tuple(map(find, ("red", "green", "blue"), codes or (None,) * 3))
    return found if None not in found else None


_measured: dict[tuple, tuple] = {}  # tiles, crops and epochs of one scene measure it once
_MEASURED_MOST = 256


def _limits(scene, bands, settings: ImageSettings, whole=None):
    """Per band the (low, high) that become 0 and 255, or None for 8 bits as they are. Always of the whole scene; whole: its
    (data, mask) where they have been read."""
    stretch = settings.stretch
    if stretch == "auto":
        stretch = "none" if scene.dtype == np.uint8 else "percentile"
    channels = 3 if ColorInterp.palette in scene.colours else len(bands)
    if stretch == "reflectance":
        if scene.dtype == np.uint8 and settings.reflectance[1] >= 1000:
            what = "has 8 bits a band, of which --stretch reflectance would make a nearly black picture"
            raise _error(scene.path, what, "choose --stretch auto for such files")
        return (settings.reflectance,) * channels
    if stretch == "none":
        full = (0.0, float(np.iinfo(scene.dtype).max)) if scene.dtype.kind in "iu" else (0.0, 1.0)
        return None if scene.dtype == np.uint8 else (full,) * channels
    state = file_state(scene.path, settings.bands)  # a file that was rewritten is another
    key = (os.path.abspath(scene.path), *state, bands, settings)
    limits = _measured.get(key)
    if limits is None:
        limits = _percentile_limits(scene, bands, settings, whole)
        if len(_measured) >= _MEASURED_MOST:
            _measured.clear()
        _measured[key] = limits
    return limits


def _percentile_limits(scene, bands, settings, whole):
    # Overviews are means, which spread less than the pixels do: of radar's speckle by half. Not so for what is slow to decode
    # (JPEG 2000) or reads through to other files (several of one scene), optical images both.
    if scene.overviews and scene.src.driver not in ("JP2OpenJPEG", "VRT"):
        with _Raster(scene.path, scene.src.driver, overviews=False) as full:
            return _percentile_limits(full, bands, settings, whole)
    h, w = scene.height, scene.width
    scale = min(1.0, SAMPLE_SIDE / max(h, w))
    if whole is not None and scale == 1:
        measured = _by_band([whole])
    else:
        out = (max(1, round(h * scale)), max(1, round(w * scale)))
        levels = [1, *(o for o in scene.overviews if o <= 1 / scale)]  # what GDAL may read instead of full size
        if h * w / max(levels) ** 2 <= settings.max_pixels:
            measured = _by_band(_samples(scene, bands, settings, [((0, 0, w, h), out)]))
        else:
            # Huge: a grid of patches instead of decoding all of it; many small ones, for land changes from place to place.
            # More and smaller ones where its data lie in a few places of a large canvas.
            for patches in (PATCHES, 4 * PATCHES, 16 * PATCHES):
                ph, pw = min(h, SAMPLE_SIDE // patches), min(w, SAMPLE_SIDE // patches)
                rows, cols = (np.linspace(0, n - p, patches).astype(int).tolist() for n, p in ((h, ph), (w, pw)))
                grid = [((c, r, pw, ph), (ph, pw)) for r in rows for c in cols]
                measured = _by_band(_samples(scene, bands, settings, grid))
                if max(np.count_nonzero(_telling(values)) for values in measured) >= 1000:
                    break
    limits = []
    for values in measured:
        telling = _telling(values)
        if telling.size == 0:
            limits.append((0.0, 1.0))
            continue
        low, high = np.percentile(telling, settings.percentiles)
        if low == high:  # almost all one value: show what differs
            low, high = telling.min(), telling.max()
        if low == high and not values.all():  # or that it is not 0
            low = 0
        limits.append((float(low), float(high)))
    return tuple(limits)


def _samples(scene, bands, settings, reads: list[tuple]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(data, mask) of each (window, shape); nearest, so that the values are the file's own."""
    for window, shape in reads:
        scene.check(window, shape, settings.max_pixels)
    return [scene.read(bands, window, shape, settings, nearest=True) for window, shape in reads]


def _by_band(samples: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """The values (n,) of each band that are data."""
    flat = [[part.reshape(len(part), -1) for part in pair] for pair in samples]
    return [values[mask] for values, mask in zip(*(np.concatenate(parts, axis=1) for parts in zip(*flat)))]


def _telling(values: np.ndarray) -> np.ndarray:
    """Of a band's values those that are none by which missing data are marked, tagged or not."""
    if values.dtype.kind == "u" and values.itemsize > 1 and values.any():
        return values[values > 0]  # scenes of counts
    if values.dtype.kind == "f" or values.itemsize > 1:
        return values[~np.isin(values, FILLS) & (np.abs(values.astype(float)) < LARGEST)]
    return values


def _render(data, mask, limits) -> np.ndarray:
    """(C, H, W) of any type to (H, W, 3) uint8: 255 (x - low) / (high - low), rounded and clipped; masked is 0."""
    if limits is None and len(data) == 3 and mask.all():
        return np.ascontiguousarray(data.transpose(1, 2, 0))
    rgb = np.zeros((*data.shape[1:], 3), np.uint8)
    for i in range(3):
        k = i if len(data) == 3 else 0
        band = data[k]
        if limits is not None:
            low, high = limits[k]
            exact = np.result_type(band.dtype, np.float32)  # 32-bit integers need double precision
            band = np.where(mask[k], band, 0).astype(exact)
            if high > low:
                band = np.rint(np.clip((band - low) * (255 / (high - low)), 0, 255)).astype(np.uint8)
            else:  # one value only: grey, to stay apart from no data
                band = np.full(band.shape, 128, np.uint8)
        rgb[..., i] = np.where(mask[k], band, 0)
    return rgb


# ------------------------------------------------------------------------------------------------------------
# Footprint


def _footprint(crs, transform, window, acquired) -> Footprint:
    """Raises ValueError where the coordinates are not on the Earth."""
    c, r, w, h = window

    def at(x, y):
        return transform.a * x + transform.b * y + transform.c, transform.d * x + transform.e * y + transform.f

    corners = [at(c, r), at(c, r + h), at(c + w, r + h), at(c + w, r)]
    xs, ys = zip(*corners)
    bounds = (min(xs), min(ys), max(xs), max(ys))
    west, south, east, north = transform_bounds(crs, "EPSG:4326", *bounds, densify_pts=21)
    # The centre and its neighbours one pixel right and one pixel down, then the corners, in lon / lat.
    centre = [at(c + w / 2 + dx, r + h / 2 + dy) for dx, dy in ((0, 0), (1, 0), (0, 1))]
    lons, lats = warp_points(crs, "EPSG:4326", *map(list, zip(*centre, *corners)))
    if not np.isfinite([west, south, east, north, *lons, *lats]).all() or max(map(abs, lats)) > 90 + 1e-6:
        raise ValueError("coordinates off the Earth")
    lons[0] -= 360 * round(lons[0] / 360)  # some count longitude from 0 to 360
    lons = [lon - 360 * round((lon - lons[0]) / 360) for lon in lons]  # run on past 180, no jumps
    west, east = (lon - 360 * round(lon / 360) for lon in (west, east)) if east - west < 360 else (-180.0, 180.0)
    if west <= east and not west <= lons[0] <= east:  # no box without the centre: this one went around the Earth
        west, east = -180.0, 180.0
    # Rounding takes a file of the whole Earth 1e-13 degrees past its ends.
    west, east = (max(-180.0, min(lon, 180.0)) for lon in (west, east))
    south, north, *lats = (max(-90.0, min(lat, 90.0)) for lat in (south, north, *lats))
    size = [_metres(lons[0], lats[0], lons[i], lats[i]) for i in (1, 2)]
    if crs.is_projected:
        # UTM's own scale error (0.04%) shall not turn 10 m into 9.996 m; Web Mercator's (a factor of 2 at 60
        # degrees north) must not pass for metres.
        unit = crs.linear_units_factor[1]
        nominal = (math.hypot(transform.a, transform.d) * unit, math.hypot(transform.b, transform.e) * unit)
        size = [n if abs(s / n - 1) < 0.01 else s for s, n in zip(size, nominal)]
    code = crs.to_epsg()
    return Footprint(
        crs=f"EPSG:{code}" if code else crs.to_wkt(),
        bounds=bounds,
        lonlat_bounds=(west, south, east, north),
        pixel_size_m=tuple(size),
        acquired=acquired,
        polygon=tuple(zip([*lons[3:], lons[3]], [*lats[3:], lats[3]])),
    )


def _metres(lon0, lat0, lon1, lat1) -> float:
    """Ground distance of two near points on the WGS 84 ellipsoid, from its radii of curvature in the meridian and
    the prime vertical (Snyder, Map Projections: A Working Manual, USGS Professional Paper 1395, 1987, chapter 4)."""
    a, e2 = 6378137.0, 0.00669437999014
    phi = math.radians((lat0 + lat1) / 2)
    sin2 = 1 - e2 * math.sin(phi) ** 2
    north = a * (1 - e2) / sin2**1.5 * math.radians(lat1 - lat0)
    east = a / math.sqrt(sin2) * math.cos(phi) * math.radians(lon1 - lon0)
    return math.hypot(north, east)


# Most telling first; TIFFTAG_DATETIME last, for it may be when the file was written.
ACQUISITION_TAGS = """
    ACQUISITIONDATETIME ACQUISITION_DATETIME ACQUISITION_DATE ACQUISITION_TIME ACQUIRED SENSING_TIME
    DATATAKE_1_DATATAKE_SENSING_START PRODUCT_START_TIME START_TIME DATE_ACQUIRED EXIF_DATETIMEORIGINAL
    DATETIMEORIGINAL DATETIME DATE TIFFTAG_DATETIME"""
_DATE = re.compile(
    r"\s*(\d{4})[-:/]?(\d\d)[-:/]?(\d\d)"
    r"(?:[ T]?(\d\d):?(\d\d)(?::?(\d\d))?(?:\.\d+)?\s*(?:(Z)|([+-]\d\d)(?::?(\d\d))?)?)?"
)


def _acquisition_time(tags: dict) -> tuple[str | None, bool]:
    """ISO 8601 from the first tag of ACQUISITION_TAGS that holds a real date, with its time and zone if given; and whether it
    is the last of them, `Picture.written`."""
    upper = {str(key).upper(): str(value) for key, value in tags.items() if value}
    for tag in ACQUISITION_TAGS.split():
        match = _DATE.match(upper.get(tag, ""))
        if not match:
            continue
        year, month, day, hour, minute, second, utc, ahead, minutes = match.groups()
        text = f"{year}-{month}-{day}"
        zone = "+00:00" if utc else f"{ahead}:{minutes or '00'}" if ahead else ""
        clocks = [f"T{hour}:{minute}:{second or '00'}{zone}"] if hour else []
        for clock in [*clocks, ""]:  # digits after a date may be no clock
            with contextlib.suppress(ValueError):  # "0000:00:00 00:00:00" is what some cameras write
                when = datetime.fromisoformat(text + clock)
                return (when.isoformat() if clock else text), tag == "TIFFTAG_DATETIME"
    return None, False


# ------------------------------------------------------------------------------------------------------------
# Reading


def image_format(path) -> str:
    """What a file is by its first bytes, as Pillow names it: "PNG", "TIFF" ... Raises ImageError."""
    return _sniff(path)[0]


def has_place(path) -> bool:
    """Whether the file itself says where it lies. Raises ImageError."""
    with _open(path) as scene:
        return scene.footprint((0, 0, scene.width, scene.height)) is not None


def read_rgb(path, settings: ImageSettings = ImageSettings(), **how) -> np.ndarray:
    """(H, W, 3) uint8 of `read_image`, of a file that shows something. Raises ImageError."""
    picture = read_image(path, settings, **how)
    if not picture.valid:
        raise _error(path, "no pixel of it holds data", "leave it out")
    return picture.rgb


def image_size(path) -> tuple[int, int]:
    """(H, W) from the header, as `read_image` will return it. Raises ImageError."""
    with _open(path) as scene:
        return scene.height, scene.width


def read_image(path, settings: ImageSettings = ImageSettings(), window=None, max_side: int | None = None) -> Picture:
    """Read an image, or `window=(col_off, row_off, width, height)` of it, in pixels of the file.

    With `max_side` the longer side of the result is at most that, averaged over the source pixels (through
    overviews where the file has them). Raises ImageError, naming the file, for anything that is not a whole,
    readable image within `settings.max_pixels`.
    """
    with _open(path, settings) as scene:
        return _read(scene, settings, window, max_side)


def _read(scene, settings, window, max_side) -> Picture:
    box = (0, 0, scene.width, scene.height)
    if window is not None:
        box = tuple(int(n) for n in window)
        c, r, w, h = box
        if not (c >= 0 and r >= 0 and w > 0 and h > 0 and c + w <= scene.width and r + h <= scene.height):
            what = f"window {box} (column, row, width, height) is not inside {scene.width} x {scene.height} pixels"
            raise _error(scene.path, what, "choose one inside")
    if max_side is not None and max_side < 1:
        raise InputError(f"max_side={max_side}; expected a number of pixels above 0")
    scale = min(1.0, max_side / max(box[2:])) if max_side else 1.0
    out = (max(1, round(box[3] * scale)), max(1, round(box[2] * scale)))  # (H, W)
    scene.check(box, out, settings.max_pixels)
    bands = _choose_bands(scene, settings)
    data, mask = scene.read(bands, box, out, settings)
    whole = (data, mask) if data.shape[1:] == (scene.height, scene.width) else None
    limits = _limits(scene, bands, settings, whole)
    return Picture(
        rgb=_render(data, mask, limits),
        footprint=scene.footprint(box),
        path=os.fsdecode(scene.path),
        window=None if window is None else box,
        valid=float(mask.any(axis=0).mean()),
        bands=bands,
        limits=limits,
        acquired=scene.acquired,
        written=scene.written,
    )


def colour_histogram(rgb: np.ndarray) -> np.ndarray:
    """What colour alone says of (H, W, 3) uint8: shares of the 8 x 8 x 8 cells of RGB, (512,) float32."""
    counts = np.bincount((rgb.reshape(-1, 3) >> 5) @ np.array([64, 8, 1]), minlength=512).astype(np.float32)
    return counts / counts.sum()


def tile_windows(height: int, width: int, tile: int, stride: int) -> Iterator[tuple[int, int, int, int]]:
    """Windows (col_off, row_off, w, h) of `tile` pixels a side, row by row, that cover the whole: the last of a row
    or column is shifted inside. A side shorter than `tile` gives one window of that side."""
    if not 1 <= stride <= tile:
        raise InputError(f"tile={tile}, stride={stride}; expected 1 <= stride <= tile, or pixels would be left out")

    def offsets(length):
        last = max(length - tile, 0)
        return [*range(0, last, stride), last]

    for row in offsets(height):
        for col in offsets(width):
            yield col, row, min(tile, width), min(tile, height)


@contextlib.contextmanager
def opened(path, settings: ImageSettings) -> Iterator[Callable[..., Picture]]:
    """Gives a function of a window (None: the whole) for its picture; all have one stretch. Of a raster one window is in memory
    at a time, and the blocks that GDAL keeps decoded while the file is open; a photograph is decoded once, within
    `settings.max_pixels`. Raises ImageError, and so does the function."""
    with _open(path, settings) as scene:
        yield lambda window: _read(scene, settings, window, None)
