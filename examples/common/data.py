"""The data of the examples: digits, pairs of digits, photographs, prices. What ships with scikit-learn, or your own
files."""

import csv
import gzip
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


class DataError(SystemExit):
    """A file is missing or damaged. Uncaught, it ends the program with its one sentence instead of a traceback."""


# ---------------------------------------------------------------------------------------------------------------------
# Digits
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, size, size) in [0, 1] and digits (N,), split into those to learn from and those to judge by."""

    train_images: Tensor
    train_digits: Tensor
    test_images: Tensor
    test_digits: Tensor


def scaled_digits(size: int = 28) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 handwritten digits, 8x8 scaled to size x size: images (1797, 1, size, size) in [0, 1], digits
    (1797,)."""
    from sklearn.datasets import load_digits  # heavy to import, and not needed where the data comes from files

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    return F.interpolate(images, size=(size, size), mode="bilinear"), torch.from_numpy(data.target).long()


def load_digits(mnist: Path | None, size: int) -> Digits:
    """MNIST from its folder, or without one scikit-learn's digits, of which 500 are kept for the test."""
    if mnist is not None:
        return _resized(read_mnist(mnist), size)
    images, digits = scaled_digits(size)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))  # one split for all seeds
    train, test = order[:-500], order[-500:]
    return Digits(images[train], digits[train], images[test], digits[test])


def _resized(digits: Digits, size: int) -> Digits:
    if digits.train_images.shape[-1] == size:
        return digits
    train, test = (
        F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        for images in (digits.train_images, digits.test_images)
    )
    return Digits(train, digits.train_digits, test, digits.test_digits)


def read_mnist(folder: Path) -> Digits:
    """The four IDX files of MNIST, as published or unpacked."""
    parts = []
    for split in ("train", "t10k"):
        images = read_idx(_find(folder, f"{split}-images-idx3-ubyte"))
        digits = read_idx(_find(folder, f"{split}-labels-idx1-ubyte"))
        if images.dim() != 3 or digits.dim() != 1 or len(images) != len(digits):
            raise DataError(
                f"{folder}: the {split} files do not belong together: images {list(images.shape)}, "
                f"labels {list(digits.shape)}"
            )
        parts += [images.unsqueeze(1).float() / 255, digits.long()]
    return Digits(*parts)


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise DataError(f"{folder} holds neither {name} nor {name}.gz")


def read_idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes, gzipped or not, as a uint8 tensor.

    Two zero bytes, the element type (8: unsigned byte), the number of dimensions, each size as a big-endian 32-bit
    number, the data.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an IDX file of unsigned bytes: it begins with {content[:4].hex() or 'nothing'}")
    start = 4 + 4 * content[3]
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) != start + math.prod(sizes):
        raise DataError(
            f"{path} is damaged: for {sizes} it should have {start + math.prod(sizes)} bytes, it has {len(content)}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(sizes)


def digit_pairs(images: Tensor, digits: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n coin flips. Heads (label 1): a zero and another digit, added pixel by pixel; tails (label 0): two others."""

    def draw(candidates: Tensor) -> Tensor:
        return images[candidates[torch.randint(len(candidates), (n,), generator=generator)]]

    zeros, others = (digits == 0).nonzero().squeeze(1), (digits != 0).nonzero().squeeze(1)
    labels = torch.randint(2, (n,), generator=generator)
    second = torch.where(labels.view(-1, 1, 1, 1) == 1, draw(zeros), draw(others))
    return draw(others) + second, labels


# ---------------------------------------------------------------------------------------------------------------------
# Photographs, and digits in front of them
# ---------------------------------------------------------------------------------------------------------------------

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def load_photos(source: str | None) -> list[Tensor]:
    """The pictures of a folder; `scikit-image`: those of its wheel and scikit-learn's two; None: scikit-learn's two.

    (3, height, width) each, in [0, 1].
    """
    if source is None:
        return [_as_photo(picture) for picture in _sklearn_pictures()]
    if source == "scikit-image":
        return [_as_photo(picture) for picture in [*_sklearn_pictures(), *_skimage_pictures()]]
    folder = Path(source)
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in PICTURES)
    if not paths:
        raise DataError(f"{folder} holds no pictures ({', '.join(sorted(PICTURES))})")
    photos = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                photos.append(_as_photo(np.array(picture.convert("RGB"))))
        except OSError as error:
            raise DataError(f"{path} is not a readable picture: {error}") from error
    return photos


def _as_photo(picture: np.ndarray) -> Tensor:
    return torch.tensor(picture).permute(2, 0, 1).float() / 255


def _sklearn_pictures() -> list[np.ndarray]:
    from sklearn.datasets import (
        load_sample_images,
    )  # heavy to import, and not needed where the photographs come from a folder

    return load_sample_images().images


def _skimage_pictures() -> list[np.ndarray]:
    try:
        from skimage import data as pictures
    except ImportError as error:
        raise DataError(
            "--photos scikit-image takes the photographs that come with scikit-image: pip install scikit-image"
        ) from error
    names = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry")
    return [*(getattr(pictures, name)() for name in names), pictures.stereo_motorcycle()[0]]


@dataclass(frozen=True)
class Blended:
    """Images in front of photographs by MNIST-M's recipe: the absolute difference of each and one crop, the same for
    all channels.

    Where the crops lie is drawn once; `blended[rows]` makes those rows, (n, 3, size, size), so that the whole set is
    never in memory.
    """

    images: Tensor  # (N, 1, size, size): image i serves rows i, N + i, 2 N + i, ...
    pixels: Tensor  # (3, all pixels of all photos): row by row, one photo after the other
    corners: Tensor  # (rows,): where in `pixels` the crop begins
    widths: Tensor  # (rows,): of the photo it is from

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return (self.backgrounds(rows) - self.images[rows % len(self.images)]).abs_()

    def backgrounds(self, rows: Tensor) -> Tensor:
        """The crops alone, (n, 3, size, size)."""
        size = torch.arange(self.images.shape[-1], device=rows.device)
        at = self.corners[rows, None, None] + self.widths[rows, None, None] * size[:, None] + size
        return self.pixels[:, at].transpose(0, 1)

    def to(self, device: str) -> "Blended":
        return Blended(*(tensor.to(device) for tensor in vars(self).values()))


def blend(images: Tensor, photos: list[Tensor], generator: torch.Generator, crops: int = 1) -> Blended:
    """Each image (1, size, size) in front of `crops` random crops of random photos (3, height, width)."""
    size, rows = images.shape[-1], crops * len(images)
    if small := [list(photo.shape[1:]) for photo in photos if min(photo.shape[1:]) < size]:
        raise DataError(f"a photo of {small[0]} pixels is too small: crops are {size} x {size}")
    heights, widths = torch.tensor([photo.shape[1:] for photo in photos]).T
    areas = heights * widths
    which = torch.randint(len(photos), (rows,), generator=generator)
    # A double in [0, 1) times the number of places, rounded down: every place of every photo is as likely as the
    # others.
    top, left = (
        (torch.rand(rows, generator=generator, dtype=torch.float64) * (extent[which] - size + 1)).long()
        for extent in (heights, widths)
    )
    corners = (areas.cumsum(0) - areas)[which] + top * widths[which] + left
    return Blended(images, torch.cat([photo.flatten(1) for photo in photos], 1), corners, widths[which])


# ---------------------------------------------------------------------------------------------------------------------
# Prices
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prices:
    """Closing prices (dates, tickers), as doubles."""

    dates: list[str]
    tickers: list[str]
    closes: Tensor

    def returns(self) -> Tensor:
        """Daily returns (dates - 1, tickers)."""
        return (self.closes[1:] / self.closes[:-1] - 1).float()


def read_prices(path: Path, at_least: int = 2) -> Prices:
    """Prices from a CSV, gzipped or not: columns date, ticker and close, or a date column and one column a ticker.

    Dates are sorted as text (so write them as 2024-01-31); tickers without a price on every date are left out.
    """
    prices: dict[str, dict[str, float]] = defaultdict(dict)
    try:
        with _opened(path) as file:
            rows = csv.reader(file)
            header = [name.strip() for name in next(rows, [])]
            column = {name.lower(): i for i, name in enumerate(header)}
            if "date" not in column:
                raise DataError(f"{path} has no column date; its first line is {header}")
            long = {"ticker", "close"} & column.keys()
            if len(long) == 1:
                raise DataError(
                    f"{path} has a column {long.pop()} but not ticker and close both; its first line is {header}"
                )
            for row in rows:
                if not row:
                    continue  # an empty line, as at the end of many exports
                if len(row) != len(header):
                    raise DataError(
                        f"{path}, line {rows.line_num}: {len(row)} values, but the first line has {len(header)}"
                    )
                date = row[column["date"]]
                if long:
                    cells = [(row[column["ticker"]], row[column["close"]])]
                else:
                    cells = [
                        (name, text)
                        for name, text in zip(header, row, strict=True)
                        if name.lower() != "date" and text.strip()
                    ]
                for ticker, text in cells:
                    if date in prices[ticker]:
                        raise DataError(f"{path}, line {rows.line_num}: a second price of {ticker} on {date}")
                    prices[ticker][date] = _price(text, ticker, path, rows.line_num)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    dates = sorted({date for series in prices.values() for date in series})
    complete = {
        ticker: [series[date] for date in dates] for ticker, series in prices.items() if len(series) == len(dates)
    }
    if len(complete) < at_least or len(dates) < 2:
        raise DataError(
            f"{path} has {len(complete)} tickers with a price on all of its {len(dates)} dates; "
            f"at least {at_least} ticker{'s' * (at_least > 1)} and 2 dates are needed"
        )
    return Prices(dates, list(complete), torch.tensor(list(complete.values()), dtype=torch.float64).T)


def _opened(path: Path) -> TextIO:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    # utf-8-sig: spreadsheets begin their exports with a byte order mark, which is not part of the first column's name.
    return (
        gzip.open(path, "rt", encoding="utf-8-sig", newline="")
        if zipped
        else path.open(encoding="utf-8-sig", newline="")
    )


def _price(text: str, ticker: str, path: Path, line: int) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 < price < math.inf:
        raise DataError(f"{path}, line {line}: the price of {ticker} must be a positive number, got {text!r}")
    return price


def read_index(path: Path, dates: list[str]) -> Tensor:
    """The market's own daily returns (dates - 1,), from a CSV with a date column and one series that has all of these
    dates."""
    prices = read_prices(path, at_least=1)
    if len(prices.tickers) > 1:
        raise DataError(
            f"{path} has {len(prices.tickers)} series ({', '.join(prices.tickers[:3])}, ...); the market's must be the "
            "only one"
        )
    close = dict(zip(prices.dates, prices.closes[:, 0].tolist(), strict=True))
    if missing := [date for date in dates if date not in close]:
        raise DataError(
            f"{path} has no price on {len(missing)} of the stocks' {len(dates)} dates, the first {missing[0]}"
        )
    return Prices(
        dates, prices.tickers, torch.tensor([[close[date]] for date in dates], dtype=torch.float64)
    ).returns()[:, 0]
