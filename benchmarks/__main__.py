"""`python benchmarks`, which `make bench` calls."""

import sys

from bench import main

sys.exit(main())
