"""ds_lena: LENA (WWW 2022), layer-wise learning rates from gradient variance, as an optimizer for DeepSpeed.

`import ds_lena` is all that a script needs for `"optimizer": {"type": "LENA", "params": {…}}`.
"""

from ._registration import register
from .errors import ConfigError, LenaError, StateError, UnsupportedError
from .optimizer import LENA
from .reporting import report
from .version import __version__

__all__ = ["LENA", "ConfigError", "LenaError", "StateError", "UnsupportedError", "__version__", "report"]

register()
