"""`python -m run_experiments`."""

import sys

from smoothquant.cli.console import prepare_streams

from .run_experiments import main

prepare_streams()
sys.exit(main())
