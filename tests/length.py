"""How long the tests take: in full under --all, else in a short form.

conftest.py sets the variable before it imports any test module. Workers and child processes
inherit it.
"""

import os

VARIABLE = "MIXEDQUANT_TEST_ALL"
ALL = bool(os.environ.get(VARIABLE))


def at_length(full, short):
    """`full` under --all, else `short`: a number of cases, a list of parameters."""
    return full if ALL else short
