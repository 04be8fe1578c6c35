"""``python -m benchmarks.compile_report``."""

import sys

from benchmarks.compile_report.report import main

if __name__ == "__main__":
    sys.exit(main())
