"""The bundle's program: `keyturn`."""

import sys

from agent.__main__ import main

sys.exit(main())
