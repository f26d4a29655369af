"""python -m certiq.model: the same as certiq-quantize-model."""

import sys

from certiq.model.cli import main

sys.exit(main())
