"""What is compared. `python -m examples.compare run` works through `STUDIES` from top to bottom.

A copy of this file, changed, is a comparison of your own: `--studies my_studies.py --results my-results`.
"""

from dataclasses import replace

from optuna.distributions import CategoricalDistribution as Choice
from optuna.distributions import FloatDistribution as Float

from examples.compare.images import Images
from examples.compare.language import Language
from examples.compare.plan import Method, Study

# -- tasks -------------------------------------------------------------------------------------------------------------

LM = {"weight_decay": 0.1, "clip": 1.0}
# GPT-2 of 0.24 M parameters on 1.6 M tokens; and with three quarters and one quarter of them.
GPT_DATA = {"vocab_size": 512, "evaluation_blocks": 512}
GPT = Language(name="gpt", architecture="gpt2", **GPT_DATA, micro_batches=6144, evaluations=24, settings=LM)
GPT_SHORT = replace(GPT, name="gpt-short", micro_batches=4608, evaluations=18)
GPT_QUARTER = replace(GPT, name="gpt-quarter", micro_batches=1536, evaluations=6)
# ModernBERT of 0.18 M parameters on 2.1 M bytes, 15% of them predicted.
BERT = Language(name="bert", architecture="modernbert", micro_batches=8192, evaluations=32, settings=LM)
# A Llama of 0.22 M parameters on 1.6 M bytes. No key and no default of LENA was chosen on this one.
LLAMA = Language(name="llama", architecture="llama", micro_batches=6144, evaluations=24, settings=LM)
# A ResNet of 0.08 M parameters, six epochs.
FASHION = Images(name="fashion", micro_batches=9372, evaluations=18, settings={"weight_decay": 0.0005})

# -- methods: name, optimizer, settings, search ------------------------------------------------------------------------
# What is neither set nor searched comes from the single worker: lr, and beta2.

BETA2 = {"beta2": Choice([0.95, 0.99, 0.999])}
LR_POWER, GAIN_POWER = {"lr_power": Float(0.0, 1.0)}, {"gain_power": Float(0.5, 1.0)}
WARMUP, SHORT_WARMUP = {"warmup_fraction": Float(0.02, 0.5)}, {"warmup_fraction": Float(0.01, 0.2)}
MUON_LR = {"muon_lr": Float(0.001, 0.05, log=True)}
GROWTH = {"full_batch_at": Float(0.1, 1.0), "batch_lr_power": Float(0.0, 0.75)}
FACTORS, PRICES = (0.5, 1, 2, 4, 8), (16, 64)
SINGLE, ROOT = {"warmup_fraction": 0.2}, {"batch_lr_power": 0.5}
MUON_BASE = {"muon_lr": 0.0129}  # what muon-base has chosen on a quarter of GPT's run
MUON_32 = {"muon_lr": 0.04, "lr": 0.037, "warmup_fraction": 0.362, "beta2": 0.99}  # what muon has chosen in gpt-32
TRUST = {"trust_coefficient": Float(0.001, 0.1, log=True)}
BOUND = {"max_relative_gain": Choice([1.5, 2.0, 4.0, None])}
UNSCALED = {"scaling": "none", "warmup": "fixed"}
AS_IT_COMES = {"gain_power": 0.85, "max_relative_gain": 4.0, "warmup_cap": 0.25}
ADASCALE_SGD = {"base": "sgd", "layer": "model", "gain_power": 1.0}
LENA_SGD = AS_IT_COMES | {"base": "sgd", "gain_power": 1.0}


def lena(name, **changes):
    """LENA as it comes, but for the changes."""
    return Method(name, "lena", AS_IT_COMES | changes)


def growing(name, optimizer, settings):
    """A batch of each factor of the noise scale; and of the root of each price x the noise scale."""
    found = [Method(f"{name}-growth-{factor}", optimizer, settings | {"growth_factor": factor}) for factor in FACTORS]
    return found + [Method(f"{name}-price-{price}", optimizer, settings | {"update_price": price}) for price in PRICES]


def cap(low):
    return {"warmup_cap": Float(low, 0.5)}


def lr(low, high):
    return {"lr": Float(low, high, log=True)}


METHODS = [
    Method("single-worker", "adamw", {}, lr(0.0003, 0.01) | SHORT_WARMUP | BETA2),
    # The rivals.
    Method("adamw", "adamw", {}, LR_POWER | WARMUP | BETA2),
    Method("adascale-fixed", "lena", {"layer": "model", "warmup": "fixed"}, WARMUP | GAIN_POWER | BETA2),
    Method("adascale-state", "lena", {"layer": "model"}, SHORT_WARMUP | cap(0.2) | GAIN_POWER | BETA2),
    Method("lamb", "lena", {"base": "lamb", "lr_power": 0.5} | UNSCALED, lr(0.0003, 0.03) | WARMUP | BETA2),
    Method("batch-warmup", "adamw", {"warmup_fraction": 0.02}, GROWTH | BETA2),
    Method("schedule-free", "schedule-free", {}, LR_POWER | WARMUP | BETA2),
    Method("muon", "muon", {}, MUON_LR | LR_POWER | WARMUP | BETA2),
    # An experiment: Muon's learning rates scaled by LENA, tensor by tensor.
    Method("lena-muon", "lena-muon", {}, MUON_LR | {"gain_power": Float(0.25, 1.0)} | cap(0.1) | BETA2),
    # LENA, and then rules that need no trial at the large batch: what LENA and AdaScale do as they come, and the two
    # fixed scalings, which the space of adamw holds. They are warm after a quarter of the run at the latest.
    Method("lena", "lena", {}, cap(0.1) | GAIN_POWER | BOUND | BETA2),
    lena("lena-as-is"),
    lena("lena-batch-warmup", full_batch_at=0.95),  # the same growing batch, without a trial and without a rule for lr
    Method("adascale-as-is", "lena", {"layer": "model", "gain_power": 1.0}),
    lena("lena-model-as-is", layer="model"),  # one gain for the model: AdaScale with the same power and cap
    Method("sqrt-scaling", "adamw", {"lr_power": 0.5, "warmup_fraction": 0.25}),
    Method("linear-scaling", "adamw", {"lr_power": 1.0, "warmup_fraction": 0.25}),
    # Keys of LENA: how strong the gain is and how it is bound, then one change at a time to LENA as it comes.
    lena("power-1-bound-2", gain_power=1.0, max_relative_gain=2.0),
    lena("power-1-no-bound-factor-8", gain_power=1.0, max_relative_gain=None, max_factor=8.0),
    lena("power-0.75-bound-2", gain_power=0.75, max_relative_gain=2.0),
    lena("no-bound-0.75", gain_power=0.75, max_relative_gain=None),
    lena("no-bound", max_relative_gain=None),
    lena("no-bound-cap-0.4", max_relative_gain=None, warmup_cap=0.4),
    lena("no-bound-0.75-cap-0.4", gain_power=0.75, max_relative_gain=None, warmup_cap=0.4),
    lena("bound-2", max_relative_gain=2.0),
    lena("printed", gain_power=1.0, max_relative_gain=None, warmup_cap=None),
    lena("module", layer="module"),
    lena("block", layer="block"),
    lena("model", layer="model"),
    lena("cap-0.1", warmup_cap=0.1),
    lena("no-cap", warmup_cap=None),
    lena("fixed-warmup", warmup="fixed", warmup_fraction=0.25),
    lena("smoothing-0.9", smoothing=0.9),
    # The lr that LAMB has chosen on GPT at n = 32 (on BERT it has chosen half of it), without its sqrt(32).
    lena("lena-lamb-0.5", base="lamb", gain_power=0.5, lr=0.0125),
    lena("lena-lamb-0.85", base="lamb", lr=0.0125),
    Method("preconditioned-0.5", "preconditioned-lena", AS_IT_COMES | {"gain_power": 0.5}),
    # Batches that follow the noise, from 2 micro-batches to the n of the study. Nothing is tuned: lr, beta2 and warm-up
    # are those of GPT's single worker. "root": the learning rate follows the square root of the batch. "kept": all
    # settings are those that trials have chosen for a fixed batch, of 32.
    *growing("adamw", "adamw", SINGLE),
    *growing("adamw-root", "adamw", SINGLE | ROOT),
    *growing("lena", "lena", AS_IT_COMES),
    *growing("muon", "muon", SINGLE | MUON_BASE),
    *growing("muon-root", "muon", SINGLE | MUON_BASE | ROOT),
    *growing("muon-kept", "muon", MUON_32),
    Method("norm-test-0.7", "adamw", SINGLE | ROOT | {"norm_test": 0.7}),
    # Muon with few micro-batches, to start from; and fixed batches with the settings of growing ones.
    Method("muon-base", "muon", SINGLE, {"muon_lr": Float(0.005, 0.2, log=True)}),
    Method("muon-root", "muon", SINGLE | MUON_BASE | ROOT),
    Method("muon-kept", "muon", MUON_32),
    # SGD, as in the LENA paper: warm-ups none, fixed and by layer (for AdaScale: by the model), and a tuned LARS.
    Method("single-worker-sgd", "sgd", {}, lr(0.003, 0.3) | {"warmup_fraction": Float(0.0, 0.1)}),
    Method("lars", "lena", {"base": "lars"} | UNSCALED, lr(0.01, 1.0) | TRUST | {"warmup_fraction": Float(0.01, 0.25)}),
    Method("lsw", "sgd", {"lr_power": 1.0, "warmup_fraction": 0.05}),
    Method("adascale-sgd-none", "lena", ADASCALE_SGD | {"warmup": "none"}),
    Method("adascale-sgd-fixed", "lena", ADASCALE_SGD | {"warmup": "fixed"}),
    Method("adascale-sgd-state", "lena", ADASCALE_SGD | {"warmup": "layer", "warmup_cap": None}),
    Method("lena-sgd", "lena", LENA_SGD),
    Method("lena-sgd-0.85", "lena", LENA_SGD | {"gain_power": 0.85}),
    Method("lena-sgd-none", "lena", LENA_SGD | {"warmup": "none"}),
    Method("lena-sgd-fixed", "lena", LENA_SGD | {"warmup": "fixed"}),
    Method("lena-sgd-paper", "lena", LENA_SGD | {"warmup_cap": None, "max_relative_gain": None}),
]

# -- studies -----------------------------------------------------------------------------------------------------------

STUDIES = []


def study(name, methods, **more):
    """A further study, of the methods whose names stand in one string."""
    by_name = {method.name: method for method in METHODS}
    STUDIES.append(Study(name=name, methods=tuple(by_name[method] for method in methods.split()), **more))
    return STUDIES[-1]


def again(study, name, **changes):
    """A further study like another one, but for the changes."""
    STUDIES.append(replace(study, name=name, **changes))
    return STUDIES[-1]


GPT_1 = study("gpt-1", "single-worker", task=GPT, n=1, trials=12)
BERT_1 = again(GPT_1, "bert-1", task=BERT)
ON_GPT, ON_BERT = {"task": GPT, "base": GPT_1}, {"task": BERT, "base": BERT_1}
GPT_32 = study(
    "gpt-32",
    "lena adamw adascale-state lamb lena-as-is batch-warmup sqrt-scaling adascale-as-is linear-scaling "
    "lena-model-as-is lena-batch-warmup muon lena-muon schedule-free adascale-fixed power-1-bound-2",
    n=32,
    trials=12,
    picture=True,
    **ON_GPT,
)
BERT_32 = again(GPT_32, "bert-32", **ON_BERT)
KEYS = study(
    "gpt-keys",
    "lena-as-is power-1-bound-2 power-1-no-bound-factor-8 power-0.75-bound-2 no-bound-0.75 no-bound no-bound-cap-0.4 "
    "no-bound-0.75-cap-0.4 model block module printed bound-2 cap-0.1 no-cap lena-lamb-0.5 lena-lamb-0.85 fixed-warmup "
    "smoothing-0.9 preconditioned-0.5",
    n=32,
    seeds=(11, 12),
    split="validation",
    **ON_GPT,
)
again(KEYS, "bert-keys", **ON_BERT)
SOME = "lena-as-is power-1-bound-2 no-bound-0.75"
KEYS_128 = study("gpt-128-keys", SOME, n=128, seeds=(11, 12), split="validation", **ON_GPT)
again(KEYS_128, "bert-128-keys", **ON_BERT)
# Is a run of three quarters of the updates as good?
study("gpt-32-short", "lena-as-is lena adamw", task=GPT_SHORT, n=32, base=GPT_1, settings_of=GPT_32)
# Other batches, at the settings that n = 32 has chosen; learning rates follow n by their power. (Muon's own has none
# and stays.)
GPT_8 = study(
    "gpt-8",
    "lena adamw adascale-state lamb lena-as-is batch-warmup sqrt-scaling lena-model-as-is muon schedule-free "
    "adascale-fixed linear-scaling",
    n=8,
    settings_of=GPT_32,
    **ON_GPT,
)
again(GPT_8, "bert-8", settings_of=BERT_32, **ON_BERT)
again(GPT_8, "gpt-128", n=128)
again(GPT_8, "bert-128", n=128, settings_of=BERT_32, **ON_BERT)
# The largest batch with trials of its own: how much of the distance is tuning?
TUNED = study("gpt-128-tuned", "adamw", n=128, trials=12, **ON_GPT)
again(TUNED, "bert-128-tuned", **ON_BERT)
# The front of updates and loss: batches that follow the noise, and fixed ones.
study(
    "gpt-growth",
    "lena-growth-0.5 lena-growth-1 lena-growth-2 lena-growth-4 lena-price-16 lena-price-64 adamw-growth-1 "
    "adamw-root-growth-1 adamw-root-growth-4 adamw-root-price-16 norm-test-0.7 muon-growth-1 muon-root-growth-1 "
    "muon-root-growth-2 muon-root-price-16 muon-kept-growth-1 muon-kept-price-16 muon-kept-price-64",
    n=128,
    seeds=(1,),
    **ON_GPT,
)
study(
    "gpt-growth-more",
    "lena-growth-8 adamw-root-growth-8 muon-kept-growth-0.5 muon-kept-growth-2 muon-kept-growth-4 muon-kept-growth-8",
    n=128,
    seeds=(1,),
    **ON_GPT,
)
study("gpt-growth-seeds", "muon-kept-price-16", n=128, seeds=(2, 3), **ON_GPT)
study("gpt-quarter-2", "muon-base", task=GPT_QUARTER, n=2, trials=4, seeds=(1,), base=GPT_1)
study("gpt-16", "muon lena-as-is muon-root muon-kept", n=16, settings_of=GPT_32, seeds=(1,), **ON_GPT)
study("gpt-16-seeds", "muon-kept", n=16, seeds=(2, 3), **ON_GPT)
study("gpt-8-kept", "muon-kept", n=8, seeds=(1,), **ON_GPT)
study("gpt-4", "lena-as-is adamw muon muon-kept", n=4, settings_of=GPT_32, seeds=(1,), **ON_GPT)
study("gpt-1-muon", "muon-root", n=1, seeds=(1,), **ON_GPT)  # the learning rate is what n = 2 has chosen
# A model on which nothing was chosen: do the defaults hold?
LLAMA_1 = again(GPT_1, "llama-1", task=LLAMA)
THIRD = "lena-as-is lena-model-as-is sqrt-scaling adamw muon"
LLAMA_32 = study("llama-32", THIRD, task=LLAMA, n=32, base=LLAMA_1, trials=12)
# The front on these two: of Muon, with the settings that trials have chosen for n = 32.
LLAMA_16 = study("llama-16", "muon", task=LLAMA, n=16, base=LLAMA_1, settings_of=LLAMA_32, seeds=(1,))
again(LLAMA_16, "llama-8", n=8, seeds=(1, 2, 3))
for task, base, lr_32 in ((LLAMA, LLAMA_1, 0.041), (BERT, BERT_1, 0.056)):
    kept = MUON_32 | {"lr": lr_32}
    grown = {method.name: method for method in growing("muon-kept", "muon", kept)}
    grows = Study(
        name=f"{task.name}-growth", task=task, n=128, base=base, methods=(grown["muon-kept-price-16"],), seeds=(1,)
    )
    fixed = replace(grows, name=f"{task.name}-8-kept", n=8, methods=(Method("muon-kept", "muon", kept),))
    STUDIES += [replace(grows, seeds=(1, 2, 3)), fixed]
FASHION_1 = study("fashion-1", "single-worker-sgd", task=FASHION, n=1, trials=12)
FASHION_32 = study(
    "fashion-32",
    "lars lsw adascale-sgd-none adascale-sgd-fixed adascale-sgd-state lena-sgd-none lena-sgd-fixed lena-sgd-paper "
    "lena-sgd lena-sgd-0.85",
    task=FASHION,
    n=32,
    base=FASHION_1,
    trials=12,
)
for n in (8, 16, 64, 128):
    again(FASHION_32, f"fashion-{n}", n=n, trials=0, settings_of=FASHION_32)
