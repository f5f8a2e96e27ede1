"""Sizes as people write them."""

from __future__ import annotations

import pytest

from mergetool.cli.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9),
        ("512MiB", 512 << 20),
        ("1.5 GB", 1_500_000_000),
        ("0.1GiB", 107_374_182),
        ("1tb", 10**12),
        ("3 kB", 3000),
        (" 1234567 ", 1234567),
    ],
)
def test_sizes_are_read(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "5B", "5 G", "-1GB", "1,5GB", "5GBs", "1e9", "٣GB", "9" * 40])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "0GB", "0.1"])
def test_nothing_is_no_size(text):
    with pytest.raises(ValueError, match="positive"):
        parse_size(text)
