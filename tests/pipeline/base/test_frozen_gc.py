"""The collector rests while what lasts is made, and leaves it alone from then on."""

import gc

import pytest

from palindrome.pipeline.base.frozen_gc import frozen_gc


def test_the_collector_rests_within_and_works_after():
    before = gc.get_freeze_count()
    with frozen_gc():
        assert not gc.isenabled()
        kept = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)
    gc.unfreeze()


def test_it_works_again_after_an_error():
    with pytest.raises(ImportError), frozen_gc():
        raise ImportError
    assert gc.isenabled()
    gc.unfreeze()
