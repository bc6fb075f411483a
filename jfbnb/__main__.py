"""`python -m jfbnb` is the command `jfbnb`."""

import sys

from jfbnb.suite.cli import main

sys.exit(main())
