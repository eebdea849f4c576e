"""``python -m dph.cli``."""

import sys

from dph.cli.main import main

sys.exit(main())
