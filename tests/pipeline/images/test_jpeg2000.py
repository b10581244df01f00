"""JPEG 2000 codestreams that lack tiles."""

import io

import numpy as np
import pytest
from PIL import Image

from palindrome.pipeline.images.decode import Preprocess, Rejected, decode

EOC = b"\xff\xd9"


@pytest.fixture(scope="module")
def data(pngs, corpus):
    image = Image.open(io.BytesIO(pngs[1])).convert("RGB").resize((48, 48))
    return corpus.encoded(image, "JPEG2000", tile_size=(16, 16))


def test_tiles_are_all_there_or_it_is_truncated(data):
    np.testing.assert_array_equal(decode(data, Preprocess(48))[0], np.asarray(Image.open(io.BytesIO(data))))
    starts = [at for at in range(len(data)) if data[at : at + 4] == b"\xff\x90\0\x0a"]
    assert len(starts) == 9
    for start in starts[1:]:
        for end in (EOC, b""):
            with pytest.raises(Rejected) as info:
                decode(data[:start] + end, Preprocess(48))
            assert info.value.reason == "truncated"
    cut = data[: starts[3]] + data[starts[4] :]  # one in the middle
    with pytest.raises(Rejected):
        decode(cut, Preprocess(48))
    assert decode(data[: starts[8]] + EOC, Preprocess(48, truncated="keep"))[0].shape == (48, 48, 3)


def test_wherever_it_breaks_off_it_is_another_picture_never(data):
    whole = decode(data, Preprocess(48))[0]
    for length in range(100, len(data), 61):
        try:
            found = decode(data[:length], Preprocess(48))[0]
        except Rejected:
            continue
        np.testing.assert_array_equal(found, whole)
