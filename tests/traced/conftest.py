"""Recorded runs, each read once."""

import zipfile
from functools import cache

import pytest

import attnprof
from attnprof.run import Run
from tests.traced.recordings import RECORDED, Load


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    @cache
    def load_case(case: str) -> Run:
        folder = tmp_path_factory.mktemp(case)
        with zipfile.ZipFile(RECORDED / f"{case}.zip") as archive:
            archive.extractall(folder)
        return attnprof.load(folder)

    return load_case
