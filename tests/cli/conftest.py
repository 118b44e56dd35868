"""A command line to call, and a run to call it on."""

from pathlib import Path

import pytest
from cli_calls import TRAINING, Ended, call


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script train.py and, in it, the run that ``attnprof run`` made of it."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "train.py").write_text(TRAINING)
    ended = call("run", "--out", "run", "train.py", cwd=folder)
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture(scope="session")
def strange(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A script with options that look like attnprof's, ended with exit code 3."""
    folder = tmp_path_factory.mktemp("strange")
    (folder / "sub").mkdir()
    (folder / "sub" / "show.py").write_text(
        "import json, os, pickle, sys\n"
        "class Local: pass\n"
        "assert isinstance(pickle.loads(pickle.dumps(Local())), Local)\n"
        "print(json.dumps({'name': __name__, 'file': __file__, 'argv': sys.argv,\n"
        "    'path': sys.path[0], 'package': __package__,\n"
        "    'main': sys.modules['__main__'].__file__}))\n"
        "os.chdir('/')\n"
        "import torch\n"
        "kept = torch.ones(256)\n"
        "sys.exit(3)\n"
    )
    ended = call("run", "sub/show.py", "--out", "x", "--help", "--", "-m", cwd=folder)
    return folder, ended
