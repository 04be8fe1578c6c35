"""``python -m benchmarks.study``."""

import sys

from benchmarks.study.protocol import main

sys.exit(main())
