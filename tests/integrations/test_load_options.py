"""What `load_checkpoint` is asked for beyond the plain load: done, told, or refused by name, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_lena
from ds_lena.optimizer import controller_of
from ds_lena.schedule import checkpoint
from tests.helpers.grids import one_grid
from tests.helpers.marks import rest
from tests.integrations import test_experts, test_pipeline, test_tensor_parallel
from tests.integrations._engines import Net, config, engine, said, stock_engine
from tests.integrations._engines import train as train_two
from tests.integrations._ranks import Ranks
from tests.integrations._resharding import Model, differing, entries, groups, train, whole
from tests.integrations._split import TwoParts
from tests.integrations.test_sequence_parallel import ulysses

FROZEN = "net.right.0.weight"


def made_of(stage: int, precision: str = "fp32", seed: int = 1, **more: Any) -> Any:
    model = Model(seed)
    return engine(entries(stage, precision, "adamw", {}) | more, model, model_parameters=groups(model))


def remembered(made: Any) -> dict[str, Any]:
    return checkpoint.to_dict(controller_of(made.basic_optimizer).schedule)


def saved(folder: str, stage: int, precision: str = "fp32", **keys: Any) -> dict[str, Tensor]:
    with made_of(stage, precision, seed=0) as made:
        train(made, range(2))
        made.save_checkpoint(folder, **keys)
        return whole(made)


def loaded(folder: str, stage: int, precision: str = "fp32", **keys: Any) -> dict[str, Any]:
    """What an engine that has had one update is after a load, and what was said; or the error."""
    with made_of(stage, precision) as made:
        train(made, range(1))
        before, state = whole(made), remembered(made)
        with said() as messages:
            try:
                made.load_checkpoint(folder, **keys)
            except ds_lena.StateError as error:
                return {"error": str(error), "changed": differing(before, whole(made)), "steps": made.global_steps}
        after = whole(made)
        train(made, range(1))  # it can be trained
        return {"before": before, "after": after, "kept": remembered(made)["update"] == state["update"] + 1,
                "said": messages, "steps": made.global_steps - 1}  # fmt: skip


def is_state(key: str) -> bool:
    return " " in key and not key.endswith(" master")


# -- the weights alone -------------------------------------------------------------------------------------------------

ALONE = [(2, "bf16", 2, "bf16"), (2, "bf16", 3, "bf16"), (0, "bf16", 0, "bf16"), (3, "fp32", 0, "fp32")]
ALONE += [(3, "bf16", 1, "bf16-fp32"), (1, "bf16-fp32", 0, "bf16"), (3, "fp32", 3, "fp32")]


@pytest.mark.parametrize(("old", "precision", "new", "then"), rest(ALONE, ALONE[:3]))
@pytest.mark.parametrize(
    "keys", [{"load_module_only": True}, {"load_optimizer_states": False}], ids=lambda keys: next(iter(keys))
)
def test_the_weights_alone_come_with_their_masters_and_the_optimizer_stays(
    ranks: Ranks, tmp_path: Path, old: int, precision: str, new: int, then: str, keys: dict[str, bool]
) -> None:
    wanted = ranks.run(saved, str(tmp_path), old, precision)[0]
    for rank, result in enumerate(ranks.run(loaded, str(tmp_path), new, then, **keys)):
        after, before = result["after"], result["before"]
        assert differing(wanted, after) == [key for key in wanted if is_state(key)]
        assert [key for key in differing(before, after) if is_state(key)] == []
        assert result["kept"]
        assert result["steps"] == (1 if "load_module_only" in keys else 2)
        told = [text for text in result["said"] if "load_optimizer_states=False" in text]
        assert len(told) == (rank == 0 and "load_optimizer_states" in keys)


# -- the module --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), rest([(2, 2), (2, 3), (3, 2), (3, 3), (0, 1), (1, 1)], [(2, 2), (3, 2)]))
def test_frozen_weights_that_were_left_out_are_named_or_stay(ranks: Ranks, tmp_path: Path, old: int, new: int) -> None:
    wanted = ranks.run(saved, str(tmp_path), old, exclude_frozen_parameters=True)[0]
    for result in ranks.run(loaded, str(tmp_path), new):
        assert f'lacks "{FROZEN}" of this model' in result["error"] and "load_module_strict=False" in result["error"]
        assert (result["changed"], result["steps"]) == ([], 1)
    for result in ranks.run(loaded, str(tmp_path), new, load_module_strict=False):
        assert differing(wanted, result["after"]) == [FROZEN]
        assert FROZEN not in differing(result["before"], result["after"])


def called_with(folder: str, stage: int) -> list[Any]:
    calls: list[Any] = []

    def load(src: dict[str, Tensor], dst: nn.Module) -> None:
        calls.append(sorted(src))
        dst.load_state_dict(src)

    result = loaded(folder, stage, custom_load_fn=load)
    return [len(calls), result.get("error", ""), result.get("changed", [])]


def test_a_function_that_loads_the_module_is_called_or_refused(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(saved, str(tmp_path), 2)
    assert ranks.run(called_with, str(tmp_path), 2) == [[1, "", []]] * 2
    for calls, error, changed in ranks.run(called_with, str(tmp_path), 3):
        assert (calls, changed) == (0, []) and "custom_load_fn cannot be used" in error


# -- parameter groups --------------------------------------------------------------------------------------------------


def other_groups(folder: str, stage: int) -> dict[str, Any]:
    """Loaded into groups with other keys, and a bias in another one; then into fewer groups."""
    model = Model(seed=1)
    made_groups = groups(model)
    made_groups[0]["params"].append(made_groups[1]["params"].pop())
    made_groups[1]["lr"] = 0.5
    keys = entries(stage, "fp32", "adamw", {}) | {"gradient_clipping": 3.0}
    with engine(keys, model, model_parameters=made_groups) as made, said() as messages:
        made.load_checkpoint(folder)
        rates = [group["lr"] for group in made.basic_optimizer.param_groups]
    with engine(keys, model := Model(seed=1), model_parameters=groups(model)[:2]) as fewer:
        try:
            fewer.load_checkpoint(folder)
            return {}
        except ds_lena.StateError as error:
            return {"said": messages, "rates": rates, "error": str(error)}


@pytest.mark.parametrize("stage", [0, 2])
def test_what_differs_in_the_parameter_groups_is_said(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    ranks.run(saved, str(tmp_path), stage)
    first, second = ranks.run(other_groups, str(tmp_path), stage)
    replaced, moved = sorted(first["said"], key=lambda text: "another parameter group" in text)
    assert '"lr" of group 1: 0.03 instead of 0.5' in replaced
    assert ('"gradient_clipping": 0.0 instead of 3.0' in replaced) == (stage > 0)  # in no file of ZeRO 0
    assert "engine.optimizer.param_groups" in replaced and '"betas"' not in replaced
    assert "1 parameter(s) are in another parameter group" in moved and '"net.right.2.bias" in 0 instead of 1' in moved
    assert first["rates"] == [1e-2, 3e-2, 2e-2]
    assert first["error"] == second["error"]
    assert 'holds the parameter "net.right.4.bias", which this model does not train' in first["error"]


def with_scheduler(folder: str, stage: int) -> tuple[str, int]:
    """The error in an engine that has a scheduler, and its updates after a load without that."""
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}
    model = Model(seed=1)
    keys = entries(stage, "fp32", "adamw", {}) | {"scheduler": scheduler}
    with engine(keys, model, model_parameters=groups(model)) as made:
        before, text = whole(made), ""
        try:
            made.load_checkpoint(folder)
        except ds_lena.StateError as error:
            text = str(error)
        assert differing(before, whole(made)) == []
        made.load_checkpoint(folder, load_lr_scheduler_states=False)
        return text, made.global_steps


def test_a_checkpoint_without_a_scheduler(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(saved, str(tmp_path), 2)
    first, second = ranks.run(with_scheduler, str(tmp_path), 2)
    assert first == second and first[1] == 2
    assert "load_lr_scheduler_states=False" in first[0]


# -- files without a map -----------------------------------------------------------------------------------------------


def stock_saved(folder: str, stage: int) -> None:
    with stock_engine(config(stage)) as made:
        train_two(made, range(2))
        made.save_checkpoint(folder)


def made_stock_into(folder: str, stage: int, **keys: Any) -> str:
    with engine(config(stage)) as made:
        try:
            made.load_checkpoint(folder, **keys)
        except ds_lena.StateError as error:
            return str(error)
        return f"update {ds_lena.report(made)['update']}, step {made.global_steps}"


def as_version_1(folder: Path) -> None:
    for path in folder.rglob("*optim_states.pt"):
        content = torch.load(path, weights_only=False)
        lena = content["optimizer_state_dict"]["base_optimizer_state"]["lena"]
        lena["version"] = 1
        del lena["pieces"]
        torch.save(content, path)


def lena_saved(folder: str, stage: int) -> None:
    with engine(config(stage)) as made:
        train_two(made, range(2))
        made.save_checkpoint(folder)


@pytest.mark.parametrize("old", ["stock AdamW", "version 1"])
def test_files_without_a_map_load_in_their_own_layout_and_say_what_to_do_in_others(
    ranks: Ranks, tmp_path: Path, old: str
) -> None:
    if old == "stock AdamW":
        ranks.run(stock_saved, str(tmp_path), 2)
    else:
        ranks.run(lena_saved, str(tmp_path), 2)
        as_version_1(tmp_path)
    update = 0 if old == "stock AdamW" else 2
    assert ranks.run(made_stock_into, str(tmp_path), 2) == [f"update {update}, step 2"] * 2
    for stage in (0, 3):
        first, second = ranks.run(made_stock_into, str(tmp_path), stage)
        assert first == second and "another optimizer or an older ds_lena wrote it" in first, stage
        assert "save it there with this version" in first


def weights_alone_of_stock(folder: str, old: int, new: int, precision: str, **keys: Any) -> str | list[bool]:
    """Whether weights and masters are those of a run with AdamW, whose optimizer files are gone; or the error."""
    with stock_engine(config(old, precision)) as made:
        train_two(made, range(2))
        made.save_checkpoint(folder)
        wanted = [p.detach().clone() for p in made.module.parameters()]
    if torch.distributed.get_rank() == 0 and old != 3:
        for path in Path(folder).rglob("*optim_states.pt"):
            path.unlink()
    torch.distributed.barrier()
    with engine(config(new, precision), Net(seed=1)) as made:
        try:
            made.load_checkpoint(folder, **keys)
        except ds_lena.StateError as error:
            return str(error)
        same = list(map(torch.equal, wanted, made.module.parameters()))
        before = [p.detach().clone() for p in made.module.parameters()]
        made.optimizer.update_lp_params() if new else None
        moved = [] if new else [p.detach() for group in made.optimizer.fp32_groups for p in group]
        held = moved or list(made.module.parameters())
        return [*same, *(torch.equal(a.float(), b.float()) for a, b in zip(before, held, strict=True))]


@pytest.mark.parametrize("keys", [{"load_module_only": True}, {"load_optimizer_states": False}], ids=str)
@pytest.mark.parametrize(("old", "new"), [(0, 0), (2, 1)])
def test_the_weights_alone_of_stock_adamw(
    ranks: Ranks, tmp_path: Path, old: int, new: int, keys: dict[str, bool]
) -> None:
    for same in ranks.run(weights_alone_of_stock, str(tmp_path), old, new, "bf16", **keys):
        assert all(same) and len(same) == 24


@pytest.mark.parametrize(("old", "new"), [(3, 3), (3, 1), (1, 3)])
def test_where_deepspeed_loads_none_of_them_it_is_refused(ranks: Ranks, tmp_path: Path, old: int, new: int) -> None:
    first, second = ranks.run(weights_alone_of_stock, str(tmp_path), old, new, "fp32", load_module_only=True)
    assert first == second and "DeepSpeed loads no weights alone at ZeRO-3" in first


def older_weights_of_stock(folder: str) -> str:
    """The error where the older of two checkpoints of AdamW is asked for, without its state."""
    with stock_engine(config(3)) as made:
        for update, tag in enumerate(("older", "newer")):
            train_two(made, range(update, update + 1))
            made.save_checkpoint(folder, tag=tag)
    with engine(config(3), Net(seed=1)) as made:
        made.load_checkpoint(folder, tag="newer", load_optimizer_states=False)
        try:
            made.load_checkpoint(folder, tag="older", load_optimizer_states=False)
        except ds_lena.StateError as error:
            return str(error)
        return ""


def test_deepspeed_would_load_the_weights_of_another_tag(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.run(older_weights_of_stock, str(tmp_path))
    assert first == second and "whatever tag is asked for" in first and 'Write "older" into it' in first


def back_to_stock(folder: str, stage: int) -> list[str]:
    """What of the moments and masters differs between a run with LENA, and torch's AdamW that loads its checkpoint."""
    with engine(config(stage)) as made:
        train_two(made, range(2))
        made.save_checkpoint(folder)
        ours = [{"master": p.detach().clone(), **made.basic_optimizer.state[p]} for p in masters(made)]
    with stock_engine(config(stage)) as made:
        made.load_checkpoint(folder)
        theirs = [{"master": p.detach().clone(), **made.basic_optimizer.state[p]} for p in masters(made)]
    return [
        key
        for a, b in zip(ours, theirs, strict=True)
        for key in ("master", "exp_avg", "exp_avg_sq", "step")
        if not torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key]))
    ]


def masters(made: Any) -> list[Tensor]:
    return [p for group in made.basic_optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("stage", rest([0, 1, 2], [2]))
def test_stock_adamw_goes_on_with_the_moments(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    assert ranks.run(back_to_stock, str(tmp_path), stage) == [[], []]


# -- models in parts ---------------------------------------------------------------------------------------------------


def moved_in_parts(folder: str, old: int, new: int) -> list[str]:
    """What differs after a load at another ZeRO stage, on two tensor-parallel ranks."""
    found = []
    for stage, act in ((old, "save"), (new, "load")):
        model = Model(seed=0 if act == "save" else 1)
        given = entries(stage, "fp32", "adamw", {}) | {"gradient_accumulation_steps": 2}
        with engine(given, model, mpu=TwoParts(), model_parameters=groups(model)) as made:
            if act == "save":
                test_tensor_parallel.train_alike(made, range(2))
                made.save_checkpoint(folder)
            else:
                made.load_checkpoint(folder)
            found.append(whole(made) | {"report": torch.tensor([repr(ds_lena.report(made)).encode().__hash__()])})
    return differing(*found)


@pytest.mark.parametrize(("old", "new"), rest([(0, 1), (1, 2), (2, 3), (3, 1), (1, 0)], [(1, 2)]))
def test_a_model_in_parts_goes_to_another_stage(ranks: Ranks, tmp_path: Path, old: int, new: int) -> None:
    assert ranks.run(moved_in_parts, str(tmp_path), old, new) == [[], []]


def test_another_number_of_parts_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(moved_in_parts, str(tmp_path), 1, 1)
    for result in ranks.run(loaded, str(tmp_path), 1):
        assert "is of a model in 2 parts, and this run has it in 1" in result["error"]
        assert result["changed"] == []


def of_kind(folder: str, kind: str, old: int, new: int) -> tuple[str, str]:
    """The errors of a model with experts or stages at another ZeRO stage, and of a damaged file in its own."""

    def made(stage: int) -> Any:
        return engine(config(stage), test_experts.Mixture() if kind == "experts" else test_pipeline.pipeline())

    def error_at(stage: int) -> str:
        with one_grid(), made(stage) as other:
            before = [p.detach().clone() for p in other.module.parameters()]
            try:
                other.load_checkpoint(folder)
            except ds_lena.StateError as error:
                same = all(map(torch.equal, before, other.module.parameters()))
                return str(error) if same else f"changed, {error}"
            return ""

    with one_grid(), made(old) as first:
        first.save_checkpoint(folder)
    own = error_at(old)
    another = error_at(new)
    rank = torch.distributed.get_rank()
    (aside,) = Path(folder).rglob("layer_00-model_states.pt" if kind == "pipeline" else "*expert_1_*model_states.pt")
    torch.distributed.barrier()
    if rank == 0:
        aside.rename(f"{folder}/aside")
    torch.distributed.barrier()
    missing = error_at(old)
    torch.distributed.barrier()
    if rank == 0:
        Path(f"{folder}/aside").rename(aside)
        for path in Path(folder).rglob("*optim_states.pt"):
            path.write_bytes(b"")
    torch.distributed.barrier()
    return own, another, missing, error_at(old)


@pytest.mark.parametrize(("kind", "old", "new"), [("experts", 2, 0), ("pipeline", 1, 0)])
def test_pipelines_and_experts_are_checked_in_their_layout_and_refused_in_others(
    ranks: Ranks, tmp_path: Path, kind: str, old: int, new: int
) -> None:
    first, second = ranks.run(of_kind, str(tmp_path), kind, old, new)
    assert first == second
    assert first[0] == ""
    assert "a model with pipeline stages or experts is loaded in its own only" in first[1]
    assert "cannot be read as a file of a checkpoint (" in first[2] and (
        "layer 0" in first[2] or "expert_1" in first[2]
    )
    assert "optim_states.pt cannot be read" in first[3]


def from_sequences(folder: str, old: int) -> dict[str, Tensor]:
    with one_grid():
        model = Model()
        with engine(entries(old, "fp32", "adamw", {}), model, mpu=ulysses(), model_parameters=groups(model)) as made:
            train(made, range(2))
            made.save_checkpoint(folder)
            return whole(made)


@pytest.mark.full
@pytest.mark.parametrize(("old", "new"), [(1, 3), (3, 2), (2, 2)])
def test_a_run_with_sequence_parallelism_goes_on_without(ranks: Ranks, tmp_path: Path, old: int, new: int) -> None:
    wanted = ranks.run(from_sequences, str(tmp_path), old)[0]
    for result in ranks.run(loaded, str(tmp_path), new):
        assert differing(wanted, result["after"]) == []


# -- saving ------------------------------------------------------------------------------------------------------------


def saved_in_a_window(folder: str) -> list[str]:
    with engine(config(2)) as made, said() as messages:
        made.save_checkpoint(folder)
        made.backward(made(torch.ones(2, 4), torch.ones(2, 4)))
        made.step()
        made.save_checkpoint(folder)
        return messages


def test_a_save_in_the_middle_of_an_update_says_what_is_not_in_it(ranks: Ranks, tmp_path: Path) -> None:
    (message,), others = ranks.run(saved_in_a_window, str(tmp_path))
    assert "save_checkpoint() in the middle of an update" in message and "its 1 backward pass(es) so far" in message
    assert others == []


def test_lenas_part_loads_with_weights_only(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(saved, str(tmp_path), 1)
    path = next(tmp_path.rglob("*optim_states.pt"))
    lena = torch.load(path, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]["lena"]
    torch.save(lena, tmp_path / "lena.pt")
    assert torch.load(tmp_path / "lena.pt", weights_only=True) == lena and lena["pieces"]
