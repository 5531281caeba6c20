"""Optimizers for large batches compared: each one tuned with the same number of trials, on real data.

    python -m examples.compare run        # go on with the studies of studies.yaml, on all cores
    python -m examples.compare report     # tables and pictures from the results so far

| file                | what it does                                                                      |
|---------------------|-----------------------------------------------------------------------------------|
| `studies.yaml`      | what is compared: tasks, methods with their search spaces, studies                |
| `plan.py`           | reads it, checked                                                                 |
| `language.py`       | a task: data in three splits, loss                                                |
| `models.py`         | the language models                                                               |
| `images.py`         | another: Fashion-MNIST                                                            |
| `order.py`          | which rows make up a micro-batch                                                  |
| `optimizers.py`     | a method's settings -> optimizers, schedule, batches                              |
| `muon.py`           | Muon, alone and with LENA's factors                                               |
| `preconditioned.py` | an experiment with LENA's statistics                                              |
| `training.py`       | one run -> one record                                                             |
| `search.py`         | which settings to try next (optuna)                                               |
| `jobs.py`           | the runs that the studies ask for, and which of them can start                    |
| `queue.py`          | runs them on all cores, and keeps their records                                   |
| `records.py`        | records as JSON lines, one file per study                                         |
| `summary.py`        | from records to numbers: spread over seeds, updates to a target                   |
| `tables.py`         | `results/tables.md`                                                               |
| `pictures.py`       | `results/*.png`                                                                   |
"""
