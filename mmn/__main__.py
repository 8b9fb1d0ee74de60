"""`python -m mmn` is the command `mmn`."""

import sys

from mmn.cli import main

sys.exit(main())
