"""``python -m protoclip.kernels.compile_report``."""

import sys

from protoclip.kernels.compile_report.report import main

if __name__ == "__main__":
    sys.exit(main())
