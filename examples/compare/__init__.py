"""Optimizers for large batches compared: each one tuned with the same number of trials, on real data.

    python -m examples.compare run        # go on with the studies of studies.py, on all cores
    python -m examples.compare report     # tables and pictures from the runs so far

| file                               | what it does                                                                   |
|------------------------------------|--------------------------------------------------------------------------------|
| `studies.py`                       | what is compared: tasks, methods with their search spaces, studies             |
| `plan.py`                          | what a task, a method and a study are                                          |
| `language.py`, `images.py`         | the tasks: a model, data in three splits, a loss; `order.py` shuffles          |
| `optimizers.py`                    | a method's settings -> optimizers, schedule, batches                           |
| `muon.py`, `preconditioned.py`     | Muon, alone and with LENA's factors; an experiment with LENA's statistics      |
| `growing.py`                       | batches that follow the noise: `ds_lena.grow`, and the norm test               |
| `training.py`                      | one run                                                                        |
| `runs.py`                          | what has been run, in optuna's storage; what its trials have chosen            |
| `workers.py`                       | runs what is left, on all cores                                                |
| `tables.py`, `pictures.py`         | `results/tables.md`, `results/*.svg`                                           |
| `front.py`                         | `results/front.md`: updates and loss of batches that follow the noise          |
"""
