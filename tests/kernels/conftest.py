"""Triton decides when it is imported whether kernels are compiled or interpreted: what needs the interpreter is
collected only in the process that `test_interpreter.py` starts for it."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*"]
