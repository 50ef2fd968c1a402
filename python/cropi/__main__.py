"""``python -m cropi`` is ``cropi``."""

import sys

from cropi.cli import main

sys.exit(main())
