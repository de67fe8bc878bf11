"""The old name of tools/scaling.py."""

import sys

print("scaling.py is now: python -m tools.scaling", file=sys.stderr)
raise SystemExit(2)
