"""`python -m palindrome COMMAND --flags`, the same as `palindrome COMMAND --flags`."""

import sys

from palindrome.jobs.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
