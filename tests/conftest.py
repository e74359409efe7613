"""What holds for every test: graphs that are traced are kept in build/, so that a checkout traces each only once.

Tests of the tracing itself make exporters without a cache, and trace.
"""

import os
from pathlib import Path

# Not the user's own: its newest graphs would be those of toys. Processes that tests start have it too.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parent.parent / "build" / "cache")
