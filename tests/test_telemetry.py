"""Nothing about the use of a model is noted for, or sent to, anybody."""

import os
import subprocess
import sys

from tests.test_runtime import State, Toy, picture, png

ANSWER = """
import sys
from pathlib import Path
from exporter.runtime import Classifier
Classifier(Path(sys.argv[1])).classify([Path(sys.argv[2]).read_bytes()])
"""


def test_answering_leaves_nothing_in_the_home_of_the_user(tmp_path):
    # given a release, and a home in which onnxruntime would keep an identifier and what it has not sent yet
    state = State(tmp_path / "state")
    state.commit(Toy(3, seed=1))
    (tmp_path / "photo.png").write_bytes(png(picture(0)))
    home = tmp_path / "home"
    home.mkdir()
    env = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    env |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}

    # when
    subprocess.run([sys.executable, "-c", ANSWER, state.path, tmp_path / "photo.png"], env=env, check=True, timeout=60)

    # then
    assert list(home.iterdir()) == []
