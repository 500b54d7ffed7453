"""To be imported before any kernel, here and in processes that tests start: nothing may be installed on the machine."""

from importlib.util import find_spec
from pathlib import Path

import fused_adamp

# Only an installation puts kernels/ inside the package (pyproject.toml, package-dir).
if find_spec("fused_adamp.kernels") is None:
    fused_adamp.__path__.append(str(Path(__file__).parents[2]))
