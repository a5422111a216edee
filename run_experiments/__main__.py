"""`python -m run_experiments`."""

import sys

from .run_experiments import main

sys.exit(main())
