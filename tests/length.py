"""How long the tests take: in full under --all, else in a short form.

conftest.py sets the variable before pytest imports any test module. Workers and child processes
inherit it.
"""

import os

VARIABLE = "MIXEDQUANT_TEST_ALL"


def in_full():
    """Whether the tests run in full."""
    return bool(os.environ.get(VARIABLE))


def at_length(full, short):
    """`full` under --all, else `short`: a number of cases, a list of parameters."""
    return full if in_full() else short
