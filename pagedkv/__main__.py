"""``python -m pagedkv``: the command line."""

import sys

from pagedkv.cli.main import main

sys.exit(main())
