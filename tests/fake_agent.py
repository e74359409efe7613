"""`python -m tests.fake_agent STATE ARCHIVE [KEY=VALUE...]`: the whole agent as a process, with a FakeLearner."""

import logging
import sys
import threading

from agent.config import load
from agent.process import stop_on_signals
from agent.run import run_agent
from tests.fakes import FAKE_LEARNER

if __name__ == "__main__":
    state, archive, *others = sys.argv[1:]
    logging.basicConfig(level="INFO")
    settings = dict(setting.split("=", 1) for setting in others)
    config = load(None, {}, {"state.path": state, "source.archive.path": archive, "http.port": "0", **settings})
    stop = threading.Event()
    with stop_on_signals(stop):
        run_agent(config, stop, learner=FAKE_LEARNER)
    print("torch imported" if "torch" in sys.modules else "no torch")
