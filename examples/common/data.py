"""The data of the examples: digits, pairs of digits, photographs, prices. What ships with scikit-learn, or your own files."""

import csv
import gzip
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
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
    """scikit-learn's 1797 handwritten digits, 8x8 scaled to size x size: images (1797, 1, size, size) in [0, 1], digits (1797,)."""
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
                f"{folder}: the {split} files do not belong together: images {list(images.shape)}, labels {list(digits.shape)}"
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

    Two zero bytes, the element type (8: unsigned byte), the number of dimensions, each size as a big-endian 32-bit number, the data.
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
        raise DataError(f"{path} is damaged: for {sizes} it should have {start + math.prod(sizes)} bytes, it has {len(content)}")
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


def load_photos(folder: Path | None) -> list[Tensor]:
    """The pictures of a folder, or without one scikit-learn's two sample photographs: (3, height, width) each, in [0, 1]."""
    if folder is None:
        from sklearn.datasets import load_sample_images

        return [torch.tensor(picture).permute(2, 0, 1).float() / 255 for picture in load_sample_images().images]
    import numpy as np
    from PIL import Image

    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in PICTURES)
    if not paths:
        raise DataError(f"{folder} holds no pictures ({', '.join(sorted(PICTURES))})")
    photos = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                photos.append(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255)
        except OSError as error:
            raise DataError(f"{path} is not a readable picture: {error}") from error
    return photos


def blend(images: Tensor, photos: list[Tensor], generator: torch.Generator) -> Tensor:
    """MNIST-M's recipe: the absolute difference of each image (1, size, size) and random crops of random photos, one per channel.

    Returns (N, 3, size, size).
    """
    size = images.shape[-1]
    if small := [list(photo.shape[1:]) for photo in photos if min(photo.shape[1:]) < size]:
        raise DataError(f"a photo of {small[0]} pixels is too small: crops are {size} x {size}")
    blended = torch.empty(len(images), 3, size, size)
    for image, channels in zip(images, blended, strict=True):
        for channel, out in enumerate(channels):
            photo = photos[int(torch.randint(len(photos), (), generator=generator))][channel]
            top, left = (int(torch.randint(extent - size + 1, (), generator=generator)) for extent in photo.shape)
            torch.sub(photo[top : top + size, left : left + size], image[0], out=out).abs_()
    return blended


# ---------------------------------------------------------------------------------------------------------------------
# Prices
# ---------------------------------------------------------------------------------------------------------------------


def read_returns(path: Path) -> Tensor:
    """Daily returns (dates - 1, tickers) from a CSV with the columns date, ticker and close.

    Dates are sorted as text (so write them as 2024-01-31); tickers without a price on every date are left out.
    """
    prices: dict[str, dict[str, float]] = defaultdict(dict)
    try:
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            if missing := {"date", "ticker", "close"} - set(rows.fieldnames or ()):
                raise DataError(f"{path} has no column {', '.join(sorted(missing))}; its first line is {rows.fieldnames}")
            for row in rows:
                prices[row["ticker"]][row["date"]] = _price(row["close"], path, rows.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    dates = sorted({date for series in prices.values() for date in series})
    complete = [[series[date] for date in dates] for series in prices.values() if len(series) == len(dates)]
    if len(complete) < 2 or len(dates) < 2:
        raise DataError(f"{path} has {len(complete)} tickers with a price on all of its {len(dates)} dates; at least 2 of each are needed")
    closes = torch.tensor(complete, dtype=torch.float64).T
    return (closes[1:] / closes[:-1] - 1).float()


def _price(text: str | None, path: Path, line: int) -> float:
    try:
        price = float(text or "")
    except ValueError:
        price = math.nan
    if not 0 < price < math.inf:
        raise DataError(f"{path}, line {line}: close must be a positive number, got {text!r}")
    return price
