"""`python -m tests.checkers FOLDER`: exit code 1, and a line for each violation, when the recorded run broke one."""

import sys

from tests.checkers.folder import main

sys.exit(main(sys.argv[1:]))
