"""The fuzzers lie beside their tests. `soak.py` imports them as well, so this folder is where Python finds them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
