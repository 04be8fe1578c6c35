"""``python -m protoclip.openclip``."""

import sys

from protoclip.openclip.command import main

if __name__ == "__main__":
    sys.exit(main())
