"""`python -m certiq.model.loaders`."""

import sys

from certiq.model.loaders.cli import main

sys.exit(main())
