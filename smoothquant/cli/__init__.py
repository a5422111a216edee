"""The command line, `smoothquant <verb>`."""

from .commands import app as app
from .commands import main as main
