"""What an Accept header is answered with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scoreray.sampling.service.answers import MEDIA, choose_media

ACCEPTED = {
    "application/json": [
        None,
        "",
        "*/*",
        "text/html",
        "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
        "application/json, image/*;q=0.9",
        "image/png;q=0, */*",
        "application/json, image/png",
        "application/*",
        "image/png;q=0",
        "image/png;q=nan",
        "image/png;q=-1",
    ],
    "image/png": [
        "image/*",
        "IMAGE/PNG",
        "image/webp,image/*",
        "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8",
        "application/json;q=0.5, image/png",
        "application/json;q=0.5, image/*;q=0.6",
        "*/*, image/png",
        "image/png, */*",
        "*/*, application/json;q=0.1",
        "application/json;q=0, image/*",
        "image/png, application/json",
        "image/png;q=x",
        "image/png;level=1;q=0.3, application/json;q=0.2",
        "image/*;q=1e9, image/png;q=0.1",
    ],
    "application/x-npz": [
        "application/x-npz",
        "*/*;q=0.1, application/x-npz;q=0.2",
        "application/*, application/json;q=0",
    ],
}


@pytest.mark.parametrize(("media", "accept"), [(media, one) for media, those in ACCEPTED.items() for one in those])
def test_accept_is_read_as_http_says(media: str, accept: str | None) -> None:
    """RFC 9110, 12.5.1: the most specific range that fits says how much a medium is wanted."""
    assert choose_media(accept) == media


@given(st.text(max_size=60) | st.text("imageplctonjs/*;q=0.5, ", max_size=60))
def test_any_accept_is_some_medium(accept: str) -> None:
    assert choose_media(accept) in MEDIA
