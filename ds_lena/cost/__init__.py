"""What LENA adds to a training step, on paper: bytes, collectives, passes over memory, calls, and seconds from these.

`python -m ds_lena.cost --params 70e9 --ranks 1024 --stage 3` prints it; `docs/cost-model.md` has the equations.
Nothing here is used in training; of training only the table of update rules is used.
"""

from .job import Job
from .machines import MACHINES, Machine
from .model import Cost, estimate

__all__ = ["MACHINES", "Cost", "Job", "Machine", "estimate"]
