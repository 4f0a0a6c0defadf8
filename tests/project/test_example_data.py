"""The examples' data: what the loaders read from files, and what they say of a file that is missing or damaged."""

import gzip
import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # scripts, not part of the package

from common import data  # noqa: E402

pytestmark = pytest.mark.once


def sentence(error: pytest.ExceptionInfo) -> str:
    """What the user sees: one line, and a program that ends with it."""
    assert isinstance(error.value, SystemExit)
    text = str(error.value)
    assert "\n" not in text
    return text


# --- digits
# ----------------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim])
        + b"".join(n.to_bytes(4, "big") for n in array.shape)
        + array.astype(np.uint8).tobytes()
    )


def write_mnist(folder: Path, compressed: bool, train: int = 7, test: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", train), ("t10k", test)):
        arrays[f"{split}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28))
        arrays[f"{split}-labels-idx1-ubyte"] = rng.integers(0, 10, n)
    for name, array in arrays.items():
        content = idx(array)
        (folder / (name + ".gz" * compressed)).write_bytes(gzip.compress(content) if compressed else content)
    return arrays


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
def test_mnist_is_read_as_published_or_unpacked(tmp_path, compressed):
    arrays = write_mnist(tmp_path, compressed)
    digits = data.load_digits(tmp_path, 28)
    assert digits.train_images.shape == (7, 1, 28, 28) and digits.test_images.shape == (3, 1, 28, 28)
    expected = torch.from_numpy(arrays["train-images-idx3-ubyte"]).float().unsqueeze(1) / 255
    torch.testing.assert_close(digits.train_images, expected)
    assert digits.test_digits.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()
    assert data.load_digits(tmp_path, 16).train_images.shape == (7, 1, 16, 16)


def test_a_missing_mnist_file_is_named(tmp_path):
    write_mnist(tmp_path, compressed=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(data.DataError) as error:
        data.read_mnist(tmp_path)
    assert sentence(error) == f"{tmp_path} holds neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is not an IDX file of unsigned bytes: it begins with nothing"),
        (b"\x89PNG", "is not an IDX file of unsigned bytes: it begins with 89504e47"),
        (idx(np.zeros((2, 3)))[:-1], "is damaged: for [2, 3] it should have 18 bytes, it has 17"),
        (idx(np.zeros((2, 3)))[:7], "is damaged"),
        (
            gzip.compress(idx(np.zeros((200, 3))))[:-9],
            "cannot be read: Compressed file ended before the end-of-stream marker",
        ),
        (gzip.compress(b"text"), "is not an IDX file"),
    ],
    ids=["empty", "a picture", "cut short", "cut in the sizes", "gzip cut short", "gzip of something else"],
)
def test_a_damaged_idx_file_is_told(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(data.DataError) as error:
        data.read_idx(path)
    assert str(path) in sentence(error) and message in sentence(error)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    write_mnist(tmp_path, compressed=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(6)))
    with pytest.raises(data.DataError, match="the train files do not belong together"):
        data.read_mnist(tmp_path)


def test_the_shipped_digits_are_split_without_overlap():
    digits = data.load_digits(None, 28)
    assert len(digits.train_digits) == 1297 and len(digits.test_digits) == 500
    assert 0 <= digits.train_images.min() and digits.train_images.max() <= 1
    train, test = (
        {tuple(image.flatten().tolist()) for image in images} for images in (digits.train_images, digits.test_images)
    )
    assert not train & test


def test_pairs_are_a_zero_and_another_or_two_others():
    images = torch.arange(10.0).view(10, 1, 1, 1)  # every digit's picture is its value
    digits = torch.arange(10)
    pairs, labels = data.digit_pairs(images, digits, 500, torch.Generator().manual_seed(0))
    assert 200 < labels.sum() < 300
    sums = pairs.flatten()
    assert set(sums[labels == 1].tolist()) <= set(range(1, 10))  # 0 + another
    assert set(sums[labels == 0].tolist()) <= set(range(2, 19))
    again, _ = data.digit_pairs(images, digits, 500, torch.Generator().manual_seed(0))
    assert torch.equal(pairs, again)


# --- photographs
# -----------------------------------------------------------------------------------------------------------


def test_pictures_are_read_as_rgb_in_the_order_of_their_names(tmp_path):
    Image.fromarray(np.full((9, 12), 51, dtype=np.uint8)).save(tmp_path / "b.png")
    Image.fromarray(np.full((8, 10, 3), (255, 0, 102), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    first, second = data.load_photos(str(tmp_path))
    assert first.shape == (3, 8, 10) and second.shape == (3, 9, 12)
    torch.testing.assert_close(first[:, 0, 0], torch.tensor([1.0, 0.0, 0.4]))
    torch.testing.assert_close(second[:, 0, 0], torch.full((3,), 0.2))


def test_a_folder_without_pictures_and_a_damaged_picture_are_told(tmp_path):
    with pytest.raises(data.DataError, match="holds no pictures"):
        data.load_photos(str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"\x89PNG and then nothing of the kind")
    with pytest.raises(data.DataError) as error:
        data.load_photos(str(tmp_path))
    assert f"{tmp_path / 'a.png'} is not a readable picture" in sentence(error)


def test_scikit_images_photographs_come_beside_scikit_learns():
    pytest.importorskip("skimage", reason="scikit-image, whose wheel holds the photographs, is not installed")
    photos = data.load_photos("scikit-image")
    assert len(photos) == 8 and all(photo.shape[0] == 3 and min(photo.shape[1:]) >= 300 for photo in photos)
    assert all(0 <= photo.min() and 0.5 < photo.max() <= 1 for photo in photos)
    assert torch.equal(photos[1], data.load_photos(None)[1])


def test_a_missing_scikit_image_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(data.DataError) as error:
        data.load_photos("scikit-image")
    assert "pip install scikit-image" in sentence(error)


def test_a_blend_is_the_absolute_difference_to_one_crop_the_same_for_all_channels():
    photos = [torch.rand(3, 20, 30), torch.rand(3, 9, 9)]
    images = torch.rand(20, 1, 8, 8)
    blended = data.blend(images, photos, torch.Generator().manual_seed(0), crops=2)
    assert len(blended) == 40
    found = set()
    for row, picture in enumerate(blended[torch.arange(40)]):
        hits = []
        for which, photo in enumerate(photos):
            crops = photo.unfold(1, 8, 1).unfold(2, 8, 1).flatten(1, 2)  # (3, places, 8, 8)
            same = torch.isclose((crops - images[row % 20]).abs(), picture[:, None]).all((0, 2, 3))
            hits += [(which, place) for place in same.nonzero().flatten().tolist()]
        assert len(hits) == 1
        found |= set(hits)
    assert {which for which, _ in found} == {0, 1} and len(found) > 15  # the small photo has four places
    assert torch.equal(blended[torch.tensor([33, 2])], blended[torch.arange(40)][[33, 2]])


def test_a_blends_crops_reach_all_corners_and_stay_inside():
    photo = torch.arange(12.0).view(1, 3, 4).expand(3, -1, -1).contiguous()
    pictures = data.blend(torch.zeros(1, 1, 2, 2), [photo], torch.Generator().manual_seed(0), crops=200)[
        torch.arange(200)
    ]
    assert set(pictures[:, 0, 0, 0].tolist()) == {0, 1, 2, 4, 5, 6}  # the upper left pixels of all 2 x 3 places
    assert torch.equal(pictures[:, 0] - pictures[:, 0, :1, :1], torch.tensor([[0.0, 1], [4, 5]]).expand(200, 2, 2))


def test_a_blend_of_many_images_stays_small():
    images = torch.rand(50, 1, 28, 28)
    blended = data.blend(images, [torch.rand(3, 60, 60)], torch.Generator(), crops=1000)
    held = sum(tensor.untyped_storage().nbytes() for tensor in vars(blended).values())
    assert held < 50 * 1000 * 3 * 28 * 28 / 10  # a tenth of what its 50 000 pictures would take as bytes


def test_photos_smaller_than_a_crop_are_refused():
    with pytest.raises(data.DataError, match=re.escape("a photo of [5, 30] pixels is too small: crops are 8 x 8")):
        data.blend(torch.rand(1, 1, 8, 8), [torch.rand(3, 5, 30)], torch.Generator())


# --- prices
# ----------------------------------------------------------------------------------------------------------------


def write_csv(folder: Path, text: str, name: str = "prices.csv") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


LONG = """date,ticker,close,volume
2024-01-03,A,121,1
2024-01-01,A,100,1
2024-01-02,A,110,1
2024-01-01,B,50,1
2024-01-02,B,25,1
2024-01-03,B,50,1
2024-01-01,C,7,1
"""
WIDE = """Date,A,B,C
2024-01-03,121,50,
2024-01-01,100,50,7
2024-01-02,110,25,
"""


@pytest.mark.parametrize(
    "text",
    [LONG, WIDE, "\ufeff" + WIDE, WIDE.replace("\n", "\r\n") + "\r\n"],
    ids=["long", "wide", "wide, with a mark", "wide, from Windows"],
)
@pytest.mark.parametrize("name", ["prices.csv", "prices.csv.gz"])
def test_prices_are_those_of_the_tickers_with_every_date_in_the_order_of_dates(tmp_path, text, name):
    prices = data.read_prices(write_csv(tmp_path, text, name))
    assert prices.dates == ["2024-01-01", "2024-01-02", "2024-01-03"] and prices.tickers == ["A", "B"]
    torch.testing.assert_close(prices.returns(), torch.tensor([[0.1, -0.5], [0.1, 1.0]]))


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "date,close\n2024-01-01,5\n",
            "has a column close but not ticker and close both; its first line is ['date', 'close']",
        ),
        ("", "has no column date; its first line is []"),
        ("day,A,B\n", "has no column date; its first line is ['day', 'A', 'B']"),
        (
            "date,ticker,close\n2024-01-01,A,5\n2024-01-02,A,x\n",
            ", line 3: the price of A must be a positive number, got 'x'",
        ),
        ("date,ticker,close\n2024-01-01,A,-5\n", ", line 2: the price of A must be a positive number, got '-5'"),
        ("date,ticker,close\n2024-01-01,A,\n", ", line 2: the price of A must be a positive number, got ''"),
        ("date,ticker,close\n2024-01-01,A\n", ", line 2: 2 values, but the first line has 3"),
        ("date,ticker,close\n2024-01-01,A,5\n2024-01-01,A,6\n", ", line 3: a second price of A on 2024-01-01"),
        (
            "date,ticker,close\n2024-01-01,A,5\n2024-01-02,A,6\n",
            "has 1 tickers with a price on all of its 2 dates; at least 2 tickers and 2 dates",
        ),
        ("Date,A,B\n2024-01-01,5,0\n", ", line 2: the price of B must be a positive number, got '0'"),
        ("Date,A,B\n2024-01-01,5,nan\n", ", line 2: the price of B must be a positive number, got 'nan'"),
        ("Date,A,B\n2024-01-01,5,6\n2024-01-01,5,6\n", ", line 3: a second price of A on 2024-01-01"),
        ("Date,A,B\n2024-01-01,5,6\n", "has 2 tickers with a price on all of its 1 dates"),
    ],
    ids=lambda value: None,
)
def test_a_csv_that_cannot_serve_is_told(tmp_path, text, message):
    path = write_csv(tmp_path, text)
    with pytest.raises(data.DataError) as error:
        data.read_prices(path)
    assert sentence(error).startswith(str(path)) and message in sentence(error)


def test_a_csv_that_is_not_there_or_is_no_text_or_is_cut_short_is_told(tmp_path):
    with pytest.raises(data.DataError, match="cannot be read: .*No such file"):
        data.read_prices(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "short.csv.gz").write_bytes(gzip.compress(LONG.encode())[:-9])
    for name in ("binary.csv", "short.csv.gz"):
        with pytest.raises(data.DataError, match="cannot be read") as error:
            data.read_prices(tmp_path / name)
        sentence(error)


def test_the_index_is_matched_to_the_stocks_dates(tmp_path):
    dates = ["2024-01-01", "2024-01-03"]
    index = write_csv(tmp_path, "Date,SP500\n2024-01-03,11\n2024-01-02,99\n2024-01-01,10\n")
    torch.testing.assert_close(data.read_index(index, dates), torch.tensor([0.1]))
    with pytest.raises(data.DataError) as error:
        data.read_index(index, [*dates, "2024-01-04", "2024-01-05"])
    assert sentence(error) == f"{index} has no price on 2 of the stocks' 4 dates, the first 2024-01-04"
    with pytest.raises(data.DataError, match="has 2 series \\(A, B, ...\\); the market's must be the only one"):
        data.read_index(write_csv(tmp_path, WIDE), dates)


def test_the_market_takes_the_index_or_the_mean_of_the_stocks(tmp_path):
    import market

    stocks = write_csv(tmp_path, WIDE)
    index = write_csv(tmp_path, "Date,I\n2024-01-01,10\n2024-01-02,11\n2024-01-03,22\n", "index.csv")
    for given, expected in ((None, [-0.2, 0.55]), (index, [0.1, 1.0])):
        returns, found = market.load_returns(Namespace(csv=stocks, index=given), seed=0)
        assert returns.shape == (2, 2)
        torch.testing.assert_close(found, torch.tensor(expected))


def test_too_few_days_are_told():
    import market

    with pytest.raises(data.DataError, match="749 days of returns are too few: at least 750 are needed"):
        market.samples(torch.rand(749, 4), torch.rand(749))
