"""`python -m jaxalign COMMAND …`: the `jaxalign` command for a checkout that is not installed.

Python runs exactly this file for `-m jaxalign`, so it must lie beside `__init__.py`.
"""

import sys

from jaxalign.commands.startup.entry import main

sys.exit(main())
