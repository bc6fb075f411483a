"""`python benchmarks`. The processes that it starts import this file, so they get nothing else."""

import sys

if __name__ == "__main__":
    from bench import main

    sys.exit(main())
