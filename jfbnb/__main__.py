"""`python -m jfbnb` runs the command `jfbnb`."""

import sys

from jfbnb.run.command import main

sys.exit(main())
