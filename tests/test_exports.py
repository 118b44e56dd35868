"""The public names."""

import pytest

import attnprof


def test_every_public_name_can_be_had() -> None:
    assert dir(attnprof) == sorted(attnprof.__all__)
    for name in attnprof.__all__:
        assert getattr(attnprof, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'attnprof' has no attribute 'nonsense'"):
        attnprof.nonsense  # noqa: B018 # reading it is the test
