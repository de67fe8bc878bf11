"""The old name of tools/bench.py."""

import sys

print("bench.py is now: python -m tools.bench", file=sys.stderr)
raise SystemExit(2)
