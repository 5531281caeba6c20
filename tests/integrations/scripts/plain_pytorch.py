"""Training in plain PyTorch where neither DeepSpeed nor transformers can be imported. Prints one line of JSON."""

import importlib.abc
import json
import sys

FORBIDDEN = {"deepspeed", "transformers", "accelerate"}


class Forbid(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname.split(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


sys.meta_path.insert(0, Forbid())

import torch  # noqa: E402

import ds_lena  # noqa: E402

torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = ds_lena.LENA(model.named_parameters(), lr=0.05, total_steps=20)
losses = []
for _ in range(20):
    for _ in range(2):
        x = torch.randn(8, 4)
        loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        (loss / 2).backward()
    losses.append(loss.item())
    optimizer.step()
    optimizer.zero_grad()
imported = sorted(FORBIDDEN & set(sys.modules))
print(json.dumps({"losses": losses, "report": ds_lena.report(optimizer), "imported": imported}))
