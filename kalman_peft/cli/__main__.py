"""`python -m kalman_peft.cli`, as accelerate's launcher calls it."""

import sys

from . import main


sys.exit(main())
